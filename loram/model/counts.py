"""How many layers and units of a model stay at a pruning ratio. No weights, no torch."""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from loram.base.errors import UserError
from loram.model.architecture import Architecture
from loram.model.geometry import Geometry
from loram.model.parts import KV_GROUPS
from loram.model.segments import Space


def prunable_layers(geometry: Geometry, keep_first: int, keep_last: int) -> range:
    """Return the layers that are pruned: all but the first `keep_first` and the last `keep_last`.

    Raises:
        UserError: no layer is left.
    """
    layers = range(keep_first, geometry.num_hidden_layers - keep_last)
    if keep_first < 0 or keep_last < 0 or not layers:
        raise UserError(
            f"keep_first {keep_first} and keep_last {keep_last} leave no layer of {geometry.num_hidden_layers} to prune"
        )
    return layers


def droppable_layers(
    geometry: Geometry, architecture: Architecture, config: Mapping[str, Any], pruned: range, count: int
) -> list[int]:
    """Return the layers among which some are dropped: those that are pruned, but for a few.

    A dropped layer has no cache. transformers asks the first layer with full attention, and the first with a sliding
    window, how long the text in the cache is, and the last layer that has a state instead of attention whether there is
    any. So the first layer of each kind of these stays, and the last one without attention.

    Args:
        geometry, architecture: the full model's sizes and family.
        config: the content of its config.json.
        pruned: the layers that are pruned.
        count: how many layers are to be dropped.

    Raises:
        UserError: there are not as many.
    """
    windows, text = architecture.windows, architecture.text_config(config)
    attends = [KV_GROUPS in geometry.layer(architecture, layer).spaces for layer in range(geometry.num_hidden_layers)]
    firsts: dict[tuple[bool, int | None], int] = {}
    for layer, kind in enumerate(attends):
        firsts.setdefault((kind, None if windows is None else windows.of(layer, text)), layer)
    states = [layer for layer, kind in enumerate(attends) if not kind]
    layers = [layer for layer in pruned if layer not in {*firsts.values(), *states[-1:]}]
    if count > len(layers):
        raise UserError(
            f"{count} layers cannot be dropped: only {len(layers)} of {geometry.num_hidden_layers} can, since "
            "keep_first, keep_last and the layers whose cache transformers looks at stay"
        )
    return layers


def kept_units(space: Space, units: int, ratio: float, least: int = 1, multiple: int = 1) -> int:
    """Return how many of `units` stay at a pruning ratio. Channels are rounded down; groups and experts are rounded up.

    Channels of experts are rounded down to a multiple of 8. Then channels, also those of experts, are rounded up to a
    multiple of `multiple`, as far as there are so many.

    These counts reproduce LoRAM's parameter tables (arXiv 2502.13533). The ratio counts as the decimal that was
    written: 10 groups at 0.7 keep 3, where binary floating point would say ceil(3.0000000000000004) = 4.

    Raises:
        UserError: the ratio is not between 0 and 1, or fewer than `least` would be left.
    """
    if not 0 < ratio < 1:
        raise UserError(f"ratio {ratio}: must lie between 0 and 1, both excluded; 0.5 removes half")
    exact = units * (1 - Fraction(str(ratio))) / space.multiple
    kept = space.multiple * (math.ceil(exact) if space.rounding == "up" else math.floor(exact))
    if space.rounding == "down" and kept:
        kept = min(units, -(-kept // multiple) * multiple)
    if kept < 1:
        raise UserError(f"ratio {ratio} leaves none of {units} {space.name}; choose a smaller one")
    if kept < least:
        raise UserError(
            f"ratio {ratio} leaves {kept} of {units} {space.name}, and every token needs {least}; choose a smaller one"
        )
    return kept


def kept_by_space(
    geometry: Geometry, spaces: Iterable[Space], ratios: Mapping[str, float], multiple: int = 1
) -> dict[str, int]:
    """Return how many units of each space a narrowed layer keeps.

    Args:
        geometry: the full model's sizes.
        spaces: the spaces of the layer, each after the one that it is within.
        ratios: space name -> the share of its units that goes; a space that is not named keeps all of them.
        multiple: numbers of channels are rounded up to a multiple of this.

    Raises:
        UserError: as `kept_units`.
    """
    kept: dict[str, int] = {}
    for space in spaces:
        count = geometry.per_unit(space)
        if space.name in ratios:
            least = 1 if space.least is None else int(getattr(geometry, space.least))
            count = kept_units(space, count, ratios[space.name], least, multiple)
        kept[space.name] = count * (1 if space.within is None else kept[space.within.name])
    return kept
