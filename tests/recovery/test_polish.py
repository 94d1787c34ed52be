"""Polishing has the whole model's gradients, writes a stock PEFT adapter, and an interruption changes nothing."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, random_adapter
from helpers import contents
from loram.recovery.polish import LOG_NAME, polish
from peft import PeftModel

import loram
from loram.base.errors import UserError
from loram.compute.belonging import load_for
from loram.compute.loading import load_model
from loram.compute.loss import use_chunked_loss_
from loram.disk.opening import open_model
from loram.recovery.options import PolishOptions
from loram.run.pipeline import run
from loram.run.recipe import Recipe

IDS = [[5, 9, 40, 7, 77, 30, 8], [6, 3, 12], [90, 91, 4, 4, 17]]
ROWS = (IDS, [[-100, -100, *IDS[0][2:]], *IDS[1:]])
stage = importlib.import_module("loram.recovery.polish")
OPTIONS = PolishOptions(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2)


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    return random_adapter(load_model(open_model(tiny_llama)), tmp_path / "adapter")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_model(tiny_models[family])
    folder = random_adapter(load_model(checkpoint), tmp_path / "adapter")
    loaded = load_for(checkpoint, folder)
    loss = stage._differentiate_(checkpoint, loaded, ROWS, torch.device("cpu"))

    base: Any = load_model(checkpoint)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    use_chunked_loss_(base)
    width = max(map(len, ROWS[0]))
    ids, labels = (
        torch.tensor([row + [fill] * (width - len(row)) for row in part])
        for part, fill in zip(ROWS, (0, -100), strict=True)
    )
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ROWS[0]])
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    compared = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".layers." in name:
            found = loaded.tensors[name.replace(".default", "")].grad
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == 2 * len(checkpoint.architecture.linears) * checkpoint.geometry.num_hidden_layers


def test_it_lowers_the_full_models_loss_and_stays_stock_peft(
    tiny_llama: Path, adapter: Path, rows_file: Path, tmp_path: Path
) -> None:
    polish(tiny_llama, adapter, tmp_path / "out", data=rows_file, options=OPTIONS)
    before, after = (
        loram.evaluate(tiny_llama, adapter=folder, data=rows_file).loss for folder in (adapter, tmp_path / "out")
    )
    assert after < before - 0.05
    log = [json.loads(line) for line in (tmp_path / "out" / "polish_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert log[0]["learning_rate"] == 1e-2
    assert not list(tmp_path.glob("*-checkpoints"))


def test_resumed_is_the_same_as_undisturbed(
    tiny_llama: Path, adapter: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = contents(polish(tiny_llama, adapter, tmp_path / "wanted", data=rows_file, options=OPTIONS))
    real, calls = stage._differentiate_, 0

    def stopping(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(stage, "_differentiate_", stopping)
    with pytest.raises(KeyboardInterrupt):
        polish(tiny_llama, adapter, tmp_path / "out", data=rows_file, options=OPTIONS)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(stage, "_differentiate_", real)
    found = contents(polish(tiny_llama, adapter, tmp_path / "out", data=rows_file, options=OPTIONS))
    assert found == wanted


def test_what_cannot_be_polished_is_refused(
    tiny_llama: Path, pruned_models: dict[str, Path], adapter: Path, rows_file: Path, tmp_path: Path
) -> None:
    loram.train(pruned_models["llama"], tmp_path / "trained", data=rows_file, trainer={"max_steps": 1})
    with pytest.raises(UserError, match="loram recover"):
        polish(tiny_llama, tmp_path / "trained", tmp_path / "out", data=rows_file)
    with pytest.raises(UserError, match="max_steps is 0"):
        PolishOptions.of(max_steps=0)
    assert not (tmp_path / "out").exists()


def test_a_recipe_polishes_what_was_recovered(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model_name_or_path": str(tiny_llama),
        "output_dir": tmp_path / "run",
        "dataset": str(rows_file),
        "eval_dataset": {"path": str(rows_file), "max_samples": 8},
        "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
        "train": {"anchor_steps": 1, "trainer": {"max_steps": 2, "learning_rate": 1e-2}},
        "polish": {"max_steps": 2, "per_device_train_batch_size": 4},
        "evaluate": {"full_lora": True},
    }
    report = run(Recipe.model_validate(values))
    found = {row.name: row.perplexity["eval"] for row in report.rows}
    assert found["polished"] < found["recovered"]
    log = (tmp_path / "run" / "polished" / LOG_NAME).read_text().splitlines()
    assert json.loads(log[0])["learning_rate"] == 1e-2  # the learning rate of the training
    assert report.kept_gain is not None
    gain = math.log(found["base"] / found["polished"]) / math.log(found["base"] / found["full LoRA"])
    assert report.kept_gain["eval"] == pytest.approx(gain)
    with pytest.raises(UserError, match="polish"):
        run(Recipe.model_validate({**values, "polish": {"max_steps": 3}}))  # the folder was made with other settings
