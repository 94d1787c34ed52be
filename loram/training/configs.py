"""PEFT's and TRL's own classes of options, made of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from trl import SFTConfig

from loram.base.errors import UserError
from loram.compute.device import compute_dtype
from loram.trainer.arguments import as_user_error, checkpointing, option_names
from loram.trainer.tryout import try_out
from loram.training.engine import STREAMED
from loram.training.options import TrainOptions


def build_configs(
    chosen: TrainOptions, device: torch.device, output_dir: Path | None = None
) -> tuple[LoraConfig, SFTConfig]:
    """PEFT's LoraConfig and TRL's SFTConfig of options that `resolve` gave; no weight is read for them.

    What is best depends on the device: on a GPU activations are checkpointed, and with 4-bit weights, which are for
    where memory is short, checkpoints wait in host memory and AdamW keeps its state in pageable 8 bits.
    A streamed model chooses its dtype itself, and keeps only the inputs of layers anyway.

    Raises:
        UserError: what PEFT or TRL say of the first bad value.
    """
    on_gpu, streamed = device.type == "cuda", chosen.engine == STREAMED
    frugal = {"activation_offloading": not streamed, "optim": "paged_adamw_8bit"}
    options = {
        **(frugal if on_gpu and chosen.load_in_4bit else {}),
        "bf16": on_gpu and not streamed and compute_dtype(device) == torch.bfloat16,
        "dataloader_pin_memory": on_gpu,
        **chosen.trainer,
        **checkpointing(
            {} if streamed else chosen.trainer, default=on_gpu and not streamed, known=option_names(SFTConfig)
        ),
        "use_cpu": not on_gpu,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,  # it would drop the lengths of the rows that packing put together
        "output_dir": str(output_dir or "unused"),
    }
    if chosen.trainer.get("use_cpu") and on_gpu:
        raise UserError(f"trainer: use_cpu is set, and the device is {device}; set device to cpu instead")
    if options.get("use_liger_kernel") and not on_gpu:
        raise UserError("trainer: use_liger_kernel needs a GPU")
    if options.get("activation_offloading") and not on_gpu:
        raise UserError("trainer: activation_offloading moves activations from a GPU to host memory; there is no GPU")
    if str(options.get("optim", "")).endswith("8bit") and not on_gpu and "paged" in options["optim"]:
        raise UserError(f"trainer: optim {options['optim']!r} pages a GPU's memory; without one take adamw_8bit")
    try:
        adapter, arguments = LoraConfig(**_from_data(chosen.lora)), SFTConfig(**options)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise as_user_error(error) from error
    try_out(arguments, "train")
    return adapter, arguments


def _from_data(lora: Mapping[str, Any]) -> dict[str, Any]:
    """Return LoraConfig's options. An EVA initialisation gets options of its own, since PEFT warns without them."""
    eva = lora.get("init_lora_weights") == "eva" and "eva_config" not in lora
    return {**lora, **({"eva_config": EvaConfig()} if eva else {})}
