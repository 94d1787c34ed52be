"""The evaluate stage: token-weighted perplexity of a model, with or without an adapter."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from loram.data import IGNORED, load_rows, tokenize
from loram.data_spec import DataSpec, as_spec
from loram.model.adapter import load_for
from loram.model.checkpoint import Checkpoint, open_model
from loram.model.device import compute_dtype, pick_device
from loram.model.pruned import load_model, load_tokenizer
from loram.progress import track

_LOGITS_BYTES = 1 << 28


class Report(BaseModel):
    """What an evaluation found.

    Args:
        perplexity: exp(loss).
        loss: mean negative log-likelihood of the tokens in the loss, in nats.
        tokens: how many those are (completion tokens; for text all but each piece's first).
        rows: how many rows (or pieces of text) were scored; rows_truncated, rows_skipped: see `loram.data`.
        parameters: of the model, adapter included; a tied weight once.
        model, adapter, dataset: what was evaluated on what.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float
    loss: float
    tokens: int
    rows: int
    rows_truncated: int
    rows_skipped: int
    parameters: int
    model: str
    adapter: str | None
    dataset: str


def evaluate(
    base: str | Path,
    *,
    adapter: str | Path | None = None,
    data: DataSpec | str | Path | Mapping[str, Any],
    max_samples: int | None = None,
    max_length: int = 1024,
    device: str | None = None,
) -> Report:
    """Perplexity of a model on a data set: completion tokens where there is a prompt, all tokens of plain text.

    Args:
        base: hub id, folder or GGUF file of a full model, or a pruned or merged folder.
        adapter: LoRA folder that fits `base`: a recovered one on the full model, a trained one on its pruned model.
        data: the rows (see `loram.data`).
        max_samples: only the first so many rows; of a plain text file the first so many pieces.
        max_length: tokens; longer rows lose their end, a long text is cut into pieces of this.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.

    Raises:
        UserError: model, adapter or data cannot be used, or the adapter does not fit the model.
    """
    checkpoint, spec = open_model(base), as_spec(data)
    if adapter is not None:
        load_for(checkpoint, Path(adapter))
    chosen = pick_device(device)
    tokenizer = load_tokenizer(checkpoint)
    model = _load(checkpoint, adapter, chosen)
    limits = [limit for limit in (max_samples, spec.max_samples) if limit is not None]
    spec = spec.model_copy(update={"max_samples": min(limits, default=None)})
    tokens = tokenize(load_rows(spec), tokenizer, spec.max_length or max_length, name=spec.path)
    rows = tokens.rows.select(range(min([len(tokens.rows), *limits])))
    loss, count = negative_log_likelihood(model, rows["input_ids"][:], rows["labels"][:])
    if not math.isfinite(loss):
        raise FloatingPointError(f"{checkpoint.name}: the loss on {spec.path} is {loss}")
    return Report(
        perplexity=math.exp(loss / count),
        loss=loss / count,
        tokens=count,
        rows=len(rows),
        rows_truncated=tokens.truncated,
        rows_skipped=tokens.skipped,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        model=checkpoint.name,
        adapter=None if adapter is None else str(adapter),
        dataset=spec.path,
    )


def _load(checkpoint: Checkpoint, adapter: str | Path | None, device: torch.device) -> Any:
    model: Any = load_model(checkpoint, dtype=compute_dtype(device))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.to(device).eval()


def negative_log_likelihood(
    model: Any, input_ids: Sequence[list[int]], labels: Sequence[list[int]]
) -> tuple[float, int]:
    """Summed negative log-likelihood (nats, accumulated in float64) of the labelled tokens, and how many they are.

    Each row is conditioned on itself alone; rows are padded on the right and masked, so batching changes nothing.
    """
    total, count = 0.0, 0
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for batch in track(list(_batches(input_ids, _LOGITS_BYTES // (4 * vocabulary))), "Evaluating"):
        width = max(len(input_ids[row]) for row in batch)
        ids = torch.tensor([input_ids[row] + [0] * (width - len(input_ids[row])) for row in batch])
        mask = torch.tensor([[1] * len(input_ids[row]) + [0] * (width - len(input_ids[row])) for row in batch])
        targets = torch.tensor([labels[row] + [IGNORED] * (width - len(labels[row])) for row in batch])[:, 1:]
        with torch.inference_mode():
            output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
            wanted = targets != IGNORED
            logits = output.logits[:, :-1][wanted.to(model.device)].float()
            losses = torch.nn.functional.cross_entropy(logits, targets[wanted].to(model.device), reduction="none")
        total += losses.double().sum().item()
        count += losses.numel()
    return total, count


def _batches(input_ids: Sequence[list[int]], budget: int) -> Iterator[list[int]]:
    """Row numbers in batches of like length, of at most `budget` tokens, padding included (a long row may exceed)."""
    batch: list[int] = []
    for row in sorted(range(len(input_ids)), key=lambda row: len(input_ids[row])):
        if batch and len(input_ids[row]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
