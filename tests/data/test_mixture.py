"""Several data sets are one mixture, in the proportions of their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import VOCABULARY

from loram.base.errors import UserError
from loram.data.mixture import draw, load_mixture
from loram.data.spec import as_specs


def test_shares_follow_the_weights() -> None:
    assert list(map(list, draw([2, 1], [None, None], 0))) == [[0, 1], [0]]
    shares = draw([10, 90], [0.5, 0.5], 0)
    assert shares[0] == list(range(10))
    assert len(shares[1]) == 10 == len({*shares[1]})
    assert shares == draw([10, 90], [0.5, 0.5], 0) != draw([10, 90], [0.5, 0.5], 1)
    assert [len(share) for share in draw([30, 30, 5], [2, 1, 0.1], 3)] == [30, 15, 2]


def test_the_rows_of_a_mixture_are_those_of_its_data_sets(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    few = jsonl(*({"text": f"few {n}"} for n in range(4)), name="few.jsonl")
    many = jsonl(*({"text": f"many {n}"} for n in range(40)), name="many.jsonl")

    def texts(*specs: Any) -> list[str]:
        mixture = load_mixture(as_specs(specs), tokenizer, 50, vocabulary=VOCABULARY, seed=3)
        return [tokenizer.decode(ids).removesuffix("<|im_end|>") for ids in mixture.rows["input_ids"]]

    every = [*(f"few {n}" for n in range(4)), *(f"many {n}" for n in range(40))]
    assert texts(few, many) == every
    mixed = texts({"path": str(few), "weight": 1}, {"path": str(many), "weight": 3})
    assert [text for text in mixed if text.startswith("few")] == every[:4]
    assert len(mixed) == len({*mixed}) == 16
    assert mixed != [*every[:16]]
    short = texts(few, {"path": str(many), "max_length": 3})  # each keeps the limit of its own
    assert short[:4] == every[:4]
    assert max(map(len, short[4:])) < 7


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "name at least one data set"),
        ([{"path": "a", "weight": 1}, "b"], "give every one a weight, or none"),
        ([{"path": "a", "weight": 0}], "weight"),
        ([{"path": "a", "wait": 1}], "wait"),
    ],
)
def test_what_is_no_mixture_is_refused(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_specs(data)
