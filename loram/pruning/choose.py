"""Choose which units stay: from scores and a ratio to a pruning plan."""

import torch
from torch import Tensor

from loram.disk.artifacts import library_versions
from loram.model.counts import kept_units
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.plan import BaseReference, PruningPlan
from loram.pruning.score import Scores


def choose(
    scores: Scores,
    *,
    geometry: Geometry,
    model_type: str,
    base: BaseReference,
    criterion: str,
    ratio: float,
    bias_compensation: bool = False,
    seed: int,
    keep_first: int,
    keep_last: int,
) -> PruningPlan:
    """Keep the units with the highest scores in every scored layer; equal scores keep the lower index."""
    layers = {
        layer: {
            space.name: _best(spaces[space.name], kept_units(space, geometry.units(space), ratio))
            for space in ARCHITECTURES[model_type].spaces
        }
        for layer, spaces in sorted(scores.items())
    }
    return PruningPlan(
        model_type=model_type,
        base=base,
        geometry=geometry,
        criterion=criterion,
        ratio=ratio,
        bias_compensation=bias_compensation,
        seed=seed,
        keep_first=keep_first,
        keep_last=keep_last,
        versions=library_versions(),
        layers=layers,
    )


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
