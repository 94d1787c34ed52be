"""How many layers and units of a model stay at a pruning ratio. No weights, no torch."""

import math
from fractions import Fraction

from loram.base.errors import UserError
from loram.model.architecture import Space
from loram.model.geometry import Geometry


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


def kept_units(space: Space, units: int, ratio: float) -> int:
    """Return how many of `units` stay at a pruning ratio. Channels are rounded down, and key-value groups up.

    These counts reproduce LoRAM's parameter tables (arXiv 2502.13533). The ratio counts as the decimal that was
    written: 10 groups at 0.7 keep 3, where binary floating point would say ceil(3.0000000000000004) = 4.

    Raises:
        UserError: the ratio is not between 0 and 1, or nothing would be left.
    """
    if not 0 < ratio < 1:
        raise UserError(f"ratio {ratio}: must lie between 0 and 1, both excluded; 0.5 removes half")
    exact = units * (1 - Fraction(str(ratio)))
    kept = math.ceil(exact) if space.rounding == "up" else math.floor(exact)
    if kept < 1:
        raise UserError(f"ratio {ratio} leaves none of {units} {space.name}; choose a smaller one")
    return kept
