"""The evaluate stage: token-weighted perplexity of a model, with or without an adapter."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loram.compute.device import pick_device
from loram.compute.likelihood import load_scored, loaded_loss, streamed_loss
from loram.compute.loading import load_tokenizer
from loram.data.spec import DataSpec, as_spec
from loram.disk.adapter import load_for
from loram.disk.opening import open_model
from loram.evaluation.options import EvaluateOptions


class Report(BaseModel):
    """What an evaluation found.

    Args:
        perplexity: exp(loss).
        loss: mean negative log-likelihood of the tokens in the loss, in nats.
        tokens: how many those are (completion tokens; for text all but each piece's first).
        rows: how many rows (or pieces of text) were scored; rows_truncated, rows_skipped: see `loram.data.tokens`.
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
    options: EvaluateOptions | None = None,
    device: str | None = None,
    **fields: Any,
) -> Report:
    """Perplexity of a model on a data set: completion tokens where there is a prompt, all tokens of plain text.

    Args:
        base: hub id, folder or GGUF file of a full model, or a pruned or merged folder.
        adapter: LoRA folder that fits `base`: a recovered one on the full model, a trained one on its pruned model.
        data: the rows (see `loram.data.tokens`).
        options: how to evaluate; single options may be given by name instead: `stream=True`, which reads the model from
            disk one decoder layer at a time, for models that fit in neither memory nor GPU, with the same result.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.
        fields: single options by name, over `options`; see `EvaluateOptions`.

    Raises:
        UserError: model, adapter or data cannot be used, or the adapter does not fit the model.
    """
    settings = EvaluateOptions.of(options, **fields)
    checkpoint, spec = open_model(base), as_spec(data)
    update = None if adapter is None else load_for(checkpoint, Path(adapter))
    chosen = pick_device(device)
    tokens = load_scored(spec, checkpoint, load_tokenizer(checkpoint), settings.max_samples, settings.max_length)
    rows = tokens.rows
    score = streamed_loss if settings.stream else loaded_loss
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
