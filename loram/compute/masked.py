"""LoRA updates that are zero where a sparse model has no weight: scaling * M ∘ (B A), as LoRAM trains sparse models.

Such an update is not of rank r, so no LoRA adapter of that rank equals it: it can be merged, but not recovered.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loram.disk.adapter import masked_delta
from loram.model.modeling_loram import SparseLinear, unpack


class _MaskedUpdate(torch.autograd.Function):  # type: ignore[misc]
    """x (scaling * M ∘ (B A))^T; keeps x and the factors for backward, and makes the update again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, mask: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.mask, ctx.scaling = mask, scaling
        return functional.linear(x, masked_delta(a, b, mask, scaling).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (gradient,), (x, a, b) = gradients, ctx.saved_tensors
        by_x = gradient @ masked_delta(a, b, ctx.mask, ctx.scaling).to(gradient.dtype)
        by_delta = (gradient.flatten(0, -2).T @ x.flatten(0, -2).to(gradient.dtype)).to(a.dtype)
        by_delta = by_delta.mul_(ctx.scaling).mul_(unpack(ctx.mask))
        return by_x, b.T @ by_delta, by_delta @ a.T, None, None


def mask_updates_(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
    """Mask the updates of PEFT's LoRA layers, in place.

    Args:
        model: what `get_peft_model` gave, without dropout, with plain LoRA and one adapter.
        masks: module path in the base model -> mask; by default those of its sparse linears. Other layers stay as they
            are.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base, path = module.get_base_layer(), name.removeprefix("base_model.model.")
        if masks is not None and path in masks and not isinstance(base, SparseLinear):
            base.register_buffer("mask", masks[path], persistent=False)  # so that it moves with the model
        if isinstance(base, SparseLinear) if masks is None else path in masks:
            module.forward = functools.partial(_forward, module)


def _forward(module: Any, x: Tensor) -> Tensor:
    base = module.get_base_layer()
    result: Tensor = base(x)
    for name in () if module.disable_adapters else module.active_adapters:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        result = result + _MaskedUpdate.apply(x, a, b, base.mask, module.scaling[name])
    return result
