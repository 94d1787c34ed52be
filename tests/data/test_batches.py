"""Micro-batches have every row once, padded on the right, and predict the right tokens."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from loram.data.batches import IGNORED, make_batches

ROWS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), max_size=12)


def test_by_hand() -> None:
    input_ids = [[5, 6, 7, 8], [9], [1, 2, 3]]
    labels = [[IGNORED, IGNORED, 7, 8], [9], [IGNORED, 2, IGNORED]]
    (batch,) = make_batches(input_ids, labels, max_tokens=12)
    assert batch.rows == (1, 2, 0)
    assert batch.ids.tolist() == [[9, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 8]]
    assert batch.real.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.wanted.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]]
    assert batch.targets.tolist() == [2, 7, 8]
    assert (batch.ids.dtype, batch.targets.dtype) == (torch.int64, torch.int64)


def test_without_labels_every_token_but_the_first_is_wanted() -> None:
    (batch,) = make_batches([[4, 0, 6], [0, 5]], max_tokens=6)  # token 0 is not mistaken for padding
    assert batch.rows == (1, 0)
    assert batch.real.int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.wanted.int().tolist() == [[1, 0, 0], [1, 1, 0]]
    assert batch.targets.tolist() == [5, 0, 6]


def test_labels_are_what_is_predicted_and_ids_what_is_read() -> None:
    (batch,) = make_batches([[1, 2, 3]], [[11, 12, 13]], max_tokens=3)
    assert batch.ids.tolist() == [[1, 2, 3]]
    assert batch.targets.tolist() == [12, 13]


@given(rows=ROWS, max_tokens=st.integers(1, 40))
def test_every_row_is_there_once_and_whole(rows: list[list[int]], max_tokens: int) -> None:
    batches = make_batches(rows, max_tokens=max_tokens)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))
    for batch in batches:
        count, width = batch.ids.shape
        assert count == len(batch.rows)
        assert width == max(len(rows[row]) for row in batch.rows)
        for row, ids, real in zip(batch.rows, batch.ids, batch.real, strict=True):
            length = len(rows[row])
            assert real.tolist() == [True] * length + [False] * (width - length)
            assert ids.tolist() == rows[row] + [0] * (width - length)


@given(rows=ROWS, max_tokens=st.integers(1, 40))
def test_no_batch_is_larger_than_allowed_nor_smaller_than_it_could_be(rows: list[list[int]], max_tokens: int) -> None:
    batches = make_batches(rows, max_tokens=max_tokens)
    assert all(batch.ids.numel() <= max_tokens or len(batch.rows) == 1 for batch in batches)
    for batch, following in pairwise(batches):
        first = len(rows[following.rows[0]])
        assert (len(batch.rows) + 1) * first > max_tokens
        assert batch.ids.shape[1] <= first


@given(
    data=st.lists(
        st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99) | st.just(IGNORED)), min_size=1, max_size=9),
        max_size=9,
    ),
    max_tokens=st.integers(1, 40),
)
def test_targets_are_the_labels_after_the_wanted_places(data: list[list[tuple[int, int]]], max_tokens: int) -> None:
    input_ids, labels = ([[pair[part] for pair in row] for row in data] for part in (0, 1))
    for batch in make_batches(input_ids, labels, max_tokens=max_tokens):
        expected = [
            (place, position, label)
            for place, row in enumerate(batch.rows)
            for position, label in enumerate(labels[row][1:])
            if label != IGNORED
        ]
        assert batch.wanted.nonzero().tolist() == [[place, position] for place, position, _ in expected]
        assert batch.targets.tolist() == [label for *_, label in expected]
