"""The recovered probe: what a short LoRA run on the student is worth on the full model, the one figure that counts.

Alignment can make the pruned model better and what is learnt on it worse, so it is not judged by its own loss.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loram.alignment.mixture import Rows, collate
from loram.base.errors import UserError
from loram.base.progress import track
from loram.compute.device import compute_dtype, fits
from loram.compute.likelihood import adapted_losses, loaded_loss, model_loss, streamed_loss
from loram.compute.loss import causal_loss
from loram.disk.adapter import Adapter, add_update_
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan
from loram.model.resize import widen

BATCH_ROWS, DEV_ROWS = 4, 32
_RANK, _ALPHA, _LEARNING_RATE = 8, 16, 1e-3


@dataclass(frozen=True, kw_only=True)
class Found:
    """Mean losses on the development rows, in nats a token.

    Args:
        recovered_loss: of the full model with the recovered adapter; the one that decides.
        adapted_loss: of the student with the adapter.
        student_loss: of the student alone.
    """

    recovered_loss: float
    adapted_loss: float
    student_loss: float


def split(rows: Rows, steps: int, seed: int, name: str) -> tuple[Rows, Rows]:
    """Rows to train a probe on and development rows to judge it on, drawn by seed; a third is for development.

    Raises:
        UserError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(
            f"{name}: {len(rows)} rows for the probe, which needs some to train on and some to judge by; "
            "give more with --probe-dataset, or --no-probe"
        )
    order = _shuffled(rows.places, seed)
    dev = min(DEV_ROWS, max(1, len(order) // 3))
    return Rows(rows.sources, order[dev : dev + steps * BATCH_ROWS]), Rows(rows.sources, order[:dev])


def hold_out(rows: Rows, steps: int, seed: int) -> tuple[Rows, tuple[Rows, Rows]]:
    """Take the rows of a probe, a fifth at most, out of those to align on.

    Returns:
        The other rows in their order, and the probe's as `split` has them.

    Raises:
        UserError: there are too few.
    """
    count = min(len(rows) // 5, steps * BATCH_ROWS + DEV_ROWS)
    held = _shuffled(rows.places, seed)[:count]
    parts = split(Rows(rows.sources, held), steps, seed, f"of {len(rows)} rows a fifth")
    left = set(rows.places) - set(held)
    return Rows(rows.sources, [place for place in rows.places if place in left]), parts


def _shuffled(places: Sequence[tuple[int, int]], seed: int) -> list[tuple[int, int]]:
    """The places in a random order."""
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    return [places[index] for index in order]


class Probe:
    """A short LoRA run on a student, recovered, and judged on the full model; the same run each time.

    Args:
        full: the full model.
        plan: what the student keeps of it.
        train: rows that the adapter is trained on, again from the first when they are used up.
        dev: rows that it is judged on.
        steps: of `BATCH_ROWS` rows.
        seed: of the adapter's first values.
        device: where the full model computes.
        stream: read the full model from disk layer by layer even where it fits in memory.
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
        """Of the full model as it is, to compare with."""
        score = streamed_loss if self._streams() else loaded_loss
        total, count, _ = score(self.full, None, self.device, *self.dev)
        return total / count

    def _streams(self) -> bool:
        return self.stream or not fits(self.full.parameters * compute_dtype(self.device).itemsize, self.device)

    def measure(
        self, student: Any, autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    ) -> Found:
        """Train the adapter and judge it; student and random state are afterwards as before, bit for bit.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        with _undisturbed(student):
            with autocast():
                alone = _mean(model_loss(student.eval(), *self.dev))
            with autocast(), _adapter(student, self.plan, self.seed) as factors:
                self._train(student.train(), list(factors.values()))
                adapted = _mean(model_loss(student.eval(), *self.dev))
            tensors = {name: tensor.detach().cpu() for name, tensor in factors.items()}
        found = Found(recovered_loss=self._recovered(tensors), adapted_loss=adapted, student_loss=alone)
        if not math.isfinite(found.recovered_loss + found.adapted_loss + found.student_loss):
            raise FloatingPointError(f"the probe's losses are not all finite: {found}; try a lower learning_rate")
        return found

    def _train(self, student: Any, factors: list[Tensor]) -> None:
        optimizer = torch.optim.AdamW(factors, lr=_LEARNING_RATE, weight_decay=0.0)
        for step in track(range(self.steps), "Probe"):
            batch = self.batches[step % len(self.batches)]
            names = ("input_ids", "attention_mask", "labels")  # a cache's rows have more
            loss = causal_loss(student, **{name: batch[name].to(student.device) for name in names})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _recovered(self, tensors: dict[str, Tensor]) -> float:
        wide = {name: widen(name, tensor, self.plan) for name, tensor in tensors.items()}
        config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _ALPHA, "target_modules": []}
        adapter = Adapter(folder=Path("probe"), config=config, tensors=wide)
        return adapted_losses(self.full, [adapter], self.device, *self.dev, stream=self.stream)[0]


@contextlib.contextmanager
def _adapter(student: Any, plan: PruningPlan, seed: int) -> Iterator[dict[str, Tensor]]:
    """LoRA factors by PEFT's names on all linears of the decoder layers, begun as PEFT begins them.

    Hooks, and not PEFT's layers, which would take the place of the modules that are being trained.
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
def _undisturbed(student: Any) -> Iterator[None]:
    """Freeze a student for a while; what is trained, its mode and all random states are restored."""
    trained, mode = [p for p in student.parameters() if p.requires_grad], student.training
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
        try:
            student.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_()
            student.train(mode)
            random.setstate(states[0])
            np.random.set_state(states[1])


def _mean(found: tuple[float, int]) -> float:
    return found[0] / found[1]
