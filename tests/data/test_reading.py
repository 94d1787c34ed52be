"""Files as people keep them: compressed, in shards, in folders, with suffixes in capitals."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from loram.base.errors import UserError
from loram.data.forms import Text
from loram.data.spec import DataSpec
from loram.data.tokens import check_rows, load_rows


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def read(path: Path | str, **options: Any) -> list[str]:
    return [row.text for row in load_rows(DataSpec(path=str(path), **options)) if isinstance(row, Text)]


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_compressed_files(suffix: str, opener: Callable[..., Any], tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", lines("one", "two")),
        ("a.csv", "text\none\ntwo\n"),
        ("a.json", lines("one", "two")),
    ):
        path = tmp_path / f"{name}{suffix}"
        with opener(path, "wt", encoding="utf-8") as handle:
            handle.write(content)
        assert read(path) == ["one", "two"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"a\.json{suffix}: cannot be read"):
        read(path)
    with opener(tmp_path / f"a.jsonl{suffix}", "wt") as handle:
        handle.write(lines("one") + "{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl.*:2: there is no 'text'"):
        check_rows(DataSpec(path=str(tmp_path / f"a.jsonl{suffix}")))


def test_zstandard_is_read_or_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    try:
        import zstandard
    except ModuleNotFoundError:
        path.touch()
        with pytest.raises(UserError, match=r"a\.jsonl\.zst: reading it needs zstandard; install that, or decompress"):
            read(path)
    else:
        path.write_bytes(zstandard.compress(lines("one").encode()))
        assert read(path) == ["one"]


@pytest.mark.parametrize("name", ["A.JSONL", "a.Json", "a.CSV", "a.TXT", "a.Parquet"])
def test_suffixes_in_capitals(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.lower().endswith("parquet"):
        pd.DataFrame([{"text": "one"}]).to_parquet(path)
    else:
        path.write_text({"csv": "text\none\n", "txt": "one"}.get(name.split(".")[1].lower(), lines("one")))
    assert read(path) == ["one"]


def test_several_files_by_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in (("a-1.jsonl", "two"), ("a-0.jsonl", "one"), ("b.jsonl", "no"), ("deep/a-2.jsonl", "three")):
        (tmp_path / name).write_text(lines(text))
    assert read(tmp_path / "a-*.jsonl") == ["one", "two"]
    assert read(tmp_path / "**" / "a-*.jsonl") == ["one", "two", "three"]
    assert read(tmp_path / "a-*.jsonl", max_samples=1) == ["one"]
    with pytest.raises(UserError, match=r"c\*: no file matches this pattern"):
        read(tmp_path / "c*")
    (tmp_path / "a-3.csv").write_text("text\na\n")
    with pytest.raises(UserError, match=r"files of several kinds \(\.csv, \.jsonl\)"):
        read(tmp_path / "a-*")
    (tmp_path / "a-1.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"a-1\.jsonl:1: there is no 'text'"):
        check_rows(DataSpec(path=str(tmp_path / "a-*.jsonl")))


def test_a_file_with_brackets_in_its_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text(lines("one"))
    assert read(tmp_path / "a[1].jsonl") == ["one"]


def test_a_folder_of_shards_has_splits(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    for name, text in (("train-00000-of-00002", "one"), ("train-00001-of-00002", "two"), ("test-00000-of-00001", "no")):
        pd.DataFrame([{"text": text}]).to_parquet(tmp_path / f"{name}.parquet")
    assert read(tmp_path) == ["one", "two"]
    assert read(tmp_path, split="test") == ["no"]
    with pytest.raises(UserError, match="no files of the split 'dev'; there are train, test"):
        read(tmp_path, split="dev")


def test_a_folder_of_other_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(lines(name))
    assert read(tmp_path) == ["a.jsonl", "b.jsonl"]


def test_folders_that_save_to_disk_made(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": "one"}, {"text": "two"}])
    rows.save_to_disk(tmp_path / "plain")
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "plain") == ["one", "two"]
    assert read(tmp_path / "plain", max_samples=1) == ["one"]
    assert read(tmp_path / "splits") == ["one", "two"]
    assert read(tmp_path / "splits", split="test") == ["two"]
    with pytest.raises(UserError, match="no split 'dev'; there are train, test"):
        read(tmp_path / "splits", split="dev")
    with pytest.raises(UserError, match="without splits"):
        read(tmp_path / "plain", split="train")
    (tmp_path / "plain" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="plain: cannot be read as a saved data set"):
        read(tmp_path / "plain")
