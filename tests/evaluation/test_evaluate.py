"""The perplexity is that of the labelled tokens, however they are batched; what does not fit is refused."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ROWS, make_model, random_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

import loram
from loram.compute import likelihood, resident
from loram.data.spec import DataSpec
from loram.data.tokens import load_rows, tokenize


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_equals_row_by_row_losses_weighted_by_tokens(
    family: str, tiny_models: dict[str, Path], rows_file: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family]).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models[family])
    rows = tokenize(load_rows(DataSpec(path=str(rows_file))), tokenizer, 1024).rows
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        tokens = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            loss = model(torch.tensor([row["input_ids"]]), labels=labels).loss.item()
        total, count = total + loss * tokens, count + tokens
    report = loram.evaluate(tiny_models[family], data=rows_file)
    assert report.tokens == count
    assert report.loss == pytest.approx(total / count, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert report.rows == len(ROWS)
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_batching_changes_nothing(tiny_llama: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = loram.evaluate(tiny_llama, data=rows_file)
    monkeypatch.setattr(likelihood, "_LOGITS_BYTES", 1)
    alone = loram.evaluate(tiny_llama, data=rows_file)
    assert alone.loss == pytest.approx(together.loss, rel=1e-6)


def test_text_counts_every_token_but_the_first_of_each_piece(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one plus two is three. " * 40)
    tokens = len(AutoTokenizer.from_pretrained(tiny_llama)(text.read_text())["input_ids"]) + 1
    report = loram.evaluate(tiny_llama, data=text, max_length=50)
    assert report.rows == math.ceil(tokens / 50)
    assert report.tokens == tokens - report.rows
    assert loram.evaluate(tiny_llama, data=text, max_length=50, max_samples=3).rows == 3


def test_max_samples_takes_the_first_rows(tiny_llama: Path, rows_file: Path, jsonl: Callable[..., Path]) -> None:
    limited = loram.evaluate(tiny_llama, data=rows_file, max_samples=3)
    assert limited.loss == pytest.approx(loram.evaluate(tiny_llama, data=jsonl(*ROWS[:3])).loss, rel=1e-6)


def test_merged_folder_equals_base_with_adapter(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    loram.train(tiny_llama, tmp_path / "adapter", data=rows_file, trainer={"max_steps": 3, "learning_rate": 1e-2})
    loram.merge(tiny_llama, tmp_path / "adapter", tmp_path / "merged")
    merged = loram.evaluate(tmp_path / "merged", data=rows_file).loss
    assert merged == pytest.approx(
        loram.evaluate(tiny_llama, adapter=tmp_path / "adapter", data=rows_file).loss, rel=1e-5
    )
    assert merged != pytest.approx(loram.evaluate(tiny_llama, data=rows_file).loss, rel=1e-5)


def assert_streaming_changes_nothing(model: Path, **options: Any) -> None:
    in_memory, streamed = (loram.evaluate(model, stream=stream, **options) for stream in (False, True))
    assert streamed.loss == pytest.approx(in_memory.loss, rel=1e-5)
    assert streamed.perplexity == pytest.approx(in_memory.perplexity, rel=1e-4)
    same = {"loss", "perplexity"}
    assert streamed.model_dump(exclude=same) == in_memory.model_dump(exclude=same)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_changes_nothing(
    family: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    base, pruned, adapter = tiny_models[family], pruned_models[family], tmp_path / "adapter"
    random_adapter(loram.load_pruned(pruned), adapter)
    loram.PruningPlan.load(pruned).save(adapter)
    loram.recover(adapter, tmp_path / "recovered")
    assert_streaming_changes_nothing(base, data=rows_file)
    assert_streaming_changes_nothing(base, adapter=tmp_path / "recovered", data=rows_file)
    assert_streaming_changes_nothing(pruned, data=rows_file)
    assert_streaming_changes_nothing(pruned, adapter=adapter, data=rows_file)


def test_streaming_changes_nothing_of_a_trained_adapter_and_a_cut_text(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one plus two is three. " * 40)
    options = {"data": text, "max_length": 50, "max_samples": 5}
    assert_streaming_changes_nothing(run / "pruned", adapter=run / "adapter", **options)
    with_adapter = loram.evaluate(run / "pruned", adapter=run / "adapter", stream=True, **options)
    assert with_adapter.loss != loram.evaluate(run / "pruned", stream=True, **options).loss


def test_streaming_refuses_what_evaluation_refuses(run: Path, tiny_llama: Path, rows_file: Path) -> None:
    with pytest.raises(loram.UserError, match="run `loram recover` on it first"):
        loram.evaluate(tiny_llama, adapter=run / "adapter", data=rows_file, stream=True)


def test_streaming_never_builds_the_model(tiny_llama: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(resident, "load_model")
    assert loram.evaluate(tiny_llama, data=rows_file, stream=True).rows == len(ROWS)
    with pytest.raises(NameError):
        loram.evaluate(tiny_llama, data=rows_file)


@pytest.fixture(scope="module")
def run(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    loram.prune(tiny_llama, root / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    loram.train(root / "pruned", root / "adapter", data=rows_file, trainer={"max_steps": 1})
    loram.recover(root / "adapter", root / "recovered")
    return root


def test_unrecovered_adapter_on_the_full_base_is_refused(run: Path, tiny_llama: Path, rows_file: Path) -> None:
    with pytest.raises(loram.UserError, match="run `loram recover` on it first"):
        loram.evaluate(tiny_llama, adapter=run / "adapter", data=rows_file)


def test_recovered_adapter_on_the_pruned_model_is_refused(run: Path, rows_file: Path) -> None:
    with pytest.raises(loram.UserError, match="is recovered; use it on the full model"):
        loram.evaluate(run / "pruned", adapter=run / "recovered", data=rows_file)


def test_adapter_of_another_base_is_refused(run: Path, rows_file: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "pruned")
    other = make_model(tmp_path / "other", "llama", tokenizer, seed=1)  # same shapes, other weights
    with pytest.raises(loram.UserError, match="fingerprint"):
        loram.evaluate(other, adapter=run / "recovered", data=rows_file)


def test_adapter_of_another_plan_is_refused(run: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    loram.prune(tiny_llama, tmp_path / "pruned", ratio=0.5, criterion="random", keep_first=1, keep_last=1)
    with pytest.raises(loram.UserError, match="plans differ"):
        loram.evaluate(tmp_path / "pruned", adapter=run / "adapter", data=rows_file)


def test_a_base_saved_in_shards_by_another_tool_is_the_same_base(
    run: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for path in tiny_llama.glob("*token*"):
        shutil.copy(path, tmp_path / "sharded")
    shutil.copy(tiny_llama / "chat_template.jinja", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    found = loram.evaluate(tmp_path / "sharded", adapter=run / "recovered", data=rows_file)
    assert found.loss == loram.evaluate(tiny_llama, adapter=run / "recovered", data=rows_file).loss
