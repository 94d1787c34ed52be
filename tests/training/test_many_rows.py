"""Training on several data sets by weight, and on rows that are streamed."""

import gzip
import json
import logging
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, VOCABULARY
from datasets import Dataset
from helpers import Stopped, contents, stop

import loram
from loram.base.errors import UserError
from loram.data import cache, stream
from loram.data.spec import as_specs
from loram.data.stream import stream_tokens
from loram.data.tokens import load_tokens

STEPS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_steps": 1,
}
Jsonl = Callable[..., Path]


@pytest.fixture(scope="module")
def model(pruned_models: dict[str, Path]) -> Path:
    return pruned_models["llama"]


@pytest.fixture
def two(jsonl: Jsonl) -> list[dict[str, Any]]:
    """Two data sets of different forms, with weights."""
    talk = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "nine plus nine"}]
    sums, chats = jsonl(*ROWS, name="sums.jsonl"), jsonl(*[{"messages": talk}] * 8, name="chats.jsonl")
    return [{"path": str(sums), "weight": 3}, {"path": str(chats), "weight": 1}]


def train(model: Path, out: Path, data: Any, **options: Any) -> Path:
    return loram.train(model, out, data=data, lora={"r": 2, "lora_dropout": 0.1}, trainer={**STEPS, **options})


def texts(data: Any, tokenizer: Any, count: int, seed: int = 0) -> list[str]:
    """The first texts of a stream."""
    how: dict[str, Any] = {"vocabulary": VOCABULARY, "seed": seed, "now": datetime.now()}
    return [
        tokenizer.decode(row["input_ids"]) for row in stream_tokens(as_specs(data), tokenizer, 200, **how).take(count)
    ]


