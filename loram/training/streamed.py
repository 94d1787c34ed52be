"""The streamed engine: a training whose model is never in memory, since forward and backward go layer by layer.

The Trainer gets PEFT's model around a shell of the model: its modules without their weights, and the adapter's factors
in full. The forward pass of that model sends the rows through `loram.compute.streaming`, forward and backward at once,
and keeps the gradients of the factors until autograd asks for them. So optimisers, schedules, checkpoints, logs and
data parallelism are the Trainer's, and know nothing of layers.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from loram.base.constants import BATCH_TOKENS
from loram.compute.device import compute_dtype
from loram.compute.loading import empty_model
from loram.compute.streaming import Stream
from loram.data.batches import IGNORED, make_batches
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.training.methods.adapters import factors_of
from loram.training.trainer import AdapterTrainer

Rows = tuple[list[list[int]], list[list[int]]]  # the token ids and the labels of each row


def shell_of(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Return a frozen model on the CPU whose weights have their shapes and take no memory; all are zero.

    PEFT draws an adapter for it from the same random numbers as for the model in memory.
    """
    shell = empty_model(checkpoint, dtype, dense=True)
    for module in shell.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            nothing = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            module.register_parameter(name, nn.Parameter(nothing, requires_grad=False))
    return shell


class StreamedPass:
    """Where a streamed forward and backward pass takes place.

    Args:
        checkpoint: the model.
        device: the device that computes.
        scratch: the folder for hidden states beyond 256 MB.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, scratch: Path) -> None:
        self.checkpoint, self.device, self.scratch = checkpoint, device, scratch
        self._model: PreTrainedModel | None = None  # the empty model of the passes so far

    def loss(self, rows: Rows, adapter: Adapter) -> Tensor:
        """Return the sum of the losses of all tokens in the loss, in nats: a float32 scalar."""
        stream = self._stream(rows, adapter)
        deque(stream.forward(), maxlen=0)
        return -torch.cat(stream.log_probs()).sum().to(self.device)

    def gradients(self, rows: Rows, adapter: Adapter) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the same sum, and its gradients by the adapter's factors, which go by their names in files."""
        stream, gradients = self._stream(rows, adapter), dict[str, Tensor]()
        deque(stream.forward(keep_from=0), maxlen=0)

        def keep(name: str, factor: Tensor, gradient: Tensor) -> None:
            gradients[name] = gradient * stream.predicted  # of the sum and not of the mean

        deque(stream.backward(0, keep, of="factors"), maxlen=0)
        assert stream.loss is not None
        return torch.tensor(stream.loss * stream.predicted, device=self.device), gradients

    def _stream(self, rows: Rows, adapter: Adapter) -> Stream:
        stream = Stream(
            self.checkpoint,
            make_batches(*rows, max_tokens=BATCH_TOKENS),
            device=self.device,
            dtype=compute_dtype(self.device),
            adapter=adapter,
            scratch=self.scratch,
            model=self._model,
        )
        self._model = stream.model
        return stream


def stream_loss_(model: PeftModel, where: StreamedPass) -> None:
    """Let a shell with an adapter compute its loss by streaming, and drop the weights that it only pretends to have.

    The loss of no rows is 0, and has no gradient.

    A call with labels returns the mean cross entropy in nats per token, as with `use_chunked_loss_`: the sum over the
    tokens in the loss, divided by `num_items_in_batch` or else by their number. Rows that were packed, or put end to
    end, are taken apart again.

    Args:
        model: PEFT's model around what `shell_of` returned.
        where: the model that is streamed.
    """
    summed_loss = cast(Callable[..., Tensor], _SummedLoss.apply)
    base, config = model.get_base_model(), model.peft_config["default"].to_dict()
    for module in base.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if not any(weight.stride()):
                delattr(module, name)
                setattr(module, name, weight.new_empty(0))  # a tensor, since bitsandbytes looks at embeddings' weights
    model.to(where.device)

    def forward(
        input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> CausalLMOutput:
        if not len(input_ids):
            return CausalLMOutput(loss=torch.zeros((), device=input_ids.device, requires_grad=True).clone())
        rows = _rows(input_ids, labels, inputs.get("attention_mask"), inputs.get("position_ids"))
        names, factors = zip(*factors_of(model).items(), strict=True)
        if torch.is_grad_enabled():
            total = summed_loss(where, rows, config, names, *factors)
        else:
            total = where.loss(rows, _adapter(config, names, factors))
        count = sum(label != IGNORED for row in rows[1] for label in row[1:])
        return CausalLMOutput(loss=total / (count if num_items_in_batch is None else num_items_in_batch))

    base.forward = forward


class StreamedTrainer(AdapterTrainer):
    """The Trainer of a shell: the last micro-batch of a step has the rows of all, so that a step is one pass."""

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """Take the micro-batches of a step, and move all rows into the last one."""
        batches, count = super().get_batch_samples(*args)
        if len(batches) > 1:
            batches = [
                *({name: batch[name][:0] for name in ("input_ids", "labels")} for batch in batches[1:]),
                _joined(batches),
            ]
        return batches, count


def _joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return several batches as one, padded to the longest row; rows that stand end to end go on doing so."""
    if "attention_mask" not in batches[0]:
        return {
            name: torch.cat([batch[name] for batch in batches], 1) for name in ("input_ids", "labels", "position_ids")
        }
    width = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}

    def padded(values: Tensor, value: int) -> Tensor:
        return nn.functional.pad(values, (0, width - values.shape[1]), value=value)

    return {name: torch.cat([padded(batch[name], fill[name]) for batch in batches]) for name in fill}


def _adapter(config: dict[str, Any], names: Sequence[str], factors: Sequence[Tensor]) -> Adapter:
    return Adapter(folder=Path("in training"), config=config, tensors=dict(zip(names, factors, strict=True)))


def _rows(ids: Tensor, labels: Tensor, mask: Tensor | None, positions: Tensor | None) -> Rows:
    """Return the rows of a batch without padding.

    Args:
        ids, labels: the tokens, and the tokens or -100 where they are not in the loss, (rows, width).
        mask: 0 where a row is padded on the right, (rows, width); None where rows stand end to end in one.
        positions: there, each token's position in its own row, (1, width).
    """
    if mask is not None:
        real = mask.bool()
        ids_of, labels_of = (
            [row[kept].tolist() for row, kept in zip(part, real, strict=True)] for part in (ids, labels)
        )
        return ids_of, labels_of
    assert positions is not None
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]
    ids_of, labels_of = ([part[0, a:b].tolist() for a, b in pairwise(starts)] for part in (ids, labels))
    return ids_of, labels_of


class _SummedLoss(torch.autograd.Function):
    """The loss of some rows, summed over their tokens; its gradients by the factors come with it."""

    @staticmethod
    def forward(
        ctx: Any, where: StreamedPass, rows: Rows, config: dict[str, Any], names: Sequence[str], *factors: Tensor
    ) -> Tensor:
        loss, gradients = where.gradients(rows, _adapter(config, names, factors))
        ctx.gradients = [
            gradients[name].to(factor.dtype) if factor.requires_grad else None
            for name, factor in zip(names, factors, strict=True)
        ]
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        return (*[None] * 4, *(None if by is None else by.mul_(scale) for by in ctx.gradients))
