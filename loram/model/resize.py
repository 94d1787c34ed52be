"""narrow and widen: the only index arithmetic in the project. Each is the other's inverse on the kept part."""

import re

import torch
from torch import Tensor

from loram.base.errors import UserError
from loram.model.architecture import CUTS
from loram.model.plan import PruningPlan

_LINEAR = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.(?P<linear>self_attn\.\w+|mlp\.\w+)\.(?P<part>.+)$")

# What follows a linear's name -> the tensor dimension of (axis 0, axis 1); None where the tensor lacks that axis.
_PARTS = {
    "weight": (0, 1),
    "bias": (0, None),
    "lora_A.weight": (None, 1),
    "lora_B.weight": (0, None),
    "lora_magnitude_vector": (0, None),
}


def _kept(name: str, plan: PruningPlan) -> tuple[int, Tensor, int] | None:
    """(tensor dimension, kept indices, full size) where the plan shortens a tensor, else None."""
    match = _LINEAR.search(name)
    if match is None or (found := CUTS.get(match["linear"])) is None:
        return None
    space, cut = found
    if match["part"] not in _PARTS:
        raise UserError(f"{name}: a {match['part']!r} has no narrow and wide form; known are {', '.join(_PARTS)}")
    dimension = _PARTS[match["part"]][cut.axis]
    indices = plan.kept_elements(int(match["layer"]), space, cut)
    if dimension is None or indices is None:
        return None
    return dimension, indices, plan.geometry.linear_shape(match["linear"])[cut.axis]


def _expect(name: str, tensor: Tensor, dimension: int, size: int) -> None:
    if tensor.ndim <= dimension or tensor.shape[dimension] != size:
        raise UserError(
            f"{name}: dimension {dimension} of shape {tuple(tensor.shape)} should be {size}; "
            "this tensor does not belong to this pruning plan"
        )


def narrow(name: str, tensor: Tensor, plan: PruningPlan) -> Tensor:
    """The part of a full-size tensor that the plan keeps.

    Args:
        name: name of a weight (`model.layers.3.mlp.up_proj.weight`), a bias or a LoRA factor (`...lora_B.weight`).
        tensor: of the full model's shape, any dtype.
        plan: the plan.

    Returns:
        A tensor of the pruned model's shape, same dtype; the same object where nothing is cut.

    Raises:
        UserError: the shape is not the full model's.

    Example: with channels (0, 2) kept of 3, a gate_proj weight (3, hidden) becomes its rows 0 and 2.
    """
    if (kept := _kept(name, plan)) is None:
        return tensor
    dimension, indices, size = kept
    _expect(name, tensor, dimension, size)
    return tensor.index_select(dimension, indices.to(tensor.device))


def widen(name: str, tensor: Tensor, plan: PruningPlan) -> Tensor:
    """Put a pruned tensor back into the full shape, zero elsewhere: `narrow(name, widen(name, t, plan), plan) == t`.

    For LoRA factors this is the recovery R of LoRAM (arXiv 2502.13533, section 3.2): zero rows in lora_B where output
    rows were pruned, zero columns in lora_A where input columns were.

    Args:
        name, plan: as for `narrow`.
        tensor: of the pruned model's shape, any dtype.

    Returns:
        A tensor of the full model's shape, same dtype; the same object where nothing is cut.

    Raises:
        UserError: the shape is not the pruned model's.
    """
    if (kept := _kept(name, plan)) is None:
        return tensor
    dimension, indices, size = kept
    _expect(name, tensor, dimension, len(indices))
    shape = list(tensor.shape)
    shape[dimension] = size
    wide = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return wide.index_copy_(dimension, indices.to(tensor.device), tensor)
