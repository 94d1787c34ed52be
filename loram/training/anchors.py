"""Anchored training: it keeps a pruned model on the full model's course while an adapter is trained on it.

A pruned layer maps the full model's hidden states to something else than the full layer does. An adapter trained on the
pruned model first learns to make up for that, which is of no use to the full model, and then learns its task from
hidden states that the full model never sees.

An *anchor* is the difference between what a block (attention or MLP) of the full model gives and what the pruned block
gives for the same input. Anchors are measured on the very rows that the next steps train on, in one pass over the full
model, which is streamed from disk, and are added to the pruned blocks' outputs as constants. With the adapter as it was
at the measurement, the pruned model then predicts exactly what the full model with the recovered adapter predicts. The
backward pass is the pruned model's, unless the gradients' differences are measured too, on the way back.

Shapes: a block's inputs and outputs, anchors, and their gradients are (rows, width, hidden).
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from loram.base.constants import HIDDEN_BYTES, MEASURED_TOKENS
from loram.compute.scratch import Activations, Scratch
from loram.compute.streaming import Stream
from loram.data.batches import Batch, make_batches
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan
from loram.model.resize import widen


@dataclass(frozen=True, kw_only=True)
class Course:
    """How to stay on the full model's course.

    Args:
        base: the full model, which is read from disk.
        plan: what the pruned model keeps of it.
        steps: how many optimiser steps are trained on one measurement at most. At first these are 1, 1, 2, 4, ...
            steps: an adapter changes most in its first steps, so measurements are out of date sooner.
        gradients: measure the differences of the gradients too, which takes a backward pass over the full model.
        device, dtype: where, and in which dtype, the full model's layers compute.
        scratch: the folder for measurements beyond 256 MB (default: see `Scratch`).
    """

    base: Checkpoint
    plan: PruningPlan
    steps: int
    gradients: bool = True
    device: torch.device
    dtype: torch.dtype
    scratch: Path | None = None


class _Measured:
    """The anchors that were measured on some rows, block by block.

    `outputs` are differences of the blocks' outputs; `gradients` are differences of the gradients of the summed loss by
    the blocks' inputs. Each row has a tensor (tokens of the row, hidden).

    Args:
        lengths: how many tokens each row has.
        width: the hidden size.
        dtype: the dtype to keep them in.
        folder: the folder for what goes beyond 256 MB.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype, folder: Path | None) -> None:
        self._shapes, self._dtype = [(length, width) for length in lengths], dtype
        self._scratch = Scratch(HIDDEN_BYTES, folder)
        self._kept: dict[tuple[str, int], Activations] = {}

    def put(self, kind: str, part: int, batch: Batch, values: Tensor) -> None:
        """Keep the values of a micro-batch, (rows, width, hidden)."""
        if (kind, part) not in self._kept:
            self._kept[kind, part] = self._scratch.room(self._shapes, self._dtype)
        for place, row in enumerate(batch.rows):
            self._kept[kind, part][row] = values[place, : self._shapes[row][0]]

    def has(self, kind: str, part: int) -> bool:
        """Return whether a block was measured; blocks that have lost nothing are not."""
        return (kind, part) in self._kept

    def padded(self, kind: str, part: int, rows: Sequence[int], like: Tensor) -> Tensor:
        """Return the values of some rows, padded with zeros to the shape of `like`, in its dtype and on its device."""
        padded = torch.zeros(like.shape, dtype=self._dtype)  # (rows, width, hidden)
        for place, row in enumerate(rows):
            values = self._kept[kind, part][row]  # (tokens of the row, hidden)
            padded[place, : len(values)] = values
        return padded.to(like)

    def close(self) -> None:
        """Give the room back."""
        for room in self._kept.values():
            room.close()
        self._kept.clear()


