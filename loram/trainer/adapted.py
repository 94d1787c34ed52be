"""Frozen models with PEFT's adapters on them, as train and align make them."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from loram.compute.device import compute_dtype
from loram.compute.loading import load_model
from loram.disk.checkpoint import Checkpoint
from loram.trainer.arguments import as_user_error


def frozen_model(checkpoint: Checkpoint, device: torch.device, *, in_4bit: bool, **packing: bool) -> PreTrainedModel:
    """Return a model that gets an adapter, in 4 bits or in the device's dtype.

    Args:
        checkpoint: the pruned or full model.
        device: the device that computes.
        in_4bit: whether its weights are in NF4.
        packing: further options of `load_4bit`.
    """
    dtype = compute_dtype(device)
    if not in_4bit:
        return load_model(checkpoint, dtype=dtype)
    from loram.compute.nf4 import load_4bit

    return load_4bit(checkpoint, device=device, dtype=dtype, **packing)


def add_adapter(model: PreTrainedModel, config: LoraConfig, *, low_cpu_mem_usage: bool = False) -> PeftModel:
    """Return a model with LoRA factors at the target modules.

    Raises:
        UserError: PEFT refuses the options, or a key of `rank_pattern` or `alpha_pattern` means no target module, so
            that PEFT would ignore it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*did not match any targeted module", RuntimeWarning)
            adapted = get_peft_model(model, config, low_cpu_mem_usage=low_cpu_mem_usage)
    except (TypeError, ValueError, NotImplementedError, RuntimeWarning) as error:
        raise as_user_error(error) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def plain_model(model: nn.Module) -> PreTrainedModel:
    """Return the model of transformers that is inside PEFT's, or the model itself if it has no adapter."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(plain, PreTrainedModel)
    return plain
