"""Ctrl-C, SIGTERM and the clock make checkpoints, and the training that goes on from them ends with the same bytes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import contents, stop
from transformers import TrainerCallback

import loram
from loram.cli import _main as command
from loram.trainer import guard

TRAINER: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,  # 20 rows: an epoch is 10 batches and 5 steps
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "logging_steps": 4,
}


class Signals(TrainerCallback):  # type: ignore[misc]
    """Sends signals to this process in a step."""

    def __init__(self, step: int, *signals: int) -> None:
        self.step, self.signals = step, signals

    def on_substep_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Send them in the middle of the step."""
        if state.global_step == self.step - 1:
            for number in self.signals:
                os.kill(os.getpid(), number)


def train(model: Path, out: Path, rows: Path, *callbacks: TrainerCallback, **options: Any) -> Path:
    trainer = {**TRAINER, **options.pop("trainer", {})}
    lora = {"r": 2, "lora_dropout": 0.2}
    return loram.train(model, out, data=rows, lora=lora, trainer=trainer, callbacks=callbacks, **options)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["Ctrl-C", "SIGTERM"]
)
@pytest.mark.parametrize("options", [{}, {"anchor_steps": 8}], ids=["plain", "anchored"])
def test_a_signal_waits_for_the_step_and_its_checkpoint(
    options: dict[str, Any],
    number: int,
    error: type[BaseException],
    pruned_models: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    """Step 3 is within a round of anchors, and no log and no `save_steps` falls on it."""
    model, before = pruned_models["llama"], signal.getsignal(number)
    wanted = contents(train(model, tmp_path / "undisturbed" / "adapter", rows_file, **options))
    out = tmp_path / "stopped" / "adapter"
    with pytest.raises(error) as stopped:
        train(model, out, rows_file, Signals(3, number), **options)
    assert stopped.value.__notes__ == ["the same command continues from checkpoint-3"]
    assert getattr(stopped.value, "code", 143) == 143
    assert [path.name for path in (out.parent / "adapter-checkpoints").iterdir()] == ["checkpoint-3"]
    assert signal.getsignal(number) is before
    assert contents(train(model, out, rows_file, **options)) == wanted


def test_the_second_signal_stops_at_once(pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    signals = Signals(3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(pruned_models["llama"], tmp_path / "adapter", rows_file, signals)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"anchor_steps": 4}], ids=["plain", "anchored"])
def test_steps_that_take_long_are_kept_by_the_clock(
    options: dict[str, Any],
    pruned_models: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pruned_models["mistral"]
    wanted = contents(train(model, tmp_path / "undisturbed" / "adapter", rows_file, **options))
    out = tmp_path / "stopped" / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "CHECKPOINT_SECONDS", 0)
        stop(patch, 15, InterruptedError())
        with pytest.raises(InterruptedError):
            train(model, out, rows_file, **options)
    saved = sorted(path.name for path in (out.parent / "adapter-checkpoints").iterdir())
    assert saved == ["checkpoint-6", "checkpoint-7"]
    assert contents(train(model, out, rows_file, **options)) == wanted


def test_who_wants_no_checkpoints_gets_none(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        train(
            pruned_models["llama"],
            tmp_path / "adapter",
            rows_file,
            Signals(3, signal.SIGINT),
            trainer={"save_strategy": "no"},
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("batch", "how"),
    [(1, "the same command starts over"), (3, "the same command continues from checkpoint-2")],
    ids=["before the first checkpoint", "after it"],
)
def test_a_stopped_command_says_how_to_go_on(
    batch: int,
    how: str,
    pruned_models: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop(monkeypatch, batch, KeyboardInterrupt())
    line = ["train", str(pruned_models["llama"]), str(tmp_path / "out"), "--dataset", str(rows_file)]
    assert command([*line, "--max-steps", "4", "--trainer", "save_steps=1"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"nothing half-written was left behind; {how}")
