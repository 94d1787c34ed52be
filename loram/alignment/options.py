"""Options of the alignment's Trainer: transformers' own, under their own names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from loram.base.errors import UserError
from loram.compute.device import compute_dtype
from loram.trainer.arguments import as_user_error, check_names, checkpointing, option_names

TRAINER_DEFAULTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "num_train_epochs": 1,
    "max_length": 512,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 1,
    "report_to": "none",
}
# What loram decides itself, and what would be ignored in silence.
_OURS = {
    "output_dir",
    "do_eval",
    "do_predict",
    "do_train",
    "eval_delay",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "greater_is_better",
    "label_smoothing_factor",
    "load_best_model_at_end",
    "logging_nan_inf_filter",
    "metric_for_best_model",
    "per_device_eval_batch_size",
    "remove_unused_columns",
    "resume_from_checkpoint",
    "save_only_model",
}


def check_options(trainer: Mapping[str, Any], seed: int = 42) -> dict[str, Any]:
    """Our defaults with the given options over them; options that would not mean what they say are refused.

    Raises:
        UserError: transformers has no such option (names the nearest), or it is not for the user to set.
    """
    if ours := [key for key in trainer if key in _OURS]:
        raise UserError(f"trainer: {ours[0]} cannot be set: loram writes the output and judges the weights itself")
    known = ["max_length", *option_names(TrainingArguments)]
    check_names(trainer, known, "trainer", "TrainingArguments", "align.trainer")
    options = {**TRAINER_DEFAULTS, "seed": seed, **trainer}
    if not isinstance(options["max_length"], int) or options["max_length"] < 2:
        raise UserError(f"trainer: max_length should be a number of tokens, but is {options['max_length']!r}")
    return options


def build_arguments(options: Mapping[str, Any], device: torch.device, output_dir: Path) -> TrainingArguments:
    """transformers' TrainingArguments: float32 weights, on a GPU that has it with autocast to bfloat16.

    Args:
        options: as `check_options` gives them.
        device: what is trained on.
        output_dir: where the Trainer writes.

    Raises:
        UserError: what transformers says of the first bad value.
    """
    on_gpu = device.type == "cuda"
    values = {
        "bf16": on_gpu and compute_dtype(device) == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": on_gpu,
        **{key: value for key, value in options.items() if key != "max_length"},
        **checkpointing(options, default=on_gpu, known=option_names(TrainingArguments)),
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "output_dir": str(output_dir),
    }
    try:
        return TrainingArguments(**values)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise as_user_error(error, "align") from error
