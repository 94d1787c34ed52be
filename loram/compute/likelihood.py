"""The likelihood of rows of tokens under a model, in memory or streamed from disk one decoder layer at a time."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loram.base.constants import BATCH_TOKENS
from loram.base.progress import track
from loram.compute.device import compute_dtype, fits
from loram.compute.resident import load_adapted, load_resident
from loram.compute.streaming import Stream
from loram.data.batches import IGNORED, Batch, make_batches
from loram.data.spec import DataSpec, Kind
from loram.data.tokens import Tokens, load_tokens
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Bytes. The float32 logits of a batch that is scored in memory take at most this much.
_LOGITS_BYTES = 1 << 28
SCORED: tuple[Kind, ...] = ("text", "pairs")  # the kinds of rows that models are evaluated on


def load_scored(
    spec: DataSpec,
    checkpoint: Checkpoint,
    tokenizer: "PreTrainedTokenizerBase",
    max_samples: int | None,
    max_length: int,
    kinds: Sequence[Kind] = ("text",),
) -> Tokens:
    """Read the tokens of a data set that is to be scored.

    Args:
        spec: the data set.
        checkpoint: the model that scores it.
        tokenizer: the tokenizer of the model.
        max_samples: how many rows to score at most, or pieces of a long text; None for all. `spec.max_samples` limits
            them too.
        max_length: the limit of a row in tokens.
        kinds: what may be learnt from the rows.

    Raises:
        UserError: as in `loram.data.tokens.load_tokens`.
    """
    limits = [limit for limit in (max_samples, spec.max_samples) if limit is not None]
    spec = spec.model_copy(update={"max_samples": min(limits, default=None)})
    tokens = load_tokens(spec, tokenizer, max_length, vocabulary=checkpoint.vocabulary, kinds=kinds)
    return dataclasses.replace(tokens, rows=tokens.rows.select(range(min([len(tokens.rows), *limits]))))


def loaded_losses(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    device: torch.device,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
) -> tuple[Tensor, int]:
    """Load a model, with an adapter in PEFT's own layers, and score rows.

    Returns:
        (summed loss of each row in nats, (rows,) float64; number of parameters with the adapter's).
    """
    model, parameters = load_adapted(checkpoint, adapter, device)
    return model_losses(model, input_ids, labels), parameters


def adapted_losses(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    device: torch.device,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
    *,
    stream: bool = False,
) -> list[float]:
    """Compute the mean loss of a model with each of several adapters, in nats per token.

    The adapters need not be on disk. If the model fits in memory, it is loaded once; otherwise, or with `stream`, it is
    streamed from disk once per adapter; also where adapters are on experts, whose weights they are added to.
    """
    stream = stream or any(adapter.of_experts for adapter in adapters)
    if stream or not fits(checkpoint.parameters * compute_dtype(device).itemsize, device):
        scored = (streamed_losses(checkpoint, adapter, device, input_ids, labels) for adapter in adapters)
        return [mean_loss(losses, labels) for losses, _ in scored]
    model = load_resident(checkpoint, device)[0].to(device).eval()
    losses = []
    for adapter in adapters:
        handles = [adapter.add_to_(model.get_submodule(name), name, device)[0] for name in adapter.modules]
        losses.append(mean_loss(model_losses(model, input_ids, labels), labels))
        for handle in handles:
            handle.remove()
    return losses


def predicted(labels: Sequence[list[int]]) -> int:
    """Return how many tokens of some rows are in the loss; the first token of a row is never predicted."""
    return sum(label != IGNORED for row in labels for label in row[1:])


def mean_loss(losses: Tensor, labels: Sequence[list[int]]) -> float:
    """Return the mean loss in nats per token of rows with these summed losses, (rows,)."""
    return float(losses.sum()) / predicted(labels)


def model_losses(model: "PreTrainedModel", input_ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Tensor:
    """Score rows by a model that is in memory; returns the summed loss of each row in nats, (rows,) float64."""
    max_tokens = _LOGITS_BYTES // (4 * model.config.vocab_size)
    batches = make_batches(input_ids, labels, max_tokens=max_tokens)
    return _by_row(batches, (_batch_losses(model, batch) for batch in track(batches, "Evaluating")))


@torch.inference_mode()
def _batch_losses(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """Return the negative log-likelihoods of the batch's targets, in nats: (targets,) float32."""
    output = model(input_ids=batch.ids.to(model.device), attention_mask=batch.real.to(model.device), use_cache=False)
    logits: Tensor = output.logits[batch.wanted.to(model.device)].float()  # (targets, vocabulary)
    # On a CPU, torch's float32 log_softmax over a vocabulary has errors up to 1e-5, its logsumexp up to 1e-6.
    targets = logits.gather(1, batch.targets.to(model.device)[:, None])[:, 0]
    losses: Tensor = logits.logsumexp(1) - targets
    return losses


def streamed_losses(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    device: torch.device,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
) -> tuple[Tensor, int]:
    """Score rows like `loaded_losses`, but with only one decoder layer in memory at a time."""
    added = 0 if adapter is None else sum(tensor.numel() for tensor in adapter.tensors.values())
    parameters = checkpoint.parameters + added
    batches = make_batches(input_ids, labels, max_tokens=BATCH_TOKENS)
    if not batches:  # one of several processes may have none
        return torch.zeros(0, dtype=torch.float64), parameters
    stream = Stream(checkpoint, batches, device=device, dtype=compute_dtype(device), adapter=adapter)
    for _ in stream.forward():
        pass
    return _by_row(batches, (-log_probs for log_probs in stream.log_probs())), parameters


def _by_row(batches: Sequence[Batch], losses: Iterable[Tensor]) -> Tensor:
    """Return the sum of each row's losses, in float64, of the losses of each batch's targets."""
    sums = torch.zeros(sum(len(batch.rows) for batch in batches), dtype=torch.float64)
    for batch, values in zip(batches, losses, strict=True):
        places = torch.tensor(batch.rows)[batch.wanted.nonzero()[:, 0]]
        sums.index_add_(0, places, values.double().cpu())
    return sums
