"""What a tracker writes stays, and one that cannot write is refused before a model is loaded."""

import importlib.util
import logging
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

import loram
from loram import cli
from loram.trainer import trackers


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_what_a_tracker_writes_stays_in_the_folder_that_is_named(
    tracker: str,
    tiny_llama: Path,
    rows_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", tmp_path), ("TRACKIO_DIR", tmp_path / "trackio")):
        monkeypatch.setenv(name, str(value))  # before the tracker is imported
    caplog.set_level(logging.INFO, "loram")
    trainer = {"report_to": tracker, "max_steps": 1, "logging_steps": 1}
    loram.train(tiny_llama, tmp_path / "out", data=rows_file, trainer=trainer)
    (place,) = re.findall(rf"{tracker} writes to ([^\s,]+)", caplog.text)
    assert tmp_path in Path(place).parents
    assert any(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    assert not capsys.readouterr().out


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_trained(
    tiny_llama: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["mlflow"])
    monkeypatch.setattr("loram.training.train.trainable_model", None)
    line = ["train", str(tiny_llama), str(tmp_path / "out"), "--dataset", str(rows_file), "--report-to", "tensorboard"]
    assert cli._main(line) == 2
    assert "report_to is tensorboard, which is not installed: pip install tensorboard" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_would_write_among_the_checkpoints_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["codecarbon"])
    with pytest.raises(loram.UserError, match="codecarbon monitor"):
        trackers.check_trackers(TrainingArguments(report_to="codecarbon", use_cpu=True), "train")
