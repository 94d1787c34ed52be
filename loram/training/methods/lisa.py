"""LISA (arXiv 2403.17919): only a few decoder layers train at a time, and they are drawn again after some steps."""

import random
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Lisa(TrainerCallback):
    """Freezes all decoder layers but a few, which are drawn every `interval_steps` steps.

    The optimiser has the parameters of all layers from the beginning. It skips a frozen layer, because that layer has
    no gradients, and the optimiser's state for it is deleted. The draw depends on the seed and the step alone, so a
    training that was interrupted continues with the same layers.

    Args:
        layers: the trainable parameters of each decoder layer.
        active_layers: how many layers train at a time.
        interval_steps: after how many steps the layers are drawn again.
        seed: the seed of the draws.
    """

    def __init__(
        self, layers: Sequence[Sequence[nn.Parameter]], *, active_layers: int, interval_steps: int, seed: int
    ) -> None:
        self.layers, self.active_layers, self.interval_steps, self.seed = layers, active_layers, interval_steps, seed
        self.active: frozenset[int] | None = None

    def draw(self, step: int) -> frozenset[int]:
        """Draw the layers that train in a step; returns their indices, counted from 0."""
        generator = random.Random(f"{self.seed} {step // self.interval_steps}")
        return frozenset(generator.sample(range(len(self.layers)), self.active_layers))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **rest: Any,
    ) -> None:
        """Freeze and unfreeze layers if it is time to change them."""
        active = self.draw(state.global_step)
        if active == self.active:
            return
        assert optimizer is not None
        self.active = active
        for index, parameters in enumerate(self.layers):
            for parameter in parameters:
                parameter.requires_grad_(index in active)
                if index not in active:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)
