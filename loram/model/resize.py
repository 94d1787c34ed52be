"""`narrow` and `widen`: the only index arithmetic in the project. Each undoes the other on the part that is kept."""

from collections.abc import Iterator

import torch
from torch import Tensor

from loram.base.errors import UserError
from loram.model.plan import PruningPlan

# What follows a linear's path -> the tensor's dimension for (outputs, inputs); None where it has no such dimension.
_PARTS: dict[str, tuple[int | None, int | None]] = {
    "weight": (0, 1),
    "bias": (0, None),
    "lora_A.weight": (None, 1),
    "lora_B.weight": (0, None),
    "lora_magnitude_vector": (0, None),
}


def _cuts(name: str, plan: PruningPlan) -> Iterator[tuple[int, Tensor, int]]:
    """Yield (dimension, kept indices, full size) for each dimension of a tensor that the plan shortens."""
    place = plan.architecture.split(name)
    if place is None:
        return
    layer, rest = place
    if layer in plan.dropped:
        raise UserError(f"{name}: the plan drops layer {layer}, so the pruned model has no such tensor")
    for linear in plan.architecture.linears:
        if not rest.startswith(f"{linear.path}."):
            continue
        part = rest.removeprefix(f"{linear.path}.")
        if part not in _PARTS:
            raise UserError(f"{name}: a {part!r} has no narrow and wide form; known are {', '.join(_PARTS)}")
        for dimension, segments in zip(_PARTS[part], linear.sides, strict=True):
            if dimension is not None and (kept := plan.kept_elements(layer, segments)) is not None:
                yield dimension, kept, plan.geometry.size(segments)
    for norm in plan.architecture.norms:
        if rest == f"{norm.path}.weight" and (kept := plan.kept_elements(layer, [norm.width])) is not None:
            yield 0, kept, plan.geometry.size([norm.width])


def _expect(name: str, tensor: Tensor, dimension: int, size: int) -> None:
    if tensor.ndim <= dimension or tensor.shape[dimension] != size:
        raise UserError(
            f"{name}: dimension {dimension} of shape {tuple(tensor.shape)} should be {size}; "
            "this tensor does not belong to this pruning plan"
        )


def narrow(name: str, tensor: Tensor, plan: PruningPlan) -> Tensor:
    """Take the part of a full-size tensor that the plan keeps.

    Args:
        name: the name of a weight (`model.layers.3.mlp.up_proj.weight`), a bias or a LoRA factor (`...lora_B.weight`).
        tensor: the tensor of the full model, of any dtype.
        plan: the pruning plan.

    Returns:
        A tensor of the pruned model's shape and the same dtype; the same object where nothing is cut.

    Raises:
        UserError: the shape is not the full model's, or the tensor is in a layer that the plan drops.

    Example: with channels (0, 2) kept of 3, a gate_proj weight (3, hidden) becomes its rows 0 and 2; a fused
    gate_up_proj weight (6, hidden) becomes its rows 0, 2, 3 and 5.
    """
    for dimension, kept, size in _cuts(name, plan):
        _expect(name, tensor, dimension, size)
        tensor = tensor.index_select(dimension, kept.to(tensor.device))
    return tensor


def widen(name: str, tensor: Tensor, plan: PruningPlan) -> Tensor:
    """Put a pruned tensor back into the full shape, zero elsewhere: `narrow(name, widen(name, t, plan), plan) == t`.

    For LoRA factors this is the recovery R of LoRAM (arXiv 2502.13533, section 3.2): lora_B gets zero rows where output
    rows were pruned, and lora_A gets zero columns where input columns were pruned.

    Args:
        name, plan: as for `narrow`.
        tensor: the tensor of the pruned model, of any dtype.

    Returns:
        A tensor of the full model's shape and the same dtype; the same object where nothing is cut.

    Raises:
        UserError: the shape is not the pruned model's, or the tensor is in a layer that the plan drops.
    """
    for dimension, kept, size in _cuts(name, plan):
        _expect(name, tensor, dimension, len(kept))
        shape = list(tensor.shape)
        shape[dimension] = size
        wide = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        tensor = wide.index_copy_(dimension, kept.to(tensor.device), tensor)
    return tensor
