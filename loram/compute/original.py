"""A model in 16 or 32 bits as the original of one in NF4 that another tool made of it."""

from pathlib import Path

import torch
from torch import Tensor

from loram.base.constants import NF4_NESTED_BLOCK
from loram.base.errors import UserError
from loram.base.paths import local
from loram.base.progress import track
from loram.compute.nf4 import dequantized
from loram.disk.checkpoint import Checkpoint
from loram.disk.files import read_json
from loram.disk.opening import download_config, open_model

# The two values of NF4 that are furthest apart, -1 and -0.696, leave an error of 0.152 of a block's largest value; the
# rest is for weights that were rounded to 16 bits before.
_BLOCK_ERROR = 0.16
# A block's largest value is itself in 8 bits, of which neighbours are 0.014 of the largest in a group of blocks apart.
_NESTED_ERROR = 0.01
_ABSOLUTE_ERROR = 1e-7  # float16 has nothing finer near 0


def open_4bit(name: str | Path | None, fingerprint: str) -> Checkpoint | None:
    """Open a model in 4 bits by its name; None if it is not there, not in 4 bits, or has another fingerprint."""
    if not name:
        return None
    try:
        folder = local(name)
        config = folder / "config.json" if folder.is_dir() else download_config(str(name))
        if not read_json(config).get("quantization_config"):
            return None
        model = open_model(name)
    except UserError:
        return None
    return model if model.quantized and model.fingerprint == fingerprint else None


def check_original(original: Checkpoint, packed: Checkpoint) -> None:
    """Refuse a model that is not the original of one in NF4.

    Each weight in NF4, dequantised, has to lie within NF4's own error of the original's; every other tensor has to be
    the original's, but for the rounding of its dtype. One tensor at a time is in memory.

    Args:
        original: a model in 16 or 32 bits.
        packed: a model in NF4, as transformers and bitsandbytes write it.

    Raises:
        UserError: the message names the first tensor that differs.
    """
    weights = {name for name in packed.names() if packed.weight_of(name) == name}
    heads = {packed.architecture.head_weight}  # some tools write the head also where it is tied
    if odd := sorted((weights ^ set(original.names())) - heads):
        raise UserError(f"{original.name}: {_not_original(packed)}: only one of the two has {odd[0]}")
    for name in track(sorted(weights), "Comparing with the 4-bit weights"):
        if not _agrees(original, packed, name):
            raise UserError(f"{original.name}: {_not_original(packed)}: {name} differs by more than NF4 rounds off")


def _not_original(packed: Checkpoint) -> str:
    return f"not the original of {packed.name}, the model in 4 bits that the adapter was trained on"


def _agrees(original: Checkpoint, packed: Checkpoint, name: str) -> bool:
    weight = original.tensor(original.holder(name))
    if not packed.constants(name):
        other = packed.tensor(name)
        coarse = max((weight.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        return weight.shape == other.shape and torch.allclose(
            other.to(coarse).float(), weight.to(coarse).float(), rtol=torch.finfo(coarse).eps, atol=_ABSOLUTE_ERROR
        )
    rounded, block = dequantized(packed, name)
    return weight.shape == rounded.shape and _within_error(weight.float(), rounded.float(), block)


def _within_error(weight: Tensor, rounded: Tensor, block: int) -> bool:
    """Return whether a weight can have become `rounded` in NF4 with blocks of `block` values."""
    rows = _in_rows(weight, block)
    largest = rows.abs().amax(dim=1)  # of each block
    groups = _in_rows(largest, NF4_NESTED_BLOCK).amax(dim=1).repeat_interleave(NF4_NESTED_BLOCK)[: len(largest)]
    allowed = _BLOCK_ERROR * largest + _NESTED_ERROR * groups + _ABSOLUTE_ERROR
    return bool(((_in_rows(rounded, block) - rows).abs().amax(dim=1) <= allowed).all())


def _in_rows(values: Tensor, width: int) -> Tensor:
    """Return values in rows of `width`, the last of which is filled up with zeros."""
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % width)).view(-1, width)
