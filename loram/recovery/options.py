"""Options of recovery and of polishing."""

from typing import ClassVar

from pydantic import AliasChoices, PositiveFloat, PositiveInt

from loram.base.options import Options, option
from loram.data.spec import DataSpec


class RecoverOptions(Options):
    """What recovery does beyond widening, for which it reads the full model; see `loram.recovery.recover.recover`."""

    stage: ClassVar[str] = "recover"

    correct: bool = option(False, "Take out what alignment and 4 bits changed in the base (EMLoC).", common=True)
    dev_dataset: DataSpec | None = option(
        None,
        "Choose a multiplier of the update on these development rows.",
        validation_alias=AliasChoices("dev_dataset", "dev_data"),
        common=True,
    )


class PolishOptions(Options):
    """How to train a recovered adapter further on the streamed full model; see `loram.recovery.polish.polish`."""

    stage: ClassVar[str] = "polish"

    max_steps: PositiveInt = option(8, "Optimiser steps, each of which reads the full model twice.", common=True)
    per_device_train_batch_size: PositiveInt = option(16, "Rows per step.", common=True)
    learning_rate: PositiveFloat = option(
        5e-4, "The learning rate of the first step; it falls to 0 along a cosine.", common=True
    )
    max_length: PositiveInt = option(512, "Rows are cut to this many tokens.")
    max_grad_norm: PositiveFloat = option(1.0, "Gradients are clipped to this norm.", flag="")
