"""Sharding: each of several processes holds a part of every weight, by PyTorch's FSDP2 or by DeepSpeed's ZeRO.

accelerate and transformers do the sharding. Where they cannot, they go on with the whole model in each process and say
nothing, which is refused here.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from loram.base import processes
from loram.base.errors import UserError
from loram.disk.files import read_json

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"


def sharding(trainer: Mapping[str, Any]) -> str | None:
    """Return what is to shard the model, `FSDP` or `DEEPSPEED`; None if nothing is.

    The Trainer's options say so, or the environment variables of `accelerate launch`.

    Args:
        trainer: the Trainer's options.
    """
    if trainer.get("fsdp") or _switched_on("ACCELERATE_USE_FSDP"):
        return FSDP
    return DEEPSPEED if _switched_on("ACCELERATE_USE_DEEPSPEED") else None


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


def check_sharding(trainer: Mapping[str, Any], device: torch.device) -> None:
    """Refuse sharding where the libraries would silently leave the model whole.

    Args:
        trainer: the Trainer's options.
        device: the device that computes.

    Raises:
        UserError: there is one process, the device is a CPU, it is FSDP's first version, or a config would not be read.
    """
    kind = sharding(trainer)
    if trainer.get("fsdp_config") and not trainer.get("fsdp"):
        raise UserError("trainer: fsdp_config is read only with fsdp: true; add that, or leave it out")
    if kind is None:
        return
    if processes.count() == 1:
        raise UserError(
            f"{kind}: shards the model over several processes, and this is the only one; start them with "
            "`accelerate launch --num_processes N`, or leave it out"
        )
    if device.type == "cpu":
        raise UserError(
            f"{kind}: accelerate shards nothing on a CPU, and each process would hold the whole model; take GPUs, or "
            "leave it out"
        )
    if kind == FSDP and _fsdp_version(trainer) != "2":
        raise UserError("FSDP: its first version is not supported; add --fsdp_version 2 to `accelerate launch`")


def _fsdp_version(trainer: Mapping[str, Any]) -> str:
    if trainer.get("fsdp"):
        config = trainer.get("fsdp_config") or {}
        read = read_json(Path(config)) if isinstance(config, str) else config
        return str(read.get("version", read.get("fsdp_version", 2)))
    return os.environ.get("FSDP_VERSION", "1")


def check_sharded(model: nn.Module, kind: str | None) -> None:
    """Refuse to train a model that is whole in each process although it should be sharded.

    Args:
        model: the model that trains, after accelerate has prepared it.
        kind: what should have sharded it.

    Raises:
        UserError: it did not.
    """
    if kind == FSDP and not all(isinstance(weight, DTensor) for weight in model.parameters()):
        raise UserError("FSDP: accelerate has left weights whole in each process; see that it is configured for FSDP 2")
    if kind == DEEPSPEED and not all(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise UserError("DeepSpeed: has left the weights whole in each process; only its ZeRO stage 3 shards them")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, put together from the shards of all processes if it has any; all of them have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_shard(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, without a word with the others: all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained_state(model: nn.Module) -> dict[str, Any]:
    """Return the state of a sharded model for its file, on the CPU, in the first process; nothing in the others.

    Of an adapter's model that is the adapter, else all weights. All processes have to call this.

    Args:
        model: the model that trains.
    """
    adapter = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
    return get_model_state_dict(model, options=options)
