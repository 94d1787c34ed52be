"""What can be wrong with files that users bring: each fault is one clear line, and nothing is written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, random_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loram
from loram.model.adapter import load_for
from loram.model.checkpoint import Checkpoint

LAYERS = {"keep_first": 2, "keep_last": 1}  # layers 2 and 3 of 5 are pruned
STEP = {"max_steps": 1, "learning_rate": 1e-2}
WHOLE = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1]}  # left whole: fits pruned and full


@pytest.fixture(scope="module")
def run(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a pruned folder, an adapter on each, and the recovered one; the adapters fit both by their shapes."""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_llama, root / "base")
    loram.prune(root / "base", root / "pruned", ratio=0.5, criterion="magnitude", **LAYERS)
    loram.train(root / "base", root / "plain", data=rows_file, lora=WHOLE, trainer=STEP)
    loram.train(root / "pruned", root / "adapter", data=rows_file, lora=WHOLE, trainer=STEP)
    loram.recover(root / "adapter", root / "recovered")
    return root


def shifted(folder: Path) -> Path:
    """Change a weight of a model in every row, as more training would."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def both_fingerprints(one: Path, other: Path) -> str:
    return rf"{Checkpoint(one).fingerprint[:12]} instead of {Checkpoint(other).fingerprint[:12]}"


# Fingerprints


@pytest.mark.parametrize("adapter", ["plain", "recovered", "adapter"])
def test_an_adapter_on_another_base_of_the_same_shape(
    adapter: str, run: Path, rows_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", "llama", tokenizer, seed=1)
    with pytest.raises(loram.UserError, match=both_fingerprints(other, run / "base")):
        loram.merge(other, run / adapter, tmp_path / "merged")
    with pytest.raises(loram.UserError, match=both_fingerprints(other, run / "base")):
        loram.evaluate(other, adapter=run / adapter, data=rows_file)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("adapter", ["plain", "recovered"])
def test_an_adapter_on_another_revision_of_its_base(adapter: str, run: Path, tmp_path: Path) -> None:
    other = shifted(shutil.copytree(run / "base", tmp_path / "other"))
    with pytest.raises(loram.UserError, match=both_fingerprints(other, run / "base")):
        loram.merge(other, run / adapter, tmp_path / "merged")


def test_an_adapter_on_pruned_weights_that_changed_under_the_same_plan(run: Path, tmp_path: Path) -> None:
    other = shifted(shutil.copytree(run / "pruned", tmp_path / "other"))
    with pytest.raises(loram.UserError, match=both_fingerprints(other, run / "pruned")):
        loram.merge(other, run / "adapter", tmp_path / "merged")


def test_an_adapter_of_the_full_model_on_the_pruned_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match=both_fingerprints(run / "pruned", run / "base")):
        loram.merge(run / "pruned", run / "plain", tmp_path / "merged")


def test_an_unrecovered_adapter_on_the_full_model_though_its_shapes_fit(run: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match="run `loram recover`"):
        loram.merge(run / "base", run / "adapter", tmp_path / "merged")


def test_a_recovered_adapter_on_the_pruned_model_though_its_shapes_fit(run: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match="is recovered; use it on the full model"):
        loram.merge(run / "pruned", run / "recovered", tmp_path / "merged")


def test_the_right_pairs_go_together(run: Path, tmp_path: Path) -> None:
    for base, adapter in (("base", "plain"), ("base", "recovered"), ("pruned", "adapter")):
        assert load_for(Checkpoint(run / base), run / adapter).modules


def test_recover_with_the_plan_of_another_pruning(run: Path, tmp_path: Path) -> None:
    loram.prune(run / "base", tmp_path / "pruned", ratio=0.5, criterion="random", **LAYERS)
    foreign = random_adapter(loram.load_pruned(run / "pruned"), tmp_path / "foreign")  # names the folder it was made on
    shutil.copy(tmp_path / "pruned" / "loram_plan.json", foreign)
    with pytest.raises(loram.UserError, match=r"loram_plan\.json: not the plan of .*copy that one"):
        loram.recover(foreign, tmp_path / "out")
    shutil.copy(run / "pruned" / "loram_plan.json", foreign)
    loram.recover(foreign, tmp_path / "out")


def test_recover_of_an_adapter_of_the_full_model_with_a_plan_copied_beside_it(run: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(run / "plain", tmp_path / "plain")
    shutil.copy(run / "pruned" / "loram_plan.json", plain)
    with pytest.raises(loram.UserError, match="not the plan that the adapter was trained with"):
        loram.recover(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()
