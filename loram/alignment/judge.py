"""When a student is probed, which of its checkpoints is kept, and when alignment stops."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from loram.alignment.probe import Probe
from loram.base import processes
from loram.trainer.checkpoints import Checkpoints, lasting

logger = logging.getLogger(__name__)


def best_step(log: Sequence[Mapping[str, Any]]) -> int | None:
    """The first step with the least recovered loss in a Trainer's log; None where nothing was probed."""
    probes = lasting(log, "recovered_loss")
    return min(probes, key=lambda entry: entry["recovered_loss"])["step"] if probes else None


def stale_probes(log: Sequence[Mapping[str, Any]]) -> int:
    """How many probes have been made since the best one."""
    probes, best = lasting(log, "recovered_loss"), best_step(log)
    return sum(entry["step"] > best for entry in probes) if best is not None else 0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Probes a student and draws the consequences.

    Args:
        probe: how it is judged.
        every: steps from probe to probe.
        patience: stop after so many probes without a new best one.
        checkpoints: told which one to keep.
    """

    probe: Probe
    every: int
    patience: int
    checkpoints: Checkpoints

    def judge(self, trainer: Any) -> dict[str, float]:
        """Probe a Trainer's model and log what was found; the Trainer is told to stop where patience is at an end."""
        found = self.probe.measure(trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.autocast)
        entry = processes.broadcast(lambda: dataclasses.asdict(found))  # for GPUs the same is not always quite the same
        step, log = trainer.state.global_step, trainer.state.log_history
        if step == 0:
            entry["untuned_loss"] = self.probe.untuned_loss
            logger.info("the full model's loss on the probe's development rows: %.4f", self.probe.untuned_loss)
        trainer.log(dict(entry))
        self.checkpoints.best = best_step(log)
        logger.info(
            "probe at step %d: full model with the recovered adapter %.4f%s; pruned model with it %.4f, without %.4f",
            step,
            found.recovered_loss,
            " (the best so far)" if self.checkpoints.best == step else "",
            found.adapted_loss,
            found.student_loss,
        )
        if stale_probes(log) >= self.patience:
            logger.info("stopping: no better probe in the last %d", self.patience)
            trainer.control.should_training_stop = True
        return entry


class Milestones(TrainerCallback):  # type: ignore[misc]
    """Has probes made where they are due, and a checkpoint written with each and at the end."""

    def __init__(self, trainer: Any, judge: Judge | None) -> None:
        self.trainer, self.judge = trainer, judge

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Probe the student as it came."""
        if self.judge is not None and state.global_step == 0:
            self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Ask for what is due after this step."""
        last = state.global_step >= state.max_steps
        if self.judge is not None:
            control.should_evaluate = last or state.global_step % self.judge.every == 0
        control.should_save |= last or control.should_evaluate