def test_a_training_on_several_data_sets_says_so(model: Path, two: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = train(model, tmp_path / "adapter", two)
    settings = json.loads((folder / "loram_manifest.json").read_text())["settings"]
    assert (settings["rows"], settings["rows_skipped"]) == (27, 0)  # 20 rows are three quarters of 27
    assert [(data["path"], data["weight"]) for data in settings["data"]] == [(d["path"], d["weight"]) for d in two]
    alone = train(model, tmp_path / "alone", two[0]["path"])
    assert contents(alone)["adapter_model.safetensors"] != contents(folder)["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("several", "packed"), [(False, {}), (True, {"packing": True, "max_length": 200})], ids=["one", "several, packed"]
)
def test_a_streamed_training_goes_on_at_the_same_row(
    several: bool,
    packed: dict[str, Any],
    model: Path,
    two: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = [{**spec, "streaming": True, "buffer_size": 5} for spec in two[: 1 + several]]
    expected = contents(train(model, tmp_path / "a", data, **packed))
    with monkeypatch.context() as patch:
        stop(patch, 4, Stopped())
        with pytest.raises(Stopped):
            train(model, tmp_path / "b", data, **packed)
    with caplog.at_level(logging.INFO, "loram"):
        assert contents(train(model, tmp_path / "b", data, **packed)) == expected
    assert "going on from checkpoint-3" in caplog.text
    settings = json.loads(expected["loram_manifest.json"])["settings"]
    assert settings["rows"] is None
    log = [json.loads(line)["loss"] for line in expected["training_log.jsonl"].splitlines()]
    assert len({*log}) == 6


def test_a_stream_that_changed_is_not_gone_on_with(
    model: Path, two: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FIRST_ROWS", 2)
    data = {**two[0], "streaming": True}
    with monkeypatch.context() as patch:
        stop(patch, 4, Stopped())
        with pytest.raises(Stopped):
            train(model, tmp_path / "a", data)
    path = Path(data["path"])
    path.write_text(path.read_text().replace("3 plus 4 is 7.", "3 plus 4 is 8."))  # the last row
    with pytest.raises(UserError, match=r"the rows of .*sums\.jsonl are not those that it began with"):
        train(model, tmp_path / "a", data)
    with pytest.raises(UserError, match="are not those that it began with"):
        train(model, tmp_path / "a", {**data, "buffer_size": 3})


def test_a_stream_has_the_rows_of_its_data_set_again_and_again(rows_file: Path, tokenizer: Any) -> None:
    data = {"path": str(rows_file), "streaming": True}
    whole = load_tokens(as_specs(str(rows_file))[0], tokenizer, 200, vocabulary=VOCABULARY).rows["input_ids"]
    expected = [tokenizer.decode(ids) for ids in whole]
    assert texts({**data, "buffer_size": 1}, tokenizer, 45) == [*expected, *expected, *expected[:5]]
    shuffled = texts({**data, "buffer_size": 10}, tokenizer, 20)
    assert sorted(shuffled) == sorted(expected) != shuffled != expected
    assert shuffled == texts({**data, "buffer_size": 10}, tokenizer, 20)
    assert shuffled != texts({**data, "buffer_size": 10}, tokenizer, 20, seed=1)
    assert texts({**data, "buffer_size": 1, "max_samples": 3}, tokenizer, 5) == [*expected[:3], *expected[:2]]


def test_streams_are_mixed_in_proportion_to_their_weights(two: list[dict[str, Any]], tokenizer: Any) -> None:
    mixed = texts([{**spec, "streaming": True} for spec in two], tokenizer, 400)
    assert 0.2 < sum("nine" in text for text in mixed) / 400 < 0.3


@pytest.mark.parametrize("kind", ["parquet", "saved", "jsonl.gz"])
def test_every_kind_of_file_can_be_streamed(kind: str, tokenizer: Any, rows_file: Path, tmp_path: Path) -> None:
    rows, path = Dataset.from_list(ROWS), tmp_path / f"rows.{kind}"
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(rows_file.read_bytes()))
    else:
        {"parquet": rows.to_parquet, "saved": rows.save_to_disk}[kind](path)
    expected = texts({"path": str(rows_file), "streaming": True, "buffer_size": 1}, tokenizer, 25)
    assert texts({"path": str(path), "streaming": True, "buffer_size": 1}, tokenizer, 25) == expected


def test_a_bad_row_far_down_stops_the_training_by_its_line(
    model: Path, jsonl: Jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FIRST_ROWS", 3)
    path = jsonl(*ROWS[:9], {"question": "a"})
    with pytest.raises(UserError, match=r"data\.jsonl:10: there is no 'answer'"):
        train(model, tmp_path / "a", {"path": str(path), "streaming": True, "buffer_size": 1})
    empty = jsonl({"question": "a", "answer": ""}, name="empty.jsonl")
    with pytest.raises(UserError, match="no token of any row is in the loss"):
        train(model, tmp_path / "b", {"path": str(empty), "streaming": True})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "trainer", "message"),
    [
        (({"streaming": True},), {"max_steps": -1}, r"sums\.jsonl: streaming: .*say how many steps .*--max-steps"),
        (({"streaming": True}, {}), {}, "stream every data set of a mixture, or none"),
        (({"streaming": True, "weight": None}, {"streaming": True, "weight": None}), {}, "need a weight each"),
        (({"streaming": True, "buffer_size": 0},), {}, "buffer_size"),
    ],
    ids=["steps", "some", "weights", "buffer"],
)
def test_streams_that_lack_something_are_refused_before_work(
    changes: Any, trainer: dict[str, Any], message: str, model: Path, two: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = [{**spec, **change} for spec, change in zip(two, changes, strict=False)]
    with pytest.raises(UserError, match=message):
        train(model, tmp_path / "out" / "a", data, **trainer)
    assert not (tmp_path / "out").exists()


def test_other_stages_want_a_limit(model: Path, rows_file: Path) -> None:
    data: dict[str, Any] = {"path": str(rows_file), "streaming": True}
    with pytest.raises(UserError, match=r"only training goes through rows without an end; .* max_samples"):
        loram.evaluate(model, data=data)
    limited = loram.evaluate(model, data={**data, "max_samples": 4})
    assert limited.loss == loram.evaluate(model, data={"path": str(rows_file), "max_samples": 4}).loss


def test_memory_does_not_grow_with_the_rows(
    jsonl: Jsonl, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python holds at the peak of tokenising is the same for five times the rows."""
    monkeypatch.setenv("LORAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST", 0)
    monkeypatch.setattr(cache, "_BATCH_ROWS", 20)

    def peak(count: int) -> int:
        path = jsonl(*(ROWS * (count // len(ROWS))), name=f"{count}.jsonl")
        tracemalloc.start()
        tokens = load_tokens(as_specs(str(path))[0], tokenizer, 100, vocabulary=VOCABULARY)
        measured = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(tokens.rows) == count
        return measured

    peak(20)  # what is learnt and imported once
    assert peak(1_000) < 1.2 * peak(200)
