"""A model in memory, with an adapter in PEFT's own layers."""

from typing import Any

import torch

from loram.compute.device import compute_dtype
from loram.compute.loading import load_model
from loram.compute.masked import mask_updates_
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint


# Any: PreTrainedModel.to is wrapped in a way that hides its arguments from type checkers
def load_resident(checkpoint: Checkpoint, device: torch.device, *, in_4bit: bool = False) -> tuple[Any, int]:
    """Load a model and count its parameters; a weight in 4 bits counts as the parameters that it stands for.

    Args:
        checkpoint: a full or pruned model.
        device: the device that computes; it decides the dtype. A model in 16 or 32 bits still has to be moved there.
        in_4bit: quantise the weights to NF4; those that are in 4 bits already stay so.
    """
    dtype = compute_dtype(device)
    if in_4bit or checkpoint.quantized:
        from loram.compute.nf4 import count_parameters, load_4bit

        packed = load_4bit(checkpoint, device=device, dtype=dtype)
        return packed, count_parameters(packed)
    model = load_model(checkpoint, dtype=dtype)
    return model, sum(parameter.numel() for parameter in model.parameters())


def load_adapted(
    checkpoint: Checkpoint, adapter: Adapter | None, device: torch.device, *, in_4bit: bool = False
) -> tuple[Any, int]:
    """Load a model with an adapter that fits it, ready to predict.

    Returns:
        (the model, PEFT's where there is an adapter; the number of parameters with the adapter's).
    """
    model, parameters = load_resident(checkpoint, device, in_4bit=in_4bit)
    if adapter is not None:
        from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict

        config = LoraConfig.from_peft_type(**{k: v for k, v in adapter.config.items() if k != "runtime_config"})
        config.init_lora_weights = False  # the factors come now
        if in_4bit and config.target_parameters:
            from loram.compute.nf4_experts import open_experts_

            open_experts_(model)
        model = PeftModelForCausalLM(model, config)
        set_peft_model_state_dict(model, adapter.in_files)  # without weights of the base that PEFT has saved
        mask_updates_(model, adapter.masks)
        parameters += sum(tensor.numel() for tensor in adapter.tensors.values())
    return model.to(device).eval(), parameters
