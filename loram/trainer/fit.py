"""Training with transformers' Trainer, as train and align set it up."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from loram.base import processes
from loram.base.progress import training_progress
from loram.base.stopping import Stop
from loram.compute.device import allocate_
from loram.trainer.arguments import checkpoints_activations
from loram.trainer.checkpoints import Checkpoints, reproducible_entries
from loram.trainer.guard import guard_trainer
from loram.trainer.trackers import place_trackers_


def fit_model_(
    kind: type[Trainer],
    model: nn.Module,
    arguments: TrainingArguments,
    *,
    device: torch.device,
    rows: Any,
    collator: Callable[[list[Any]], dict[str, Any]],
    checkpoints: Checkpoints,
    newest: Path | None,
    lean: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **own: Any,
) -> Trainer:
    """Train a model, stop at the first value that is not finite, and save whole checkpoints.

    Ctrl-C and SIGTERM stop it after the step, with a checkpoint, unless the arguments say that none is saved.

    Args:
        kind: the Trainer class.
        model: the model; what requires gradients trains.
        arguments: the Trainer's arguments.
        device: the device that computes.
        rows: the data set.
        collator: makes a batch of rows.
        checkpoints: where checkpoints go.
        newest: the checkpoint to go on from; None to begin.
        lean: on a CPU, spare memory even where activations are not checkpointed.
        callbacks: callbacks of transformers, after ours.
        own: what the class takes beyond transformers' Trainer.

    Returns:
        The Trainer after its last step.

    Raises:
        FloatingPointError: a loss, gradient or weight is not finite; names the step and the tensor.
        MissingGradientError: a parameter that should train gets no gradient; names it.
        KeyboardInterrupt, SystemExit: the training was stopped by Ctrl-C or by SIGTERM.
    """
    use_one_gpu_(arguments, device)
    allocate_(arguments.device, lean=lean or checkpoints_activations(arguments))
    stop = Stop()
    trainer: Trainer = guard_trainer(kind, checkpoints, stop)(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, **own
    )
    for printing in (ProgressCallback, PrinterCallback):  # they print to stdout, which is for results
        trainer.remove_callback(printing)
    for callback in (training_progress(), *callbacks):
        trainer.add_callback(callback)
    if processes.first():
        place_trackers_(trainer, checkpoints.events)
    saves = arguments.save_strategy != SaveStrategy.NO
    # trackers print to stdout
    with stop.listen() if saves else contextlib.nullcontext(), contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    return trainer


def use_one_gpu_(arguments: TrainingArguments, device: torch.device) -> None:
    """Have the Trainer of a single process use one GPU, and no other.

    By itself it takes all GPUs that it sees, the first one in front, multiplies the batch by their number, and gives
    each a part of it (DataParallel).

    Args:
        arguments: the Trainer's arguments.
        device: the device that computes; a GPU without a number is the current one.
    """
    if device.type != "cuda" or processes.count() > 1:
        return
    number: int | None = device.index  # torch declares an int
    device = torch.device("cuda", torch.cuda.current_device() if number is None else number)
    _ = arguments.device  # which sets what is set anew here
    arguments._n_gpu = 1
    vars(arguments)["_setup_devices"] = device  # the cached property behind `device`
    torch.cuda.set_device(device)


def read_state(checkpoint: Path) -> TrainerState:
    """Return the Trainer's state in a checkpoint: its step and its log."""
    state: TrainerState = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state


def is_over(state: TrainerState) -> bool:
    """Return whether a training was stopped after its last step; transformers would take one step more."""
    return state.global_step >= state.max_steps


def losses(state: TrainerState, *kinds: str) -> list[dict[str, Any]]:
    """Return the log entries that hold one of `kinds`, with sorted keys and without what changes with interruptions."""
    return [dict(sorted(entry.items())) for entry in reproducible_entries(state.log_history, *kinds)]
