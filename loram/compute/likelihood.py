"""The likelihood of rows of tokens under a model, in memory or streamed from disk one decoder layer at a time."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from loram.base.constants import BATCH_TOKENS
from loram.base.progress import track
from loram.compute.device import compute_dtype, fits
from loram.compute.resident import load_adapted, load_resident
from loram.compute.streaming import Stream
from loram.data.batches import Batch, make_batches
from loram.data.spec import DataSpec
from loram.data.tokens import Tokens, load_tokens
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Bytes. The float32 logits of a batch that is scored in memory take at most this much.
_LOGITS_BYTES = 1 << 28


def load_scored(
    spec: DataSpec,
    checkpoint: Checkpoint,
    tokenizer: "PreTrainedTokenizerBase",
    max_samples: int | None,
    max_length: int,
) -> Tokens:
    """Read the tokens of a data set that is to be scored.

    Args:
        spec: the data set.
        checkpoint: the model that scores it.
        tokenizer: the tokenizer of the model.
        max_samples: how many rows to score at most, or pieces of a long text; None for all. `spec.max_samples` limits
            them too.
        max_length: the limit of a row in tokens.

    Raises:
        UserError: as in `loram.data.tokens.load_tokens`.
    """
    limits = [limit for limit in (max_samples, spec.max_samples) if limit is not None]
    spec = spec.model_copy(update={"max_samples": min(limits, default=None)})
    tokens = load_tokens(spec, tokenizer, max_length, vocabulary=checkpoint.vocabulary)
    return dataclasses.replace(tokens, rows=tokens.rows.select(range(min([len(tokens.rows), *limits]))))


def loaded_loss(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    device: torch.device,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
) -> tuple[float, int, int]:
    """Load a model, with an adapter in PEFT's own layers, and score rows.

    Returns:
        (summed loss in nats, number of tokens in the loss, number of parameters with the adapter's).
    """
    model, parameters = load_adapted(checkpoint, adapter, device)
    total, count = model_loss(model, input_ids, labels)
    return total, count, parameters


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
        sums = [streamed_loss(checkpoint, adapter, device, input_ids, labels) for adapter in adapters]
        return [total / count for total, count, _ in sums]
    model = load_resident(checkpoint, device)[0].to(device).eval()
    losses = []
    for adapter in adapters:
        handles = [adapter.add_to_(model.get_submodule(name), name, device)[0] for name in adapter.modules]
        total, count = model_loss(model, input_ids, labels)
        losses.append(total / count)
        for handle in handles:
            handle.remove()
    return losses


def model_loss(
    model: "PreTrainedModel", input_ids: Sequence[list[int]], labels: Sequence[list[int]]
) -> tuple[float, int]:
    """Score rows by a model that is in memory; returns (summed loss in nats, number of tokens in the loss)."""
    max_tokens = _LOGITS_BYTES // (4 * model.config.vocab_size)
    batches = make_batches(input_ids, labels, max_tokens=max_tokens)
    total = sum(_batch_loss(model, batch) for batch in track(batches, "Evaluating"))
    return total, sum(len(batch.targets) for batch in batches)


@torch.inference_mode()
def _batch_loss(model: "PreTrainedModel", batch: Batch) -> float:
    """Sum the negative log-likelihoods of the batch's targets, in nats, in float64."""
    output = model(input_ids=batch.ids.to(model.device), attention_mask=batch.real.to(model.device), use_cache=False)
    logits = output.logits[batch.wanted.to(model.device)].float()  # (targets, vocabulary)
    # On a CPU, torch's float32 log_softmax over a vocabulary has errors up to 1e-5, its logsumexp up to 1e-6.
    targets = logits.gather(1, batch.targets.to(model.device)[:, None])[:, 0]
    return float((logits.logsumexp(1) - targets).double().sum())


def streamed_loss(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    device: torch.device,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
) -> tuple[float, int, int]:
    """Score rows like `loaded_loss`, but with only one decoder layer in memory at a time."""
    added = 0 if adapter is None else sum(tensor.numel() for tensor in adapter.tensors.values())
    parameters = checkpoint.parameters + added
    batches = make_batches(input_ids, labels, max_tokens=BATCH_TOKENS)
    if not batches:  # one of several processes may have none
        return 0.0, 0, parameters
    stream = Stream(checkpoint, batches, device=device, dtype=compute_dtype(device), adapter=adapter)
    for _ in stream.forward():
        pass
    total = -sum(float(log_probs.double().sum()) for log_probs in stream.log_probs())
    return total, stream.predicted, parameters
