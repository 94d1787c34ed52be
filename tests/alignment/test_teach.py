"""The teacher cache has the full model's predictions of each row; `teach` resumes, but not with other settings."""

import filecmp
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import loram
from loram import cli
from loram.alignment.teacher import TeacherCache
from loram.data.spec import DataSpec
from loram.data.tokens import load_rows, tokenize
from loram.disk.artifacts import find_manifest

MODULE = importlib.import_module("loram.alignment.teach")  # `loram.teach` is the function
OPTIONS: dict[str, Any] = {"top_k": 5, "part_tokens": 150}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_has_what_the_whole_model_says(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    loram.teach(tiny_models[family], tmp_path / "cache", data=rows_file, **OPTIONS)
    cache = TeacherCache(tmp_path / "cache")
    assert len(cache.info.part_rows) > 1
    tokenizer = AutoTokenizer.from_pretrained(tiny_models[family])
    rows = tokenize(load_rows(DataSpec(path=str(rows_file))), tokenizer, 512).rows
    assert len(cache) == len(rows)
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family]).eval()
    for number, row in enumerate(rows):
        taught = cache[number]
        assert taught.input_ids.tolist() == row["input_ids"]
        assert taught.labels.tolist() == row["labels"]
        with torch.inference_mode():
            log_probs = model(taught.input_ids[None]).logits[0].log_softmax(-1)[:-1][taught.labels[1:] != -100]
        best = log_probs.topk(5)
        assert torch.equal(taught.ids, best.indices)
        torch.testing.assert_close(taught.log_probs, best.values, rtol=1e-3, atol=1e-3)  # stored in float16
        rest = log_probs.scatter(1, best.indices, -torch.inf).logsumexp(1)
        torch.testing.assert_close(taught.log_rest, rest, rtol=1e-3, atol=1e-3)


def test_the_cache_is_compact_and_whole(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    loram.teach(tiny_llama, tmp_path / "cache", data=rows_file, top_k=5)
    tensors = load_file(tmp_path / "cache" / "part-00000.safetensors")
    assert (tensors["ids"].dtype, tensors["log_probs"].dtype) == (torch.uint16, torch.float16)
    assert find_manifest(tmp_path / "cache") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_of_a_text_every_token_but_the_first_of_a_piece_is_taught(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one plus two is three. " * 20)
    loram.teach(tiny_llama, tmp_path / "cache", data=tmp_path / "text.txt", top_k=3, max_length=50)
    cache = TeacherCache(tmp_path / "cache")
    assert [len(cache[row].ids) for row in range(len(cache))] == [
        len(cache[row].input_ids) - 1 for row in range(len(cache))
    ]
    with pytest.raises(IndexError):
        cache[len(cache)]


def stop_at(part: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Press Ctrl-C when a part (counted from 1) is half written; returns the list of the parts that are written."""
    calls: list[str] = []
    write = MODULE.write_part

    def write_or_stop(path: Path, *arguments: Any) -> None:
        calls.append(path.name)
        if len(calls) == part:
            path.write_text("half")
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(MODULE, "write_part", write_or_stop)
    return calls


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loram.teach(tiny_llama, tmp_path / "whole", data=rows_file, **OPTIONS)
    calls = stop_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        loram.teach(tiny_llama, tmp_path / "cache", data=rows_file, **OPTIONS)
    assert not (tmp_path / "cache").exists()
    loram.teach(tiny_llama, tmp_path / "cache", data=rows_file, **OPTIONS)
    parts = [path.name for path in (tmp_path / "whole").glob("part-*")]
    assert len(calls) == 3 + len(parts) - 2  # the first two parts were not written again
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert filecmp.cmpfiles(tmp_path / "whole", tmp_path / "cache", files, shallow=False) == (files, [], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "whole"]


def test_going_on_with_other_settings_is_refused(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        loram.teach(tiny_llama, tmp_path / "cache", data=rows_file, **OPTIONS)
    with pytest.raises(loram.UserError, match=r"cache-parts: was begun with other settings \(top_k: "):
        loram.teach(tiny_llama, tmp_path / "cache", data=rows_file, **{**OPTIONS, "top_k": 4})


def test_stopped_before_the_first_part_nothing_is_left(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        loram.teach(tiny_llama, tmp_path / "cache", data=rows_file, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k 0: must lie between 1 and the vocabulary's 320 tokens"),
        ({"top_k": 321}, "top_k 321"),
        ({"part_tokens": 0}, "part_tokens 0"),
        ({"max_length": 1}, "max_length 1"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, int], message: str, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match=message):
        loram.teach(tiny_llama, tmp_path / "cache", data=rows_file, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_cache(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match=r"no teacher\.json here"):
        TeacherCache(tiny_llama)
    loram.teach(tiny_llama, tmp_path / "cache", data=rows_file, **OPTIONS)
    (tmp_path / "cache" / "teacher.json").write_text("{}")
    with pytest.raises(loram.UserError, match=r"teacher\.json: not a valid description"):
        TeacherCache(tmp_path / "cache")


def test_the_command(tiny_llama: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "cache")
    assert cli._main(["teach", str(tiny_llama), out, "--dataset", str(rows_file), "--top-k", "3"]) == 0
    assert capsys.readouterr().out == f"{out}: teacher cache written\n"
    assert TeacherCache(tmp_path / "cache").info.top_k == 3
