"""The probe: a short LoRA run on the student, whose adapter is recovered and evaluated on the full model.

The student is the pruned model that is being aligned. Alignment can lower its loss and at the same time make adapters
that are trained on it worth less on the full model. The full model is what counts, so alignment is judged by the probe
and not by its own loss.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from loram.alignment.mixture import Rows, collate
from loram.base.errors import UserError
from loram.base.progress import track
from loram.compute.device import compute_dtype, fits
from loram.compute.likelihood import adapted_losses, loaded_losses, mean_loss, model_losses, streamed_losses
from loram.compute.loss import causal_loss
from loram.disk.adapter import Adapter, add_update_
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan
from loram.model.resize import widen
from loram.trainer.guard import check_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_ROWS, DEV_ROWS = 4, 32
_RANK, _ALPHA, _LEARNING_RATE = 8, 16, 1e-3


@dataclass(frozen=True, kw_only=True)
class ProbeLosses:
    """The mean losses of a probe on its development rows, in nats per token.

    Args:
        recovered_loss: the loss of the full model with the recovered adapter; this one decides.
        adapted_loss: the loss of the student with the adapter.
        student_loss: the loss of the student alone.
    """

    recovered_loss: float
    adapted_loss: float
    student_loss: float


def split(rows: Rows, steps: int, seed: int, name: str) -> tuple[Rows, Rows]:
    """Split rows at random into those that a probe trains on and development rows that it is judged by.

    A third of the rows is for development, but at most `DEV_ROWS`.

    Args:
        rows: the rows to split.
        steps: the steps of the probe's training, each on `BATCH_ROWS` rows.
        seed: the seed of the draw.
        name: the name of the rows in error messages.

    Returns:
        (rows to train on, development rows).

    Raises:
        UserError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(
            f"{name}: {len(rows)} rows for the probe, which needs some to train on and some to be judged by; "
            "give more with --probe-dataset, or --no-probe"
        )
    order = _shuffle(rows.places, seed)
    dev = min(DEV_ROWS, max(1, len(order) // 3))
    return Rows(rows.sources, order[dev : dev + steps * BATCH_ROWS]), Rows(rows.sources, order[:dev])


def hold_out(rows: Rows, steps: int, seed: int) -> tuple[Rows, tuple[Rows, Rows]]:
    """Hold out the rows of a probe, a fifth at most, from the rows to align on.

    Args:
        rows: the rows to align on.
        steps: the steps of the probe's training, each on `BATCH_ROWS` rows.
        seed: the seed of the draw.

    Returns:
        (the other rows in their order, the held-out rows as `split` returns them).

    Raises:
        UserError: there are too few rows.
    """
    count = min(len(rows) // 5, steps * BATCH_ROWS + DEV_ROWS)
    held_out = _shuffle(rows.places, seed)[:count]
    parts = split(Rows(rows.sources, held_out), steps, seed, f"a fifth of {len(rows)} rows")
    remaining = set(rows.places) - set(held_out)
    return Rows(rows.sources, [place for place in rows.places if place in remaining]), parts


def _shuffle(places: Sequence[tuple[int, int]], seed: int) -> list[tuple[int, int]]:
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    return [places[index] for index in order]


class Probe:
    """A short LoRA run on a student, whose adapter is recovered and evaluated on the full model.

    Every measurement trains an adapter with the same first values on the same rows.

    Args:
        full: the full model.
        plan: the pruning plan of the student.
        train: the rows that the adapter is trained on; when they are used up, training starts again at the first.
        dev: the development rows that the adapter is judged by.
        steps: the steps of the training, each on `BATCH_ROWS` rows.
        seed: the seed of the adapter's first values.
        device: the device that the full model computes on.
        stream: stream the full model from disk even if it fits in memory.
    """

    def __init__(
        self,
        full: Checkpoint,
        plan: PruningPlan,
        *,
        train: Rows,
        dev: Rows,
        steps: int,
        seed: int,
        device: torch.device,
        stream: bool,
    ) -> None:
        self.full, self.plan, self.steps, self.seed, self.device = full, plan, steps, seed, device
        self.stream = stream
        self.dev = dev.lists()
        self.batches = [
            collate([train[row] for row in range(start, min(start + BATCH_ROWS, len(train)))])
            for start in range(0, len(train), BATCH_ROWS)
        ]

    @cached_property
    def untuned_loss(self) -> float:
        """The mean loss of the full model without an adapter on the development rows, in nats per token."""
        score = streamed_losses if self._streams() else loaded_losses
        losses, _ = score(self.full, None, self.device, *self.dev)
        return mean_loss(losses, self.dev[1])

    def _streams(self) -> bool:
        return self.stream or not fits(self.full.parameters * compute_dtype(self.device).itemsize, self.device)

    def measure(
        self,
        student: "PreTrainedModel",
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> ProbeLosses:
        """Train the adapter and evaluate it. Afterwards the student and the random state are as before, bit for bit.

        Args:
            student: the pruned model, in memory.
            autocast: the context that the student computes in.

        Raises:
            FloatingPointError: a loss is not finite.
            MissingGradientError: a factor of the adapter gets no gradient.
        """
        with _restore(student):
            with autocast():
                alone = self._dev_loss(student)
            with autocast(), _attach_adapter(student, self.plan, self.seed) as factors:
                self._train(student.train(), factors)
                adapted = self._dev_loss(student)
            tensors = {name: tensor.detach().cpu() for name, tensor in factors.items()}
        losses = ProbeLosses(recovered_loss=self._recovered_loss(tensors), adapted_loss=adapted, student_loss=alone)
        if not math.isfinite(losses.recovered_loss + losses.adapted_loss + losses.student_loss):
            raise FloatingPointError(f"the probe's losses are not all finite: {losses}; try a lower learning_rate")
        return losses

    def _dev_loss(self, student: "PreTrainedModel") -> float:
        """Return the mean loss of the student on the development rows, in nats per token."""
        return mean_loss(model_losses(student.eval(), *self.dev), self.dev[1])

    def _train(self, student: "PreTrainedModel", factors: dict[str, Tensor]) -> None:
        optimizer = torch.optim.AdamW(factors.values(), lr=_LEARNING_RATE, weight_decay=0.0)
        for step in track(range(self.steps), "Probe"):
            batch = self.batches[step % len(self.batches)]
            # only these three: the rows of a teacher cache have more tensors
            loss = causal_loss(
                student,
                input_ids=batch["input_ids"].to(student.device),
                attention_mask=batch["attention_mask"].to(student.device),
                labels=batch["labels"].to(student.device),
            )
            optimizer.zero_grad()
            loss.backward()
            check_gradients(factors, step + 1)
            optimizer.step()

    def _recovered_loss(self, tensors: dict[str, Tensor]) -> float:
        wide = {name: widen(name, tensor, self.plan) for name, tensor in tensors.items()}
        config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _ALPHA, "target_modules": []}
        adapter = Adapter(folder=Path("probe"), config=config, tensors=wide)
        return adapted_losses(self.full, [adapter], self.device, *self.dev, stream=self.stream)[0]


@contextlib.contextmanager
def _attach_adapter(student: "PreTrainedModel", plan: PruningPlan, seed: int) -> Iterator[dict[str, Tensor]]:
    """Attach a LoRA adapter to all linears of the decoder layers; yields its factors under PEFT's names.

    The factors begin with the values that PEFT gives them, but they are attached by hooks: PEFT's layers would replace
    modules of a model that is being trained.
    """
    torch.manual_seed(seed)
    factors: dict[str, Tensor] = {}
    handles = []
    for module, (rows, columns) in plan.linear_shapes().items():
        if module == plan.architecture.head:
            continue
        a = nn.init.kaiming_uniform_(torch.empty(_RANK, columns), a=math.sqrt(5))
        a, b = (tensor.to(student.device).requires_grad_() for tensor in (a, torch.zeros(rows, _RANK)))
        handles.append(add_update_(student.get_submodule(module), a, b, _ALPHA / _RANK))
        factors |= {f"base_model.model.{module}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
    try:
        yield factors
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _restore(student: "PreTrainedModel") -> Iterator[None]:
    """Freeze a student during the block; then restore its trainable parameters, its mode and all random states."""
    trainable, mode = [p for p in student.parameters() if p.requires_grad], student.training
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
        try:
            student.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_()
            student.train(mode)
            random.setstate(states[0])
            np.random.set_state(states[1])
