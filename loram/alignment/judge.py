"""When alignment probes its student, which checkpoint it keeps, and when it stops."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loram.alignment.probe import Probe
from loram.base import processes
from loram.trainer.adapted import plain_model
from loram.trainer.checkpoints import Checkpoints, reproducible_entries

logger = logging.getLogger(__name__)


def best_step(log: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the first step with the lowest recovered loss in a Trainer's log, or None if there was no probe."""
    probes = reproducible_entries(log, "recovered_loss")
    return min(probes, key=lambda entry: entry["recovered_loss"])["step"] if probes else None


def stale_probes(log: Sequence[Mapping[str, Any]]) -> int:
    """Count the probes after the best one."""
    probes, best = reproducible_entries(log, "recovered_loss"), best_step(log)
    return sum(entry["step"] > best for entry in probes) if best is not None else 0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Probes a student, chooses the checkpoint to keep, and stops the training when it no longer helps.

    Args:
        probe: the probe that the student is judged by.
        every: how many steps there are from one probe to the next.
        patience: stop after this many probes without a new best one.
        checkpoints: the checkpoints of the training; the best one is kept.
    """

    probe: Probe
    every: int
    patience: int
    checkpoints: Checkpoints

    def judge(self, trainer: Trainer) -> dict[str, float]:
        """Probe a Trainer's model, log the losses, and make the Trainer stop if there was no better probe for long."""
        student = plain_model(trainer.accelerator.unwrap_model(trainer.model))
        losses = self.probe.measure(student, trainer.accelerator.autocast)
        entry = processes.broadcast(lambda: dataclasses.asdict(losses))  # GPUs may differ in the last bits
        step, log = trainer.state.global_step, trainer.state.log_history
        if step == 0:
            entry["untuned_loss"] = self.probe.untuned_loss
            logger.info("loss of the full model on the probe's development rows: %.4f", self.probe.untuned_loss)
        trainer.log(dict(entry))
        self.checkpoints.best = best_step(log)
        logger.info(
            "probe at step %d: loss %.4f of the full model with the recovered adapter%s, %.4f of the pruned model with "
            "the adapter, %.4f without it",
            step,
            losses.recovered_loss,
            " (the best so far)" if self.checkpoints.best == step else "",
            losses.adapted_loss,
            losses.student_loss,
        )
        if stale_probes(log) >= self.patience:
            logger.info("stopping: the last %d probes were not better", self.patience)
            trainer.control.should_training_stop = True
        return entry


class Milestones(TrainerCallback):
    """Makes the Trainer probe when it is time, and write a checkpoint with each probe and at the end."""

    def __init__(self, trainer: Trainer, judge: Judge | None) -> None:
        self.trainer, self.judge = trainer, judge

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Probe the student before the first step."""
        if self.judge is not None and state.global_step == 0:
            self.trainer.evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Request a probe or a checkpoint after this step if it is time."""
        last = state.global_step >= state.max_steps
        if self.judge is not None:
            control.should_evaluate = last or state.global_step % self.judge.every == 0
        control.should_save |= last or control.should_evaluate
        control.should_log |= control.should_evaluate
