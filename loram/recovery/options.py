"""Options of recovery."""

from typing import ClassVar

from pydantic import AliasChoices

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
