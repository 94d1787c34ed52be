"""How likely a model finds rows of tokens: in memory, or streamed from disk one decoder layer at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from loram.base.progress import track
from loram.compute.device import compute_dtype, fits
from loram.compute.loading import load_model
from loram.compute.masked import mask_updates_
from loram.compute.streaming import BATCH_TOKENS, Stream
from loram.data.batches import Batch, make_batches
from loram.data.spec import DataSpec
from loram.data.tokens import Tokens, load_tokens
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint

_LOGITS_BYTES = 1 << 28


def load_scored(
    spec: DataSpec, checkpoint: Checkpoint, tokenizer: Any, max_samples: int | None, max_length: int
) -> Tokens:
    """The tokens of a data set that are scored: no more rows (of a long text, pieces) than either limit says.

    Raises:
        UserError: as `loram.data.tokens.load_tokens`.
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
    """Load a model, with an adapter read by PEFT, and score rows.

    Returns:
        Summed loss in nats, tokens in the loss, parameters of the model.
    """
    model, parameters = _load(checkpoint, device)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter.folder))
        mask_updates_(model, adapter.masks)
        parameters += sum(tensor.numel() for tensor in adapter.tensors.values())
    total, count = model_loss(model.to(device).eval(), input_ids, labels)
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
    """Mean losses in nats of a model with one adapter after the other, none of which need be on disk.

    The model is loaded once where it fits in memory, else (or with `stream`) read from disk once an adapter.
    """
    if stream or not fits(checkpoint.parameters * compute_dtype(device).itemsize, device):
        found = [streamed_loss(checkpoint, adapter, device, input_ids, labels) for adapter in adapters]
        return [total / count for total, count, _ in found]
    model = _load(checkpoint, device)[0].to(device).eval()
    losses = []
    for adapter in adapters:
        handles = [adapter.add_to_(model.get_submodule(name), name, device)[0] for name in adapter.modules]
        total, count = model_loss(model, input_ids, labels)
        losses.append(total / count)
        for handle in handles:
            handle.remove()
    return losses


def _load(checkpoint: Checkpoint, device: torch.device) -> tuple[Any, int]:
    """(model, its parameters: those in 4 bits counted as what they stand for)."""
    dtype = compute_dtype(device)
    if checkpoint.quantized:
        from loram.compute.nf4 import count_parameters, load_4bit

        packed = load_4bit(checkpoint, device=device, dtype=dtype)
        return packed, count_parameters(packed)
    model: Any = load_model(checkpoint, dtype=dtype)
    return model, sum(parameter.numel() for parameter in model.parameters())


def model_loss(model: Any, input_ids: Sequence[list[int]], labels: Sequence[list[int]]) -> tuple[float, int]:
    """(summed loss in nats, tokens in the loss) of rows under a model that is in memory."""
    max_tokens = _LOGITS_BYTES // (4 * model.config.vocab_size)
    batches = make_batches(input_ids, labels, max_tokens=max_tokens)
    total = sum(_batch_loss(model, batch) for batch in track(batches, "Evaluating"))
    return total, sum(len(batch.targets) for batch in batches)


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _batch_loss(model: Any, batch: Batch) -> float:
    """Summed negative log-likelihood of the wanted tokens, in nats, accumulated in float64."""
    output = model(input_ids=batch.ids.to(model.device), attention_mask=batch.real.to(model.device), use_cache=False)
    logits = output.logits[batch.wanted.to(model.device)].float()
    # On a CPU torch's float32 log_softmax over a vocabulary is off by 1e-5, its logsumexp by 1e-6 at most.
    targets = logits.gather(1, batch.targets.to(model.device)[:, None])[:, 0]
    return float((logits.logsumexp(1) - targets).double().sum())


def streamed_loss(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    device: torch.device,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
) -> tuple[float, int, int]:
    """As `loaded_loss`, with one decoder layer in memory at a time."""
    batches = make_batches(input_ids, labels, max_tokens=BATCH_TOKENS)
    stream = Stream(checkpoint, batches, device=device, dtype=compute_dtype(device), adapter=adapter)
    for _ in stream.forward():
        pass
    total = -sum(float(found.double().sum()) for found in stream.log_probs())
    added = 0 if adapter is None else sum(tensor.numel() for tensor in adapter.tensors.values())
    return total, stream.predicted, stream.parameters + added
