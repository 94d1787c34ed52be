"""Tokens are kept on disk and read from there, and never those of other rows, another tokenizer or other options."""

import json
import logging
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, VOCABULARY
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from loram.base.errors import UserError
from loram.data import cache, tokens
from loram.data.spec import DataSpec
from loram.data.tokens import Tokens, load_rows, load_tokens, tokenize

NOW = datetime(2026, 3, 4, 5, 6, 7)
Load = Callable[..., Tokens]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the tokens of small data sets too, in an empty cache."""
    monkeypatch.setenv("LORAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def load(rows_file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load tokens; the attribute `made` has how often rows were tokenised for it."""

    def load(
        path: Path = rows_file, *, model: Any = tokenizer, length: int = 60, now: datetime = NOW, **how: Any
    ) -> Any:
        return load_tokens(DataSpec(path=str(path), **how), model, length, vocabulary=VOCABULARY, now=now)

    made: list[str] = []
    real = tokens.load_rows
    monkeypatch.setattr(tokens, "load_rows", lambda spec, kinds: made.append(spec.path) or real(spec, kinds))
    load.made = made  # type: ignore[attr-defined]
    return load


def times(load: Any) -> int:
    return len(load.made)


def test_a_second_reading_comes_from_the_cache_and_says_so(
    load: Load, kept: Path, rows_file: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tokenize(load_rows(DataSpec(path=str(rows_file))), tokenizer, 200)
    length = max(map(len, whole.rows["input_ids"])) - 1
    plain = tokenize(load_rows(DataSpec(path=str(rows_file))), tokenizer, length)
    assert plain.truncated
    with caplog.at_level(logging.INFO, "loram"):
        first = load(length=length)
        assert f"the tokens are kept in {kept}" in caplog.text
        caplog.clear()
        again = load(length=length)
    assert f"the tokens are read from the cache, {kept}" in caplog.text
    assert f"max_length {length} cut {plain.truncated}" in caplog.text  # what a user has to know is said every time
    assert times(load) == 1
    for one in (first, again):
        assert one.rows[:] == plain.rows[:]
        assert list(one.sources) == list(plain.sources)
        assert (one.truncated, one.skipped, one.columns, one.unused, one.templated) == (
            *(plain.truncated, plain.skipped, plain.columns, plain.unused, plain.templated),
        )
        assert one.rows.cache_files  # it is mapped, and not in memory
    assert [path.name for path in kept.iterdir() if path.name.startswith(".")] == []


def test_what_decides_the_tokens_is_never_taken_from_another(
    load: Load, kept: Path, rows_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", chat_template="one" + tokenizer.chat_template
    )
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(rows_file.read_bytes())
    whole = load().rows["input_ids"][:]
    load(copy)  # another name and another time change nothing
    load(now=datetime.now())
    assert times(load) == 1
    changes: list[dict[str, Any]] = [
        {"length": max(map(len, whole)) - 1},
        {"max_samples": 3},
        {"apply_chat_template": False},
        {"columns": {"question": "answer", "answer": "question"}},
        {"model": other},
    ]
    seen = [whole]
    for number, change in enumerate(changes, 2):
        seen.append(load(**change).rows["input_ids"][:])
        assert times(load) == number
    assert all(seen.count(rows) == 1 for rows in seen)
    stat = copy.stat()
    copy.write_text(copy.read_text().replace("What is 1", "What is 2"))  # of the same size
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load(copy).rows["input_ids"][:] not in seen


def test_the_date_in_a_template_counts_as_the_template_writes_it(load: Load, kept: Path, tokenizer: Any) -> None:
    dated = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        eos_token="<|im_end|>",
        chat_template="{{ strftime_now('%d.%m.') }}" + tokenizer.chat_template,
    )
    first = load(model=dated, length=200)
    assert load(model=dated, length=200, now=datetime(2027, 3, 4)).rows[:] == first.rows[:]  # the same day and month
    assert times(load) == 1
    assert load(model=dated, length=200, now=datetime(2026, 3, 5)).rows[:] != first.rows[:]
    assert load(model=dated, length=200).rows[:] == first.rows[:]
    assert times(load) == 2


@pytest.mark.parametrize("name", [cache.ROWS_NAME, cache.FACTS_NAME])
def test_a_damaged_entry_is_made_anew(name: str, load: Load, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = load().rows[:]
    [path] = kept.glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert load().rows[:] == first
    assert "cannot be used, and is made anew" in caplog.text
    assert times(load) == 2


def test_rows_in_tables_are_kept_too(load: Load, kept: Path, tmp_path: Path) -> None:
    expected = load().rows[:]
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        first, made = load(path), times(load)
        assert str(kept) in first.rows.cache_files[0]["filename"]
        assert load(path).rows[:] == first.rows[:] == expected
        assert times(load) == made


def test_small_data_sets_leave_nothing(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAM_CACHE", str(tmp_path / "cache"))
    assert load().rows[:] == load().rows[:]
    assert times(load) == 2
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_bad_row_and_a_place_that_cannot_be_written_leave_nothing(
    load: Load, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS) + '{"question": "a"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:21: there is no 'answer'"):
        load(bad)
    assert list(kept.iterdir()) == []
    expected = load().rows[:]
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAM_CACHE", str(tmp_path / "file"))
    assert load().rows[:] == expected
    assert "no tokens can be kept here" in caplog.text


def test_a_file_that_changes_meanwhile_is_refused(
    load: Load, kept: Path, tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows_file.read_bytes())
    real = tokens.write_rows

    def write(*arguments: Any) -> Any:
        path.write_text(path.read_text().replace("plus", "times"))
        return real(*arguments)

    monkeypatch.setattr(tokens, "write_rows", write)
    with pytest.raises(UserError, match=r"rows\.jsonl: it changed while it was read; start again"):
        load(path)
    assert list(kept.iterdir()) == []


def test_what_killed_processes_left_is_removed(load: Load, kept: Path) -> None:
    for name, age in (("old", 2), ("new", 0)):
        folder = kept / f".partial-{name}"
        folder.mkdir(parents=True)
        when = datetime.now().timestamp() - age * 24 * 3600
        os.utime(folder, (when, when))
    load()
    assert [path.name for path in kept.glob(".*")] == [".partial-new"]
