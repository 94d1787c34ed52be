"""Choose which units stay: from scores and a ratio to a pruning plan."""

from typing import Any

import torch
from torch import Tensor

from loram.disk.artifacts import library_versions
from loram.model.counts import kept_units
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.plan import BaseReference, PruningPlan
from loram.pruning.options import ResolvedPruneOptions
from loram.pruning.score import Scores


def choose(
    scores: Scores,
    *,
    geometry: Geometry,
    model_type: str,
    base: BaseReference,
    options: ResolvedPruneOptions,
    seed: int,
) -> PruningPlan:
    """Keep the units with the highest scores in every scored layer; equal scores keep the lower index."""
    row = ARCHITECTURES[model_type]
    layers = {
        layer: {
            space.name: _best(spaces[space.name], kept_units(space, geometry.units(space), options.ratio))
            for space in geometry.layer(row, layer).spaces
        }
        for layer, spaces in sorted(scores.items())
    }
    return PruningPlan(
        model_type=model_type,
        base=base,
        geometry=geometry,
        **recorded(options),
        seed=seed,
        versions=library_versions(),
        layers=layers,
    )


def recorded(options: ResolvedPruneOptions) -> dict[str, Any]:
    """Return the options that a plan records, by name."""
    return options.model_dump(include=set(PruningPlan.model_fields))


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
