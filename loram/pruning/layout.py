"""What a pruned folder will hold: as many units or weights as the options keep, and the tensors that follow."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from loram.disk.artifacts import library_versions
from loram.disk.card import Making, pruning_step, write_card
from loram.disk.checkpoint import Checkpoint
from loram.disk.tensorfile import TensorSpec
from loram.model.plan import BaseReference, PruningPlan
from loram.model.resize import narrow
from loram.pruning.choose import choose, recorded
from loram.pruning.options import ResolvedPruneOptions


def blank_plan(
    checkpoint: Checkpoint,
    options: ResolvedPruneOptions,
    *,
    seed: int = 42,
    fingerprint: str = "",
    dropped: Sequence[int] | None = None,
) -> PruningPlan:
    """Return a plan that keeps as many layers, units or weights as the plan of these options will keep.

    Which ones stay depends on the weights, and these are not read here. A sparse plan lacks only its masks.

    Args:
        checkpoint: the full model.
        options: how to prune.
        seed: of the random criterion.
        fingerprint: the fingerprint of the full model, where the plan is to have it.
        dropped: the layers that are dropped; None stands for the last ones that can be.
    """
    geometry, model_type = checkpoint.geometry, checkpoint.architecture.model_type
    base = base_of(checkpoint, fingerprint)
    if options.sparse:
        return PruningPlan(
            model_type=model_type,
            base=base,
            geometry=geometry,
            **recorded(options),
            masks="",
            seed=seed,
            versions=library_versions(),
            layers={},
        )
    if dropped is None:
        dropped = options.dropped_blindly(geometry, checkpoint.architecture, checkpoint.config)
    scores = {
        layer: {
            space.name: torch.zeros(geometry.at(layer).units(space)) for space in checkpoint.rows_by_layer[layer].spaces
        }
        for layer in options.layers(geometry)
        if options.narrows and layer not in dropped
    }
    return choose(
        scores,
        geometry=geometry,
        model_type=model_type,
        base=base,
        options=options,
        seed=seed,
        dropped=dropped,
    )


def base_of(checkpoint: Checkpoint, fingerprint: str) -> BaseReference:
    """Return what a plan says of its full model; the fingerprint is given, since reading it takes time."""
    wrapper = None if checkpoint.wrapper is None else checkpoint.wrapper.model_type
    return BaseReference(name=checkpoint.name, fingerprint=fingerprint, wrapper=wrapper)


def pruned_specs(checkpoint: Checkpoint, plan: PruningPlan) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Return the names, dtypes and shapes of a pruned model's tensors, and of a sparse model's masks."""
    if plan.sparse:
        return _sparse_specs(checkpoint, plan)
    specs = {}
    for name in checkpoint.names():
        if plan.drops(name):
            continue
        full = checkpoint.spec(name)
        specs[name] = TensorSpec.of(narrow(name, torch.empty(full.shape, dtype=full.dtype, device="meta"), plan))
    for layer in plan.layers:
        for path, _ in plan.compensated(layer):
            if f"{path}.bias" not in specs:
                weight = specs[f"{path}.weight"]
                specs[f"{path}.bias"] = TensorSpec(dtype=weight.dtype, shape=weight.shape[:1])
    for layer in plan.layers:
        dtypes = [
            specs[f"{plan.architecture.layer_path(layer)}.{linear.path}.weight"].dtype
            for linear in plan.refitted(layer)
        ]
        specs |= {name: TensorSpec(dtype=dtypes[0], shape=shape) for name, shape in plan.bypass_shapes(layer).items()}
    return specs, {}


def in_order(specs: Mapping[str, TensorSpec], layers: Sequence[int], plan: PruningPlan) -> dict[str, TensorSpec]:
    """Return the tensors of a folder in the order in which they are written, so that files are hashed on the way.

    Args:
        specs: the tensors by name.
        layers: the layers that are written one after the other; all other tensors follow.
        plan: a plan of the model.
    """
    places = {layer: place for place, layer in enumerate(layers)}

    def place_of(name: str) -> int:
        layer, _ = plan.architecture.split(name) or (None, name)
        return len(places) if layer is None else places.get(layer, len(places))

    return {name: specs[name] for name in sorted(specs, key=place_of)}  # names of one place keep their order


def _sparse_specs(checkpoint: Checkpoint, plan: PruningPlan) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    specs = {name: checkpoint.spec(name) for name in checkpoint.names()}
    masks = {}
    for layer in plan.sparse_layers:
        for path, count in plan.kept_values().items():
            name = f"{plan.architecture.layer_path(layer)}.{path}.weight"
            if name not in specs:  # the linear is of another kind of layers
                continue
            rows, columns = specs[name].shape
            specs[name] = TensorSpec(dtype=specs[name].dtype, shape=(count,))
            masks[mask_of(name)] = TensorSpec(dtype=torch.uint8, shape=(rows, columns // 8))
    return specs, masks


def mask_of(weight: str) -> str:
    """Return the name of a sparse weight's mask."""
    return f"{weight.removesuffix('.weight')}.mask"


def write_pruned_card(checkpoint: Checkpoint, plan: PruningPlan, out: Path, *, wrapped: bool = False) -> None:
    """Write the model card of a pruned folder whose other files are in place; `wrapped` if it has towers."""
    making = Making(
        kind="pruned",
        step=pruning_step(plan),
        model=checkpoint.name,
        parents=[checkpoint.folder],
        wrapped=wrapped,
    )
    write_card(out, making)
