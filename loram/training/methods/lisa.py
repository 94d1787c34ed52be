"""LISA (arXiv 2403.17919): of all decoder layers a few train at a time, others every so many steps."""

import random
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback


class Lisa(TrainerCallback):  # type: ignore[misc]
    """Freezes all decoder layers but a few, drawn anew every `interval_steps`, and drops the state of the frozen ones.

    The optimiser is made with every layer in it; a frozen layer has no gradients, so it takes no part in a step. Which
    layers train follows from seed and step alone, so a training that was interrupted goes on with the same ones.

    Args:
        layers: parameters of each decoder layer that may train.
        active_layers: how many layers train at a time.
        interval_steps: after how many steps others are drawn.
        seed: of the draws.
    """

    def __init__(
        self, layers: Sequence[Sequence[nn.Parameter]], *, active_layers: int, interval_steps: int, seed: int
    ) -> None:
        self.layers, self.active_layers, self.interval_steps, self.seed = layers, active_layers, interval_steps, seed
        self.active: frozenset[int] | None = None

    def drawn(self, step: int) -> frozenset[int]:
        """Indices of the layers that train in a step, counted from 0."""
        draw = random.Random(f"{self.seed} {step // self.interval_steps}")
        return frozenset(draw.sample(range(len(self.layers)), self.active_layers))

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any) -> None:
        """Switch layers where it is time."""
        drawn = self.drawn(state.global_step)
        if drawn == self.active:
            return
        self.active = drawn
        for index, parameters in enumerate(self.layers):
            for parameter in parameters:
                parameter.requires_grad_(index in drawn)
                if index not in drawn:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)
