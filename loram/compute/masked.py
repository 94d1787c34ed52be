"""LoRA updates that are zero wherever a sparse model has no weight: scaling * M ∘ (B A), with M the model's mask.

LoRAM trains sparse models this way (arXiv 2502.13533). A masked update is not of rank r, so no LoRA adapter of that
rank equals it: it can be merged into the full model, but it cannot be recovered as an adapter.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loram.disk.adapter import masked_delta
from loram.model.modeling_loram import SparseLinear, unpack


class _MaskedUpdate(torch.autograd.Function):
    """x (scaling * M ∘ (B A))ᵀ. Only x and the factors are kept; the backward pass builds the update again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, mask: Tensor, scaling: float) -> Tensor:
        """Return (..., in) -> (..., out), with `a` (r, in), `b` (out, r), and the packed `mask` of (out, in)."""
        ctx.save_for_backward(x, a, b)
        ctx.mask, ctx.scaling = mask, scaling
        return functional.linear(x, masked_delta(a, b, mask, scaling).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (gradient,), (x, a, b) = gradients, ctx.saved_tensors  # gradient: (..., out)
        by_x = gradient @ masked_delta(a, b, ctx.mask, ctx.scaling).to(gradient.dtype)
        by_delta = (gradient.flatten(0, -2).T @ x.flatten(0, -2).to(gradient.dtype)).to(a.dtype)  # (out, in)
        by_delta = by_delta.mul_(ctx.scaling).mul_(unpack(ctx.mask))
        return by_x, b.T @ by_delta, by_delta @ a.T, None, None


_masked_update: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = _MaskedUpdate.apply


def mask_updates_(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
    """Mask the updates of PEFT's LoRA layers, in place.

    Args:
        model: a model from `get_peft_model`, with one plain LoRA adapter and no dropout.
        masks: path of a module in the base model -> its packed mask. By default the masks are those of the base model's
            sparse linears. Layers without a mask stay as they are.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module  # Any: the class LoraLayer does not say that its instances are modules
        base, path = layer.get_base_layer(), name.removeprefix("base_model.model.")
        if masks is not None and path in masks and not isinstance(base, SparseLinear):
            base.register_buffer("mask", masks[path], persistent=False)  # a buffer moves with the model
        if isinstance(base, SparseLinear) if masks is None else path in masks:
            layer.forward = functools.partial(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    base = layer.get_base_layer()
    result: Tensor = base(x)
    for name in () if layer.disable_adapters else layer.active_adapters:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        result = result + _masked_update(x, a, b, base.mask, layer.scaling[name])
    return result
