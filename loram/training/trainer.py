"""The Trainer of `train`: transformers' own, with TRL's offloading of activations, and exact dtypes on resuming."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer


class AdapterTrainer(Trainer):
    """transformers' Trainer for models with an adapter, or for the weights themselves."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offloading: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if getattr(self.args, "activation_offloading", False):  # an option of TRL's SFTConfig
            from trl.models.activation_offloading import get_act_offloading_ctx_manager

            self._offloading = get_act_offloading_ctx_manager(self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights as transformers does, but keep dtypes, and keep frozen what is frozen.

        PEFT makes an adapter in 16 bits one in 32 bits when it loads it, and lets all of it train.
        """
        trained = model or self.model
        assert trained is not None
        before = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in trained.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in trained.named_parameters():
            dtype, requires_grad = before[name]
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> torch.Tensor:
        """Return a step with activations in host memory where the options say so."""
        with self._offloading:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss
