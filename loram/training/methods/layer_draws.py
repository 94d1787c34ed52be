"""The callback of LISA (arXiv 2403.17919), which freezes all decoder layers but a few."""

import random
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loram.base.errors import UserError


class LayerDraws(TrainerCallback):
    """Draws the decoder layers that train, every `interval_steps`; the others lose gradients and optimiser state.

    The optimiser is made with every layer in it. A frozen layer has no gradients, so it takes no part in a step. Which
    layers train follows from the seed and the step alone, so an interrupted training goes on with the same layers.

    Args:
        layers: the parameters of each decoder layer that may train.
        active_layers: how many layers train at a time.
        interval_steps: the steps after which other layers are drawn.
        seed: the seed of the draws.

    Raises:
        UserError: the model has fewer layers than should train at a time.
    """

    def __init__(
        self, layers: Sequence[Sequence[nn.Parameter]], *, active_layers: int, interval_steps: int, seed: int
    ) -> None:
        if active_layers > len(layers):
            raise UserError(f"lisa.active_layers: {active_layers}, but the model has {len(layers)} layers")
        self.layers, self.active_layers, self.interval_steps, self.seed = layers, active_layers, interval_steps, seed
        self.active: frozenset[int] | None = None

    def drawn(self, step: int) -> frozenset[int]:
        """The indices of the layers that train in a step; steps count from 0."""
        draw = random.Random(f"{self.seed} {step // self.interval_steps}")
        return frozenset(draw.sample(range(len(self.layers)), self.active_layers))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer | None = None,
        **rest: Any,
    ) -> None:
        """Switch layers where it is time."""
        assert optimizer is not None
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
