"""Sparse patterns: which share of a linear's weights stays, and how many values that is. No weights, no torch."""

import math
import re
from fractions import Fraction

from loram.base.errors import UserError

STRUCTURED, UNSTRUCTURED = "structured", "unstructured"
_N_OF_M = re.compile(r"([1-9]\d*):([1-9]\d*)")


def n_of_m(pattern: str) -> tuple[int, int] | None:
    """Parse `4:8` into (4, 8): of an output's every 8 neighbouring inputs, 4 weights stay. A named pattern gives None.

    Raises:
        UserError: the text is not a pattern.
    """
    if pattern in (STRUCTURED, UNSTRUCTURED):
        return None
    match = _N_OF_M.fullmatch(pattern)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(
            f"pattern {pattern!r}: should be structured, unstructured, or n:m with n below m, "
            "of which n of every m weights are kept: 4:8, 2:4"
        )
    return int(match[1]), int(match[2])


def removed_share(pattern: str, ratio: float | None) -> float:
    """Return the share of weights that a sparse pattern removes: n:m tells it, `unstructured` asks for it.

    Raises:
        UserError: the ratio is missing, not between 0 and 1, or not what n:m says.
    """
    if (group := n_of_m(pattern)) is None:
        if ratio is None or not 0 < ratio < 1:
            raise UserError(f"ratio {ratio}: must lie between 0 and 1, both excluded; 0.5 removes half")
        return ratio
    implied = 1 - group[0] / group[1]
    if ratio is not None and abs(ratio - implied) > 1e-3:
        raise UserError(
            f"ratio {ratio}: pattern {pattern} keeps {group[0]} of every {group[1]} weights, which is a ratio of "
            f"{implied:.4g}; leave ratio out, or choose another pattern"
        )
    return implied


def kept_values(rows: int, columns: int, pattern: str, ratio: float) -> int:
    """Return how many weights of a (rows, columns) linear stay. Every criterion keeps exactly this number.

    n:m keeps n of every m. Unstructured keeps `ceil(rows * columns * (1 - ratio))`, with the ratio taken as the decimal
    that was written. (Criteria that compare within rows spread that number as evenly as it goes.)

    Raises:
        UserError: columns are no multiple of m, or of 8 (masks hold eight inputs a byte).
    """
    group = n_of_m(pattern)
    for unit in (8, *(group or ())[1:]):
        if columns % unit:
            raise UserError(f"pattern {pattern}: a linear has {columns} inputs, which is no multiple of {unit}")
    if group is None:
        return math.ceil(rows * columns * (1 - Fraction(str(ratio))))
    return rows * columns // group[1] * group[0]
