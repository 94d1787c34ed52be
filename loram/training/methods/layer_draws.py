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

    def draw(self, step: int) -> frozenset[int]:
        """Draw the layers that train in a step, which is counted from 0; returns their indices."""
        generator = random.Random(f"{self.seed} {step // self.interval_steps}")
        return frozenset(generator.sample(range(len(self.layers)), self.active_layers))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer | None = None,
        **rest: Any,
    ) -> None:
        """Freeze and unfreeze layers if it is time to change them."""
        assert optimizer is not None
        active = self.draw(state.global_step)
        if active == self.active:
            return
        self.active = active
        for index, parameters in enumerate(self.layers):
            for parameter in parameters:
                parameter.requires_grad_(index in active)
                if index not in active:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)
