"""The jobs that each of two processes runs for test_processes.py, one after the other.

torchrun --nproc-per-node 2 tests/trainer/together.py MODEL ROWS OUT
"""

import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import loram
from loram.base import processes
from loram.cli import _main as command

# One process gets twice as many rows per batch. The 20 rows make steps of 8, 8 and 4.
TRAINER: dict[str, Any] = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3}
LORA = {"r": 2, "lora_dropout": 0.0}
ALIGN: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}


class Stop(TrainerCallback):  # type: ignore[misc]
    """Stops a training in its fourth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Raise in the fourth step."""
        if state.global_step == 4:
            raise InterruptedError


def work(model: Path, rows: Path, out: Path) -> None:
    """Make each folder that the tests compare."""
    batch = {"per_device_train_batch_size": 4 // processes.count()}
    trainer = {**TRAINER, **batch}

    def train(name: str, **options: Any) -> None:
        options["trainer"] = {**trainer, **options.get("trainer", {})}
        loram.train(model, out / name, data=rows, lora=LORA, **options)

    train("plain")
    train("anchored", anchor_steps=2)
    train("streamed", engine="streamed")
    try:
        train("resumed", trainer={"save_steps": 3}, callbacks=[Stop()])
    except InterruptedError:
        assert (out / "resumed-checkpoints" / "checkpoint-3").is_dir()
        assert not (out / "resumed").exists()
    train("resumed", trainer={"save_steps": 3})
    loram.align(model, out / "aligned", data=rows, eval_steps=2, probe_steps=2, trainer={**ALIGN, **batch})
    flags = {"--max-steps": 2, "--per-device-train-batch-size": 4 // processes.count(), "--lora-dropout": 0}
    line = ["train", model, out / "commanded", "--dataset", rows, *(part for flag in flags.items() for part in flag)]
    assert command([str(part) for part in line]) == 0


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
