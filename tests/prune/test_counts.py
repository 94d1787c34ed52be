"""How much stays: exact, whatever binary floating point makes of the ratio."""

import pytest

from loram.errors import UserError
from loram.model.architecture import CHANNELS, KV_GROUPS
from loram.prune.counts import kept_units


@pytest.mark.parametrize(
    ("space", "units", "ratio", "kept"),
    [
        (CHANNELS, 28672, 0.85, 4300),
        (KV_GROUPS, 8, 0.85, 2),
        (KV_GROUPS, 8, 0.75, 2),
        (KV_GROUPS, 3, 0.5, 2),
        (CHANNELS, 1536, 0.5, 768),
        (KV_GROUPS, 10, 0.7, 3),  # 10 * (1 - 0.7) is above 3 in floating point
        (KV_GROUPS, 40, 0.7, 12),
        (CHANNELS, 100, 0.9, 10),  # 100 * (1 - 0.9) is below 10 in floating point
        (KV_GROUPS, 1, 0.99, 1),
    ],
)
def test_exact_counts(space: object, units: int, ratio: float, kept: int) -> None:
    assert kept_units(space, units, ratio) == kept


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 1.1, float("nan"), float("inf")])
def test_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        kept_units(CHANNELS, 100, ratio)


def test_nothing_left() -> None:
    with pytest.raises(UserError, match="leaves none of 5 channels"):
        kept_units(CHANNELS, 5, 0.9)
