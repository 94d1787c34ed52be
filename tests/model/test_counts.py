"""How much stays: exact, whatever binary floating point makes of the ratio."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loram.base.errors import UserError
from loram.model.counts import kept_units, prunable_layers
from loram.model.geometry import Geometry
from loram.model.parts import CHANNELS, KV_GROUPS


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


@pytest.mark.parametrize(
    ("units", "ratio", "multiple", "kept"),
    [
        (28672, 0.85, 64, 4352),  # 4300 without
        (1536, 0.5, 64, 768),
        (100, 0.6, 64, 64),
        (100, 0.1, 64, 100),  # there are no 128
    ],
)
def test_channels_are_rounded_up_to_a_multiple(units: int, ratio: float, multiple: int, kept: int) -> None:
    assert kept_units(CHANNELS, units, ratio, multiple=multiple) == kept
    assert kept_units(KV_GROUPS, units, ratio, multiple=multiple) == kept_units(KV_GROUPS, units, ratio)


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 1.1, float("nan"), float("inf")])
def test_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        kept_units(CHANNELS, 100, ratio)


def test_nothing_left() -> None:
    with pytest.raises(UserError, match="leaves none of 5 channels"):
        kept_units(CHANNELS, 5, 0.9)


@given(units=st.integers(1, 100_000), thousandths=st.integers(1, 999))
def test_counts_are_those_of_whole_numbers(units: int, thousandths: int) -> None:
    exact = units * (1000 - thousandths)  # in thousandths of a unit
    assert kept_units(KV_GROUPS, units, thousandths / 1000) == -(-exact // 1000)
    if exact >= 1000:
        assert kept_units(CHANNELS, units, thousandths / 1000) == exact // 1000


GEOMETRY = Geometry(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=6,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(("first", "last", "layers"), [(4, 1, [4]), (0, 0, [0, 1, 2, 3, 4, 5]), (2, 2, [2, 3])])
def test_layers(first: int, last: int, layers: list[int]) -> None:
    assert list(prunable_layers(GEOMETRY, first, last)) == layers


@pytest.mark.parametrize(("first", "last"), [(4, 2), (6, 0), (0, 6), (100, 100), (-1, 2), (2, -1)])
def test_no_layer_left(first: int, last: int) -> None:
    with pytest.raises(UserError, match=f"keep_first {first} and keep_last {last} leave no layer of 6"):
        prunable_layers(GEOMETRY, first, last)
