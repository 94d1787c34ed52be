"""The corrections at recovery: EMLoC's formula does what it promises, and development rows choose the multiplier."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loram
from loram.base.errors import UserError
from loram.disk.adapter import Adapter
from loram.disk.artifacts import find_manifest
from loram.recovery.correct import LIMIT, MULTIPLIERS, correct_factors

SCALING = 2.0


@pytest.fixture
def factors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 12), torch.randn(10, 4)


def test_without_a_change_the_update_stays(factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = factors
    directions, fixed = correct_factors(a, b, torch.zeros(10, 12), SCALING)
    torch.testing.assert_close(fixed @ directions, b @ a)
    torch.testing.assert_close(directions @ directions.T, torch.eye(4))


def test_the_full_model_does_to_the_adapters_inputs_what_the_changed_one_did(
    factors: tuple[torch.Tensor, torch.Tensor],
) -> None:
    a, b = factors
    full = torch.randn(10, 12)
    changed = full + 0.1 * torch.randn(10, 12)
    directions, fixed = correct_factors(a, b, full - changed, SCALING)
    inputs = torch.randn(5, 4) @ a  # inputs in the span of the rows of lora_A
    wanted = inputs @ (changed + SCALING * b @ a).T
    torch.testing.assert_close(inputs @ (full + SCALING * fixed @ directions).T, wanted, rtol=1e-4, atol=1e-4)


def test_the_correction_of_a_rank_is_at_most_so_large(factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = factors
    directions, fixed = correct_factors(a, b, 1000 * torch.randn(10, 12), SCALING)
    uncorrected = b @ a @ directions.T
    size = (fixed - uncorrected).abs().mean(0)
    torch.testing.assert_close(size, LIMIT * uncorrected.abs().mean(0))


@pytest.fixture(scope="module")
def run(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model, its weights changed by alignment, and an adapter trained on those."""
    root = tmp_path_factory.mktemp("correct")
    loram.prune(tiny_llama, root / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    trainer = {"max_steps": 2, "learning_rate": 1e-2, "max_length": 32}
    loram.align(root / "pruned", root / "aligned", data=rows_file, probe=False, trainer=trainer)
    loram.train(root / "aligned", root / "adapter", data=rows_file, trainer=trainer)
    return root


def update(folder: Path, module: str) -> torch.Tensor:
    return Adapter.load(folder).delta(module)


def test_recovery_corrects_the_kept_part_alone(run: Path, tmp_path: Path) -> None:
    loram.recover(run / "adapter", tmp_path / "plain")
    loram.recover(run / "adapter", tmp_path / "corrected", correct=True)
    module = "model.layers.1.mlp.up_proj"
    plain, fixed = update(tmp_path / "plain", module), update(tmp_path / "corrected", module)
    assert not torch.allclose(plain, fixed, atol=1e-6)
    kept = plain.abs().sum(1) > 0
    assert 0 < kept.sum() < len(kept)
    assert not fixed[~kept].any()
    untouched = "lm_head"  # it was not trained, so it is not in the adapter
    assert untouched not in Adapter.load(tmp_path / "corrected").modules


def test_nothing_is_corrected_where_nothing_changed(run: Path, rows_file: Path, tmp_path: Path) -> None:
    loram.train(run / "pruned", tmp_path / "adapter", data=rows_file, trainer={"max_steps": 2, "learning_rate": 1e-2})
    for name, correct in (("plain", False), ("corrected", True)):
        loram.recover(tmp_path / "adapter", tmp_path / name, correct=correct)
    for module in Adapter.load(tmp_path / "plain").modules:
        found, wanted = (update(tmp_path / name, module) for name in ("corrected", "plain"))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_4_bits_are_a_change(run: Path, rows_file: Path, tmp_path: Path) -> None:
    trainer = {"max_steps": 2, "learning_rate": 1e-2}
    loram.train(run / "pruned", tmp_path / "adapter", data=rows_file, trainer=trainer, load_in_4bit=True)
    for name, correct in (("plain", False), ("corrected", True)):
        loram.recover(tmp_path / "adapter", tmp_path / name, correct=correct)
    module = "model.layers.1.mlp.up_proj"
    assert not torch.allclose(update(tmp_path / "plain", module), update(tmp_path / "corrected", module), atol=1e-6)


def test_the_multiplier_is_the_best_on_the_development_rows(
    run: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    loram.recover(run / "adapter", tmp_path / "plain")
    loram.recover(run / "adapter", tmp_path / "scaled", dev_data={"path": str(rows_file), "max_samples": 8})
    manifest = find_manifest(tmp_path / "scaled")
    assert manifest is not None
    losses = {float(factor): loss for factor, loss in manifest.settings["dev_losses"].items()}
    best = manifest.settings["multiplier"]
    assert list(losses) == list(MULTIPLIERS)
    assert losses[best] == min(losses.values())
    module = "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(update(tmp_path / "scaled", module), best * update(tmp_path / "plain", module))
    for name, factor in (("plain", 1.0), ("scaled", best)):
        found = loram.evaluate(tiny_llama, adapter=tmp_path / name, data=rows_file, max_samples=8)
        assert found.loss == pytest.approx(losses[factor], abs=1e-5)


def test_another_pruned_model_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pruned"):
        loram.recover(run / "adapter", tmp_path / "out", correct=True, pruned=run / "pruned")
    assert not (tmp_path / "out").exists()


def test_a_recipe_corrects_and_scales(run: Path, rows_file: Path, tmp_path: Path) -> None:
    from loram.run.pipeline import run as run_recipe
    from loram.run.recipe import Recipe

    values: dict[str, Any] = {
        "model_name_or_path": str(run / "aligned"),
        "output_dir": tmp_path / "run",
        "dataset": str(rows_file),
        "eval_dataset": {"path": str(rows_file), "max_samples": 4},
        "train": {"trainer": {"max_steps": 2}},
        "recover": {"correct": True, "dev_dataset": {"path": str(rows_file), "max_samples": 4}},
    }
    run_recipe(Recipe.model_validate(values))
    manifest = find_manifest(tmp_path / "run" / "recovered")
    assert manifest is not None
    assert manifest.settings["correct"] is True
    assert manifest.settings["multiplier"] in MULTIPLIERS


def test_an_adapter_without_a_word_on_its_model_asks_for_it(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "adapter"
    bare.mkdir()
    for path in (run / "adapter").iterdir():
        if path.name == "adapter_config.json":
            text = path.read_text().replace(str(run / "aligned"), "")
            (bare / path.name).write_text(text)
        elif path.name == "adapter_model.safetensors":
            save_file(load_file(path), bare / path.name)
        elif path.name == "loram_plan.json":
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="--pruned"):
        loram.recover(bare, tmp_path / "out", correct=True)
    loram.recover(bare, tmp_path / "out", correct=True, pruned=run / "aligned")
