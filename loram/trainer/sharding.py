"""Sharding: each of several processes holds a part of every weight, by PyTorch's FSDP2 or by DeepSpeed's ZeRO.

accelerate and transformers do the sharding. Where they cannot, they go on with the whole model in each process and say
nothing, which is refused here. It imports nothing heavy at the top.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loram.base import processes
from loram.base.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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


def check_sharding(trainer: Mapping[str, Any], device: "torch.device") -> None:
    """Refuse sharding where the libraries would silently leave the model whole.

    Args:
        trainer: the Trainer's options.
        device: the device that computes.

    Raises:
        UserError: there is one process, or the device is a CPU, or it is FSDP's first version.
    """
    kind = sharding(trainer)
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
        return str((trainer.get("fsdp_config") or {}).get("version", 2))
    return os.environ.get("FSDP_VERSION", "1")


def check_sharded(model: "nn.Module", kind: str | None) -> None:
    """Refuse to train a model that is whole in each process although it should be sharded.

    Args:
        model: the model that trains, after accelerate has prepared it.
        kind: what should have sharded it.

    Raises:
        UserError: it did not.
    """
    if kind == FSDP and not all(_is_sharded(weight) for weight in model.parameters()):
        raise UserError("FSDP: accelerate has left weights whole in each process; see that it is configured for FSDP 2")
    if kind == DEEPSPEED and not all(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise UserError("DeepSpeed: has left the weights whole in each process; only its ZeRO stage 3 shards them")


def _is_sharded(tensor: "Tensor") -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: "Tensor") -> "Tensor":
    """Return a tensor, put together from the shards of all processes if it has any; all of them have to call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_state(model: "nn.Module") -> dict[str, Any]:
    """Return the state of a sharded model for its file, on the CPU, in the first process; nothing in the others.

    Of an adapter's model that is the adapter, else all weights. All processes have to call this.

    Args:
        model: the model that trains.
    """
    from peft import PeftModel
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    adapter = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
    return get_model_state_dict(model, options=options)
