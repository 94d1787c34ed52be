"""Going on with an adapter that exists: what is refused, and how its factors and options get into a training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from loram.base.errors import UserError
from loram.compute.belonging import load_for
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.trainer.arguments import option_names
from loram.training.methods.adapters import factors_of
from loram.training.methods.table import METHODS
from loram.training.options import TrainOptions

_OWN = ("lora_dropout",)  # the options of LoraConfig that may be given beside an adapter
_NOT_MADE_OF = ("peft_type", "auto_mapping", "revision", "inference_mode", "peft_version", "base_model_name_or_path")


def load_start(checkpoint: Checkpoint, folder: Path, options: TrainOptions) -> Adapter:
    """Read the adapter that a training goes on with.

    Args:
        checkpoint: the model that it is on.
        folder: the adapter's folder.
        options: the options as the user gave them.

    Raises:
        UserError: it does not fit the model, is no plain LoRA adapter on linears, or an option contradicts it.
    """
    if not METHODS[options.method].continues:
        names = ", ".join(row.name for row in METHODS.values() if row.continues)
        raise UserError(f"adapter: methods {names} go on with an adapter, and the method is {options.method}")
    if given := sorted(options.lora.keys() - set(_OWN)):
        raise UserError(f"lora: {given[0]} is that of the adapter {folder}; leave it out")
    start = load_for(checkpoint, folder)
    if start.dora:
        raise UserError(f"{folder}: a DoRA adapter, and only plain LoRA can be trained further")
    if start.of_experts:
        raise UserError(f"{folder}: adapts experts, and only adapters on linears can be trained further")
    if start.masks:
        raise UserError(f"{folder}: its update is masked, and cannot be trained further")
    return start


def options_of(start: Adapter, lora: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of LoraConfig that make an adapter of the same shapes, with the dropout of `lora`."""
    known = set(option_names(LoraConfig)) - set(_NOT_MADE_OF)
    same = {key: value for key, value in start.config.items() if key in known and value is not None}
    return {**same, "task_type": "CAUSAL_LM", **{key: lora[key] for key in _OWN}}


def put_factors_(model: PeftModel, start: Adapter) -> None:
    """Give PEFT's adapter on a model the factors of one that exists."""
    with torch.no_grad():
        for name, factor in factors_of(model).items():
            factor.copy_(start.tensors[name])
