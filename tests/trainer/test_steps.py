"""A training that would take no step is refused before it begins, and in the dry run too."""

from pathlib import Path
from typing import Any

import pytest

import loram
from loram.base.errors import UserError
from loram.run.dry_run import dry_run
from loram.run.recipe import Recipe

NO_STEP = [
    ({"max_steps": 0}, "max_steps 0 trains nothing"),
    ({"max_steps": -2}, "max_steps -2 trains nothing"),
    ({"num_train_epochs": 0}, "num_train_epochs 0 trains nothing"),
    ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs 0 trains nothing"),
    (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 21},
        "dataloader_drop_last drops all [0-9]+ rows, since a batch has 21",
    ),
]


@pytest.mark.parametrize(("trainer", "message"), NO_STEP)
@pytest.mark.parametrize("stage", ["train", "align"])
def test_no_step_is_refused(
    stage: str,
    trainer: dict[str, Any],
    message: str,
    pruned_models: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=f"trainer: {message}"):
        getattr(loram, stage)(pruned_models["llama"], tmp_path / "out", data=rows_file, trainer=trainer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("trainer", "message"), NO_STEP)
@pytest.mark.parametrize("stage", ["train", "align"])
def test_the_dry_run_refuses_it_too(
    stage: str, trainer: dict[str, Any], message: str, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    sections = {"train": {"trainer": trainer}, "align": {"dataset": str(rows_file), "trainer": trainer}}
    values = {
        "model_name_or_path": str(tiny_llama),
        "output_dir": str(tmp_path / "out"),
        "dataset": str(rows_file),
        "eval_dataset": str(rows_file),
        "prune": {"ratio": 0.5, "criterion": "random", "keep_first": 2, "keep_last": 1},
        stage: sections[stage],
    }
    with pytest.raises(UserError, match=message):
        dry_run(Recipe.model_validate(values))


def test_packed_rows_are_counted(pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    trainer = {"dataloader_drop_last": True, "per_device_train_batch_size": 4, "packing": True, "max_length": 2048}
    with pytest.raises(UserError, match="drops all 1 rows"):
        loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, trainer=trainer)
