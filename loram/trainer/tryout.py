"""Make what the Trainer makes of its arguments, so that what cannot work is refused before a model is loaded."""

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import trainer_log_levels

from loram.base.errors import UserError
from loram.trainer.arguments import as_user_error
from loram.trainer.trackers import check_trackers

_OF_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimisers that are made for a model's own layers


def try_out(arguments: TrainingArguments, stage: str) -> None:
    """Make the optimiser and its schedule for one number, and the loader of batches, and look for the log's tools.

    Args:
        arguments: the Trainer's arguments.
        stage: what the error begins with.

    Raises:
        UserError: what the first of them says.
    """
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if arguments.optim_target_modules and not optimizer.startswith(_OF_THE_MODEL):
        raise UserError(f"trainer: optim_target_modules does nothing with optim {optimizer}; leave it out")
    for key in ("log_level", "log_level_replica"):
        if (level := getattr(arguments, key)) not in trainer_log_levels:
            raise UserError(f"trainer: {key} is {level!r}; known are {', '.join(trainer_log_levels)}")
    try:
        _make_optimizer(arguments, of_the_model=optimizer.startswith(_OF_THE_MODEL))
        DataLoader[Any](
            TensorDataset(torch.zeros(1)),
            num_workers=arguments.dataloader_num_workers,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
        )
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise as_user_error(error, stage) from error
    check_trackers(arguments, stage)


def _make_optimizer(arguments: TrainingArguments, *, of_the_model: bool) -> None:
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ValueError:
        if of_the_model:  # there is no model yet; what is not installed has been said by now
            return
        raise
    steps, schedule = max(arguments.max_steps, 1), arguments.lr_scheduler_kwargs
    assert not isinstance(schedule, str)  # the arguments have read it as JSON
    get_scheduler(
        arguments.lr_scheduler_type,
        kind([torch.nn.Parameter(torch.zeros(1))], **options),
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=schedule,
    )