class Anchors:
    """The anchors of a pruned model on the rows of the next steps.

    Args:
        course: the full model and how to stay on its course.
        model: PEFT's model around the pruned one. The blocks of its layers get hooks.
    """

    def __init__(self, course: Course, model: Any) -> None:
        self.course, self.model = course, model
        self._parts = _parts(model.get_base_model(), course.plan)
        self._measured: _Measured | None = None
        # the rows of the batch that is trained on, and the weight of one token's loss
        self._used: tuple[list[int], float | Tensor] | None = None
        for number, part in enumerate(self._parts):
            part.register_forward_pre_hook(partial(self._add_gradients, number), with_kwargs=True)
            part.register_forward_hook(partial(self._add_outputs, number))

    def measure_(self, batches: Sequence[Mapping[str, Tensor]]) -> list[list[int]]:
        """Measure anchors on the rows of some batches, with the adapter as it is.

        The rows go through the full model, and what each of its blocks reads goes through the pruned block too.

        Args:
            batches: `input_ids`, `attention_mask` and `labels`, (rows, width), padded on the right.

        Returns:
            The numbers of each batch's rows, for `use_`.
        """
        if self._measured is not None:
            self._measured.close()
        rows, labels = (
            [
                values[mask.bool()].tolist()
                for batch in batches
                for values, mask in zip(batch[column], batch["attention_mask"], strict=True)
            ]
            for column in ("input_ids", "labels")
        )
        course, self._used = self.course, None
        stream = Stream(
            course.base,
            make_batches(rows, labels, max_tokens=MEASURED_TOKENS),
            device=course.device,
            dtype=course.dtype,
            adapter=recovered(self.model, course.plan),
            scratch=course.scratch,
        )
        width = self.model.get_base_model().config.hidden_size
        self._measured = _Measured([len(row) for row in rows], width, course.dtype, course.scratch)
        training = self.model.training
        self.model.eval()
        if course.gradients:
            deque(stream.forward(keep_from=0), maxlen=0)
        for number, part in enumerate(_parts(stream.model, course.plan)):
            part.register_forward_pre_hook(_apart, with_kwargs=True)
            part.register_forward_hook(self._measuring(number, stream, self._measured), with_kwargs=True)
        deque(stream.backward(0, None) if course.gradients else stream.forward(), maxlen=0)
        self.model.train(training)
        ends = iter(range(len(rows)))
        return [[next(ends) for _ in batch["input_ids"]] for batch in batches]

    def _measuring(self, number: int, stream: Stream, measured: _Measured) -> Any:
        """Make the hook of one full block: it has the pruned block read the same, and keeps the differences."""
        batches, own, gradients = iter(stream.batches), self._parts[number], self.course.gradients
        alike: bool | None = None

        def measure(part: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal alike
            alike = _alike(part, own) if alike is None else alike
            if alike:
                return
            batch, x, y = next(batches), _inputs(args, kwargs), _states(output)
            inputs = x.detach().requires_grad_(gradients)  # (rows, width, hidden), as x and y
            with torch.set_grad_enabled(gradients):
                own_args, own_kwargs = _with(inputs, args, kwargs)
                own_y = _states(own(*own_args, **own_kwargs))
            measured.put("outputs", number, batch, (y - own_y).detach())
            if not gradients:
                return
            by_y: list[Tensor] = []  # the gradient by y, from when it comes by until that by x does
            _on_gradient(y, by_y.append)

            def on_the_way_back(by_x: Tensor) -> None:
                (by_own_x,) = torch.autograd.grad(own_y, inputs, by_y.pop())
                # the streamed loss is a mean over tokens, and the summed loss is wanted
                measured.put("gradients", number, batch, (by_x - by_own_x) * stream.predicted)

            _on_gradient(x, on_the_way_back)

        return measure

    def use_(self, rows: list[int], weight: float | Tensor = 1.0) -> None:
        """Add the anchors of these rows in the passes to come.

        Args:
            rows: the numbers of the batch's rows, as `measure_` gave them.
            weight: the weight of one token's loss in the loss whose gradient is taken: 1 / the number of tokens if
                that is a mean.
        """
        self._used = rows, weight

    def _add_outputs(self, number: int, _: nn.Module, args: Any, output: Any) -> Any:
        if self._used is None or self._measured is None or not self._measured.has("outputs", number):
            return output
        states = _states(output)
        states = states + self._measured.padded("outputs", number, self._used[0], states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _add_gradients(self, number: int, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._used is None or self._measured is None or not self._measured.has("gradients", number):
            return None
        (rows, weight), states = self._used, _inputs(args, kwargs)
        anchors = partial(self._measured.padded, "gradients", number, rows)
        add = cast(Callable[..., Tensor], _WithGradient.apply)
        return _with(add(states, lambda like: weight * anchors(like)), args, kwargs)


def _on_gradient(tensor: Tensor, call: Callable[[Tensor], None]) -> None:
    """Have a tensor call a function with its gradient in the backward pass."""
    tensor.register_hook(call)


def _parts(model: nn.Module, plan: PruningPlan) -> list[nn.Module]:
    """Return what is compared of the full and the pruned model: the blocks of layer after layer.

    These are attention or another mixer, and the MLP. A layer that the plan drops is one block as a whole: the pruned
    model's identity there has no parts.
    """
    parts: list[nn.Module] = []
    for index, layer in enumerate(cast(nn.ModuleList, model.get_submodule(plan.architecture.layers_path))):
        blocks = dict(layer.named_children())
        own = [blocks[path] for path in plan.architecture.blocks if path in blocks and index not in plan.dropped]
        parts += own or [layer]
    return parts


def _alike(full: nn.Module, pruned: nn.Module) -> bool:
    """Return whether a pruned block has lost nothing, so that it needs no measurement."""
    frozen = {
        name.replace(".base_layer", ""): tensor.data
        for name, tensor in pruned.named_parameters()
        if ".lora_" not in name
    }
    return all(
        name in frozen
        and frozen[name].shape == tensor.shape
        and frozen[name].dtype == tensor.dtype
        and torch.equal(frozen[name], tensor.data)
        for name, tensor in full.named_parameters()
    )


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a block reads."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _with(states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a block's arguments with other hidden states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def _apart(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let a block read a view of its hidden states, whose gradient comes from this block and from nothing else."""
    states = _inputs(args, kwargs)
    return _with(states.view_as(states), args, kwargs)


class _WithGradient(torch.autograd.Function):
    """The identity, which adds `anchors(gradient)` to the gradient when that comes by."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, anchors: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.anchors = anchors
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient + ctx.anchors(gradient), None


def _states(output: Any) -> Tensor:
    """Return the hidden states that a block gives."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def recovered(model: Any, plan: PruningPlan) -> Adapter:
    """Take the adapter of PEFT's model as it is now, and widen it for the full model."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    wide = {name: widen(name, tensor.detach().cpu(), plan) for name, tensor in tensors.items()}
    return Adapter(folder=Path("in training"), config=model.peft_config["default"].to_dict(), tensors=wide)
