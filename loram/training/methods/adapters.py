"""PEFT's adapter on a model, as the methods need to see it."""

from collections.abc import Iterator

from peft.tuners.lora import LoraLayer
from torch import nn


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield (path in the base model, PEFT's layer) of every linear that has an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            yield path.removeprefix("base_model.model."), module
