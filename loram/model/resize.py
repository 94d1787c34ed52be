"""`narrow` and `widen`: the only index arithmetic in the project. Each undoes the other on the part that is kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loram.base.errors import UserError
from loram.model.plan import PruningPlan
from loram.model.segments import Segment, Space

# What follows a linear's path -> the tensor's dimension for (outputs, inputs); None where it has no such dimension.
_PARTS: dict[str, tuple[int | None, int | None]] = {
    "weight": (0, 1),
    "bias": (0, None),
    "lora_A.weight": (None, 1),
    "lora_B.weight": (0, None),
    "lora_magnitude_vector": (0, None),
}


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """A dimension of a tensor that the plan shortens.

    Args:
        dimension: the dimension.
        kept: the indices that stay: (n,), or (experts, n) where each expert keeps its own.
        size: the full size.
        experts: the dimension of the experts, where each keeps its own; that one is cut before.
    """

    dimension: int
    kept: Tensor
    size: int
    experts: int | None = None

    def index(self, tensor: Tensor) -> Tensor:
        """Return the indices with as many dimensions as a tensor, to go with it."""
        assert self.experts is not None
        shape = [1] * tensor.ndim
        shape[self.experts], shape[self.dimension] = self.kept.shape
        ordered = self.kept if self.experts < self.dimension else self.kept.T
        return ordered.reshape(shape).to(tensor.device)


def _expert_factor(name: str, plan: PruningPlan) -> tuple[int, dict[int, Sequence[Segment]]] | None:
    """Return the layer of a LoRA factor of experts, and the segments of its dimensions when it is unfolded.

    None stands for any other tensor.
    """
    if (place := plan.architecture.split(name)) is None:
        return None
    layer, rest = place
    row = plan.geometry.layer(plan.architecture, layer)
    for tensor in row.expert_matrices:
        experts, (outputs, inputs) = tensor.axes[0], row.expert_sides(tensor)
        if rest == f"{tensor.name}.lora_A.weight":
            return layer, {0: experts, 2: inputs}
        if rest == f"{tensor.name}.lora_B.weight":
            return layer, {0: outputs, 2: experts}
    return None


def _unfolded(name: str, tensor: Tensor, plan: PruningPlan, *, pruned: bool) -> Tensor:
    """Give a LoRA factor of experts a dimension for the experts; other tensors stay as they are.

    In files lora_A is (experts * r, inputs), and lora_B is (outputs, r * experts). They become (experts, r, inputs) and
    (outputs, r, experts).
    """
    if (factor := _expert_factor(name, plan)) is None:
        return tensor
    layer, axes = factor
    inputs = name.endswith("lora_A.weight")
    experts = plan.geometry.at(layer).size(axes[0 if inputs else 2], plan.units(layer) if pruned else None)
    axis = 0 if inputs else 1
    if tensor.ndim != 2 or tensor.shape[axis] % experts:
        raise UserError(
            f"{name}: dimension {axis} of shape {tuple(tensor.shape)} should be a multiple of {experts}, the number of "
            "experts; this tensor does not belong to this pruning plan"
        )
    unfolded: Tensor = tensor.unflatten(axis, (experts, -1) if inputs else (-1, experts))
    return unfolded


def _folded(name: str, tensor: Tensor, plan: PruningPlan) -> Tensor:
    """Undo `_unfolded`."""
    if _expert_factor(name, plan) is None:
        return tensor
    return tensor.flatten(0, 1) if name.endswith("lora_A.weight") else tensor.flatten(1, 2)


def _cuts(name: str, plan: PruningPlan) -> Iterator[_Cut]:
    """Yield each cut of a tensor of the full model, that of its experts first."""
    place = plan.architecture.split(name)
    if place is None:
        return
    layer, rest = place
    if layer in plan.dropped:
        raise UserError(f"{name}: the plan drops layer {layer}, so the pruned model has no such tensor")
    row = plan.geometry.layer(plan.architecture, layer)
    for linear in row.linears:
        if not rest.startswith(f"{linear.path}."):
            continue
        part = rest.removeprefix(f"{linear.path}.")
        if part not in _PARTS:
            raise UserError(f"{name}: a {part!r} has no narrow and wide form; known are {', '.join(_PARTS)}")
        sides = zip(_PARTS[part], linear.sides, strict=True)
        yield from _cuts_of_axes(plan, layer, {axis: segments for axis, segments in sides if axis is not None})
    for norm in row.norms:
        if rest == f"{norm.path}.weight":
            yield from _cuts_of_axes(plan, layer, {0: (norm.width,)})
    for parameter in row.parameters:
        if rest == parameter.name:
            yield from _cuts_of_axes(plan, layer, dict(enumerate(parameter.axes)))
    if (factor := _expert_factor(name, plan)) is not None:
        yield from _cuts_of_axes(plan, *factor)


def _cuts_of_axes(plan: PruningPlan, layer: int, axes: Mapping[int, Sequence[Segment]]) -> Iterator[_Cut]:
    """Yield the cuts of a tensor, by the segments of its dimensions."""
    whole = {axis: segments for axis, segments in axes.items() if _outer(segments) is None}
    for axis, segments in whole.items():
        if (kept := plan.kept_elements(layer, segments)) is not None:
            yield _Cut(dimension=axis, kept=kept, size=plan.geometry.at(layer).size(segments))
    for axis, segments in axes.items():
        if (outer := _outer(segments)) is not None and (kept := plan.kept_in_experts(layer, segments)) is not None:
            experts = next(axis for axis, (first, *_) in whole.items() if first.space == outer)
            yield _Cut(dimension=axis, kept=kept, size=plan.geometry.at(layer).size(segments), experts=experts)


def _outer(segments: Sequence[Segment]) -> Space | None:
    """Return the space that the space of some segments is within."""
    space = segments[0].space
    return None if space is None else space.within


def _expect(name: str, tensor: Tensor, dimension: int, size: int) -> None:
    if tensor.ndim <= dimension or tensor.shape[dimension] != size:
        raise UserError(
            f"{name}: dimension {dimension} of shape {tuple(tensor.shape)} should be {size}; "
            "this tensor does not belong to this pruning plan"
        )


def narrow(name: str, tensor: Tensor, plan: PruningPlan) -> Tensor:
    """Take the part of a full-size tensor that the plan keeps.

    Args:
        name: the name of a weight (`model.layers.3.mlp.up_proj.weight`), a bias or a LoRA factor (`...lora_B.weight`),
            also of a tensor of experts (`model.layers.3.mlp.experts.down_proj.lora_A.weight`).
        tensor: the tensor of the full model, of any dtype.
        plan: the pruning plan.

    Returns:
        A tensor of the pruned model's shape and the same dtype; the same object where nothing is cut.

    Raises:
        UserError: the shape is not the full model's, or the tensor is in a layer that the plan drops.

    Example: with channels (0, 2) kept of 3, a gate_proj weight (3, hidden) becomes its rows 0 and 2; a fused
    gate_up_proj weight (6, hidden) becomes its rows 0, 2, 3 and 5.
    """
    if not (cuts := list(_cuts(name, plan))):
        return tensor
    tensor = _unfolded(name, tensor, plan, pruned=False)
    for cut in cuts:
        _expect(name, tensor, cut.dimension, cut.size)
        if cut.experts is None:
            tensor = tensor.index_select(cut.dimension, cut.kept.to(tensor.device))
        else:
            tensor = torch.take_along_dim(tensor, cut.index(tensor), cut.dimension)
    return _folded(name, tensor, plan)


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
    if not (cuts := list(_cuts(name, plan))):
        return tensor
    tensor = _unfolded(name, tensor, plan, pruned=True)
    for cut in reversed(cuts):
        _expect(name, tensor, cut.dimension, cut.kept.shape[-1])
        shape = list(tensor.shape)
        shape[cut.dimension] = cut.size
        wide = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        if cut.experts is None:
            tensor = wide.index_copy_(cut.dimension, cut.kept.to(tensor.device), tensor)
        else:
            tensor = wide.scatter_(cut.dimension, cut.index(tensor).expand_as(tensor), tensor)
    return _folded(name, tensor, plan)
