"""Anchored training: a pruned model held on the full model's course while an adapter is trained on it.

A pruned layer maps the full model's hidden states to something else than the full layer does. An adapter trained on the
pruned model learns to make up for that first, which is of no use to the full model, and learns its task from hidden
states that the full model never sees. Here the difference is measured on the very rows that the next steps train on, in
one pass over the full model, streamed from disk, and added to the layers' outputs as a constant: with the adapter as it
was then, the pruned model predicts exactly what the full model with the recovered adapter does. Only the backward pass
is the pruned model's.
"""

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loram.model.adapter import Adapter
from loram.model.batches import make_batches
from loram.model.checkpoint import Checkpoint
from loram.model.plan import PruningPlan
from loram.model.resize import widen
from loram.model.scratch import Activations, Scratch
from loram.model.streaming import BATCH_TOKENS, HIDDEN_BYTES, Stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Course:
    """How to stay on the full model's course.

    Args:
        base: the full model, read from disk.
        plan: what the pruned model keeps of it.
        steps: how many optimiser steps are trained on one measurement.
        device, dtype: that the full model's layers compute on and in.
        scratch: folder for what is measured, beyond 256 MB (default: the system's temporary folder).
    """

    base: Checkpoint
    plan: PruningPlan
    steps: int
    device: torch.device
    dtype: torch.dtype
    scratch: Path | None = None


class Anchors:
    """What the layers of a pruned model leave out of the full model's hidden states, on the rows of the next steps.

    Args:
        course: of which full model.
        model: PEFT's model of the pruned one. Its decoder layers get hooks.
    """

    def __init__(self, course: Course, model: Any) -> None:
        self.course, self.model = course, model
        self.layers: Any = model.get_base_model().model.layers
        self._missing: Activations | None = None  # layer by layer, row by row
        self._rows = 0
        self._used: tuple[list[int], int] | None = None  # (rows, width) of the batch that is being trained on
        for index, layer in enumerate(self.layers):
            layer.register_forward_hook(self._adding(index))

    def measure_(self, batches: Sequence[Mapping[str, Tensor]]) -> list[list[int]]:
        """Send the rows of some batches through the full model with the adapter as it is, and each layer's inputs
        through the pruned layer too.

        Args:
            batches: `input_ids` and `attention_mask`, (rows, width), padded on the right.

        Returns:
            The numbers of each batch's rows, for `use_`.
        """
        if self._missing is not None:
            self._missing.close()
        rows = [
            ids[mask.bool()].tolist()
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        course, hidden = self.course, self.model.get_base_model().config.hidden_size
        room = Scratch(HIDDEN_BYTES, course.scratch)
        missing = room.room([(len(row), hidden) for _ in self.layers for row in rows], course.dtype)
        stream = Stream(
            course.base,
            make_batches(rows, max_tokens=BATCH_TOKENS),
            device=course.device,
            dtype=course.dtype,
            adapter=recovered(self.model, course.plan),
            scratch=course.scratch,
        )

        def follow(layer: int, number: int, inputs: Tensor, outputs: Tensor, arguments: dict[str, Any]) -> None:
            with torch.no_grad():
                left_out = outputs - _states(self.layers[layer](inputs, **arguments))
            for place, row in enumerate(stream.batches[number].rows):
                missing[layer * len(rows) + row] = left_out[place, : len(rows[row])]

        training, self._used = self.model.training, None
        self.model.eval()
        for _ in stream.forward(follow=follow):
            pass
        self.model.train(training)
        self._missing, self._rows = missing, len(rows)
        ends = iter(range(len(rows)))
        return [[next(ends) for _ in batch["input_ids"]] for batch in batches]

    def use_(self, rows: list[int], width: int) -> None:
        """Add what these rows lack in the forward passes to come, to batches padded to `width`."""
        self._used = rows, width

    def _adding(self, layer: int) -> Any:
        def add(_: nn.Module, args: Any, output: Any) -> Any:
            if self._used is None:
                return output
            assert self._missing is not None
            (rows, width), states = self._used, _states(output)
            missing = torch.zeros(len(rows), width, states.shape[-1], dtype=self._missing.dtype)
            for place, row in enumerate(rows):
                found = self._missing[layer * self._rows + row]
                missing[place, : len(found)] = found
            states = states + missing.to(states)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return add


def _states(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def recovered(model: Any, plan: PruningPlan) -> Adapter:
    """The adapter of PEFT's model as it is now, widened for the full model."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    wide = {name: widen(name, tensor.detach().cpu(), plan) for name, tensor in tensors.items()}
    return Adapter(folder=Path("in training"), config=model.peft_config["default"].to_dict(), tensors=wide)


def anchored(kind: type, course: Course) -> type:
    """A Trainer class that measures every `course.steps` steps and trains on what was measured."""

    class Anchored(kind):  # type: ignore[misc]
        """`kind`, anchored."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._anchors = Anchors(course, self.model)
            self._ahead: deque[Any] = deque()

        def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any) -> Any:
            """A step's batches, out of those of the next steps, which are measured together."""
            if not self._ahead:
                done = self.state.global_step
                steps = min(course.steps - done % course.steps, self.state.max_steps - done)
                self._measure(epoch_iterator, steps * self.args.gradient_accumulation_steps)
            step = [self._ahead.popleft() for _ in range(min(num_batches, len(self._ahead)))]
            return super().get_batch_samples(iter(step), num_batches, *args)

        def _measure(self, epoch_iterator: Iterator[Any], count: int) -> None:
            batches = list(islice(epoch_iterator, count))
            logger.info("measuring the full model's course on %d batches", len(batches))
            for batch, rows in zip(batches, self._anchors.measure_(batches), strict=True):
                self._ahead.append({**batch, "anchor_rows": rows})

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            rows = inputs.pop("anchor_rows")
            self._anchors.use_(rows, inputs["input_ids"].shape[1])
            return super().training_step(model, inputs, *args, **options)

    return Anchored
