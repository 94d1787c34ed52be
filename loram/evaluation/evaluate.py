"""The evaluate stage: the perplexity of a model, with or without an adapter, averaged over tokens."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from loram.base import processes
from loram.base.paths import local
from loram.compute.belonging import load_for
from loram.compute.device import join_processes
from loram.compute.likelihood import SCORED, load_scored, loaded_losses, mean_loss, predicted, streamed_losses
from loram.compute.loading import load_tokenizer
from loram.data.batches import share
from loram.data.spec import DataSpec, as_spec
from loram.disk.opening import open_model
from loram.evaluation.options import EvaluateOptions
from loram.evaluation.preferences import Preferences


class Report(BaseModel):
    """The result of an evaluation.

    Args:
        perplexity: exp(loss).
        loss: the mean negative log-likelihood of the tokens in the loss, in nats per token.
        tokens: how many tokens are in the loss: those of completions, or in a text all but the first of each piece.
        rows: how many rows, or pieces of text, were scored.
        rows_truncated, rows_skipped: how many rows were cut to the maximal length, and how many had no token in the
            loss; see `loram.data.tokens.Tokens`.
        parameters: the number of parameters, including the adapter's; a tied weight counts once.
        model, adapter, dataset: the names of the model, the adapter and the data set.
        preferences: of rows with a chosen and a rejected answer, which the model prefers; all of the above is then of
            the chosen answers. None for other rows.
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
    preferences: Preferences | None = None


def evaluate(
    base: str | Path,
    *,
    adapter: str | Path | None = None,
    data: DataSpec | str | Path | Mapping[str, Any],
    options: EvaluateOptions | None = None,
    device: str | None = None,
    chat_template: str | Path | None = None,
    **fields: Any,
) -> Report:
    """Compute the perplexity of a model on a data set.

    If a row has a prompt, only its completion is scored. In plain text all tokens are scored. Of rows with a chosen and
    a rejected answer, both are scored and compared. Several processes of a launcher share the rows, each with the model
    in its own memory or streamed, and all get the report.

    Args:
        base: the hub id, folder or GGUF file of a full model, or a pruned or merged folder.
        adapter: the folder of a LoRA adapter that fits `base`: a recovered adapter for the full model, or a trained
            adapter for its pruned model.
        data: the data set (see `loram.data.tokens`).
        options: how to evaluate; single options may be given by name instead: `stream=True` reads the model from disk
            one decoder layer at a time instead of loading it, with the same result.
        device: `cpu`, `cuda`, ... (default: the first GPU, or the CPU if there is none).
        chat_template: a .jinja file, or a model whose tokenizer has a template, in place of the model's own template.
        fields: single options by name, over `options`; see `EvaluateOptions`.

    Raises:
        UserError: the model, the adapter or the data cannot be used, or the adapter does not fit the model.
        FloatingPointError: the loss is not finite.
    """
    settings = EvaluateOptions.of(options, **fields)
    checkpoint, spec = open_model(base, chat_template=chat_template), as_spec(data)
    loaded_adapter = None if adapter is None else load_for(checkpoint, local(adapter))
    compute_device = join_processes(device)
    tokens = load_scored(
        spec, checkpoint, load_tokenizer(checkpoint), settings.max_samples, settings.max_length, SCORED
    )
    ids, labels = tokens.sequences("input_ids"), tokens.sequences("labels")
    score = streamed_losses if settings.stream else loaded_losses
    own = share(ids)
    part, parameters = score(
        checkpoint, loaded_adapter, compute_device, [ids[row] for row in own], [labels[row] for row in own]
    )
    losses = torch.zeros(len(ids), dtype=torch.float64)
    for rows, values in processes.gather((own, part)):
        losses[rows] = values
    count, (first, *others) = len(tokens.rows), losses.split(len(tokens.rows))
    loss = mean_loss(first, labels[:count])
    if not math.isfinite(loss):
        raise FloatingPointError(f"{checkpoint.name}: the loss on {spec.path} is {loss}")
    return Report(
        perplexity=math.exp(loss),
        loss=loss,
        tokens=predicted(labels[:count]),
        rows=count,
        rows_truncated=tokens.truncated,
        rows_skipped=tokens.skipped,
        parameters=parameters,
        model=checkpoint.name,
        adapter=None if adapter is None else str(adapter),
        dataset=spec.path,
        preferences=Preferences.of(first, others[0]) if others else None,
    )
