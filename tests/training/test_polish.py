"""Polishing is the streamed engine with a few steps: it lowers the full model's loss, and it can be interrupted."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import random_adapter
from helpers import Stopped, contents, stop
from safetensors.torch import load_file

import loram
from loram.base.errors import UserError
from loram.compute.loading import load_model
from loram.disk.opening import open_model
from loram.run.pipeline import run
from loram.run.recipe import Recipe
from loram.training.options import PolishOptions
from loram.training.polish import polish

OPTIONS = PolishOptions(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2)


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    return random_adapter(load_model(open_model(tiny_llama)), tmp_path / "adapter")


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_it_lowers_the_full_models_loss_and_goes_on_after_a_stop(
    tiny_llama: Path, adapter: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = contents(polish(tiny_llama, adapter, tmp_path / "wanted", data=rows_file, options=OPTIONS))
    before, after = (
        loram.evaluate(tiny_llama, adapter=folder, data=rows_file).loss for folder in (adapter, tmp_path / "wanted")
    )
    assert after < before - 0.05
    assert [entry["step"] for entry in log(tmp_path / "wanted")] == [1, 2, 3]
    assert log(tmp_path / "wanted")[0]["learning_rate"] == 1e-2
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "wanted"))
    assert {name: tensor.shape for name, tensor in old.items()} == {name: new[name].shape for name in new}
    stop(monkeypatch, 3, Stopped())
    with pytest.raises(Stopped):
        polish(tiny_llama, adapter, tmp_path / "out", data=rows_file, options=OPTIONS)
    assert (tmp_path / "out-checkpoints" / "checkpoint-2").is_dir()
    monkeypatch.undo()
    assert contents(polish(tiny_llama, adapter, tmp_path / "out", data=rows_file, options=OPTIONS)) == wanted
    assert not list(tmp_path.glob("*-checkpoints"))


def test_what_cannot_be_polished_is_refused(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
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
    perplexities = {row.name: row.perplexity["eval"] for row in report.rows}
    assert perplexities["polished"] < perplexities["recovered"]
    polished = log(tmp_path / "run" / "polished")
    assert polished[0]["learning_rate"] == 1e-2  # the learning rate of the training
    assert report.kept_gain is not None
    gain = math.log(perplexities["base"] / perplexities["polished"]) / math.log(
        perplexities["base"] / perplexities["full LoRA"]
    )
    assert report.kept_gain["eval"] == pytest.approx(gain)
    with pytest.raises(UserError, match="polish"):
        run(Recipe.model_validate({**values, "polish": {"max_steps": 3}}))  # the folder was made with other settings
