"""PEFT's adapter on a model, as the methods need to see it."""

from collections.abc import Iterator
from typing import cast

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield (path in the base model, PEFT's layer) of every linear that has an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            yield path.removeprefix("base_model.model."), module


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors of an adapter on linears by PEFT's names in files."""
    return {
        f"base_model.model.{path}.lora_{part}.weight": cast(Tensor, factors["default"].weight)
        for path, layer in adapted_linears(model)
        for part, factors in (("A", layer.lora_A), ("B", layer.lora_B))
    }
