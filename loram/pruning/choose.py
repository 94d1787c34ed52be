"""Choose which units stay: from scores and a ratio to a pruning plan."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loram.disk.artifacts import library_versions
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.plan import BaseReference, PruningPlan
from loram.model.segments import Space
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
    dropped: Sequence[int] = (),
) -> PruningPlan:
    """Keep the units with the highest scores in every scored layer; equal scores keep the lower index.

    Args:
        scores: the scores of the units of layers that are narrowed.
        geometry, model_type, base: the full model.
        options: how to prune.
        seed: the seed that the plan records.
        dropped: the layers that are dropped, sorted.
    """
    row = ARCHITECTURES[model_type]
    ratios = options.ratios(row)
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for layer, scores_by_space in sorted(scores.items()):
        spaces = [space for space in geometry.layer(row, layer).spaces if space.name in ratios]
        counts = options.kept(geometry, row, layer)
        if kept := _kept(scores_by_space, spaces, geometry.at(layer), counts):
            layers[layer] = kept
    return PruningPlan(
        model_type=model_type,
        base=base,
        geometry=geometry,
        **recorded(options),
        ratios=options.own_ratios,
        seed=seed,
        versions=library_versions(),
        dropped=tuple(dropped),
        layers=layers,
    )


def recorded(options: ResolvedPruneOptions) -> dict[str, Any]:
    """Return the options that a plan records, by name."""
    return options.model_dump(include=set(PruningPlan.model_fields))


def _kept(
    scores: Mapping[str, Tensor], spaces: Iterable[Space], geometry: Geometry, counts: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return the units that a layer keeps of each space that is pruned, as many as `counts` says.

    Units within another space are compared within each unit of that: an expert keeps its own best channels.
    """
    kept: dict[str, tuple[int, ...]] = {}
    for space in spaces:
        if (outer := space.within) is None:
            kept[space.name] = _best(scores[space.name], counts[space.name])
            continue
        size, each = geometry.per_unit(space), counts[space.name] // counts[outer.name]
        by_outer = scores[space.name].view(-1, size)
        kept[space.name] = tuple(
            unit * size + inner
            for unit in kept.get(outer.name, range(geometry.units(outer)))
            for inner in _best(by_outer[unit], each)
        )
    return kept


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
