"""transformers' TrainingArguments of an alignment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from loram.base.errors import UserError
from loram.compute.device import compute_dtype
from loram.trainer.arguments import as_user_error, checkpointing, option_names
from loram.trainer.tryout import try_out


def build_arguments(options: Mapping[str, Any], device: torch.device, output_dir: Path) -> TrainingArguments:
    """transformers' TrainingArguments: float32 weights, on a GPU that has it with autocast to bfloat16.

    Args:
        options: as `resolve_trainer` gives them.
        device: what is trained on.
        output_dir: where the Trainer writes.

    Raises:
        UserError: what transformers says of the first bad value.
    """
    on_gpu = device.type == "cuda"
    values = {
        "bf16": on_gpu and compute_dtype(device) == torch.bfloat16,
        "dataloader_pin_memory": on_gpu,
        **{key: value for key, value in options.items() if key != "max_length"},
        **checkpointing(options, default=on_gpu, known=option_names(TrainingArguments)),
        "use_cpu": not on_gpu,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "output_dir": str(output_dir),
    }
    if options.get("use_cpu") and on_gpu:
        raise UserError(f"trainer: use_cpu is set, and the device is {device}; set device to cpu instead")
    try:
        arguments = TrainingArguments(**values)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise as_user_error(error, "align") from error
    try_out(arguments, "align")
    return arguments
