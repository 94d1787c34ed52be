"""The evaluate stage: token-weighted perplexity of a model, with or without an adapter."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from loram.data import Tokens, load_tokens
from loram.data_spec import DataSpec, as_spec
from loram.model.adapter import Adapter, load_for
from loram.model.batches import Batch, make_batches
from loram.model.checkpoint import Checkpoint, open_model
from loram.model.device import compute_dtype, pick_device
from loram.model.pruned import load_model, load_tokenizer
from loram.model.streaming import BATCH_TOKENS, Stream
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
    stream: bool = False,
    device: str | None = None,
) -> Report:
    """Perplexity of a model on a data set: completion tokens where there is a prompt, all tokens of plain text.

    Args:
        base: hub id, folder or GGUF file of a full model, or a pruned or merged folder.
        adapter: LoRA folder that fits `base`: a recovered one on the full model, a trained one on its pruned model.
        data: the rows (see `loram.data`).
        max_samples: only the first so many rows; of a plain text file the first so many pieces.
        max_length: tokens; longer rows lose their end, a long text is cut into pieces of this.
        stream: read the model from disk one decoder layer at a time instead of loading it; for models that fit in
            neither memory nor GPU. The result is the same.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.

    Raises:
        UserError: model, adapter or data cannot be used, or the adapter does not fit the model.
    """
    checkpoint, spec = open_model(base), as_spec(data)
    update = None if adapter is None else load_for(checkpoint, Path(adapter))
    chosen = pick_device(device)
    tokens = load_scored(spec, checkpoint, load_tokenizer(checkpoint), max_samples, max_length)
    rows = tokens.rows
    score = _streamed if stream else _in_memory
    loss, count, parameters = score(checkpoint, update, chosen, rows["input_ids"][:], rows["labels"][:])
    if not math.isfinite(loss):
        raise FloatingPointError(f"{checkpoint.name}: the loss on {spec.path} is {loss}")
    return Report(
        perplexity=math.exp(loss / count),
        loss=loss / count,
        tokens=count,
        rows=len(rows),
        rows_truncated=tokens.truncated,
        rows_skipped=tokens.skipped,
        parameters=parameters,
        model=checkpoint.name,
        adapter=None if adapter is None else str(adapter),
        dataset=spec.path,
    )


def load_scored(
    spec: DataSpec, checkpoint: Checkpoint, tokenizer: Any, max_samples: int | None, max_length: int
) -> Tokens:
    """The tokens that `evaluate` scores.

    Raises:
        UserError: as `loram.data.load_tokens`.
    """
    limits = [limit for limit in (max_samples, spec.max_samples) if limit is not None]
    spec = spec.model_copy(update={"max_samples": min(limits, default=None)})
    tokens = load_tokens(spec, tokenizer, max_length, vocabulary=checkpoint.vocabulary)
    return dataclasses.replace(tokens, rows=tokens.rows.select(range(min([len(tokens.rows), *limits]))))


def _in_memory(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    device: torch.device,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
) -> tuple[float, int, int]:
    """(summed loss in nats, tokens in the loss, parameters of the model)."""
    model, parameters = _load(checkpoint, device)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter.folder))
    model = model.to(device).eval()
    max_tokens = _LOGITS_BYTES // (4 * checkpoint.vocabulary)
    batches = make_batches(input_ids, labels, max_tokens=max_tokens)
    total = sum(_batch_loss(model, batch) for batch in track(batches, "Evaluating"))
    added = 0 if adapter is None else sum(tensor.numel() for tensor in adapter.tensors.values())
    return total, sum(len(batch.targets) for batch in batches), parameters + added


def _load(checkpoint: Checkpoint, device: torch.device) -> tuple[Any, int]:
    """(model, its parameters: those in 4 bits counted as what they stand for)."""
    dtype = compute_dtype(device)
    if checkpoint.quantized:
        from loram.model.nf4 import count_parameters, load_4bit

        packed = load_4bit(checkpoint, device=device, dtype=dtype)
        return packed, count_parameters(packed)
    model: Any = load_model(checkpoint, dtype=dtype)
    return model, sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _batch_loss(model: Any, batch: Batch) -> float:
    """Summed negative log-likelihood of the wanted tokens, in nats, accumulated in float64."""
    output = model(input_ids=batch.ids.to(model.device), attention_mask=batch.real.to(model.device), use_cache=False)
    logits = output.logits[batch.wanted.to(model.device)].float()
    # On a CPU torch's float32 log_softmax over a vocabulary is off by 1e-5, its logsumexp by 1e-6 at most.
    targets = logits.gather(1, batch.targets.to(model.device)[:, None])[:, 0]
    return float((logits.logsumexp(1) - targets).double().sum())


def _streamed(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    device: torch.device,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
) -> tuple[float, int, int]:
    """As `_in_memory`, with one decoder layer in memory at a time."""
    batches = make_batches(input_ids, labels, max_tokens=BATCH_TOKENS)
    stream = Stream(checkpoint, batches, device=device, dtype=compute_dtype(device), adapter=adapter)
    for _ in stream.forward():
        pass
    total = -sum(float(found.double().sum()) for found in stream.log_probs())
    added = 0 if adapter is None else sum(tensor.numel() for tensor in adapter.tensors.values())
    return total, stream.predicted, stream.parameters + added
