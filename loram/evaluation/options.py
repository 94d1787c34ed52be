"""Options of evaluation."""

from typing import ClassVar

from pydantic import PositiveInt

from loram.base.options import Options, option


class EvaluateOptions(Options):
    """How to evaluate a model; see `loram.evaluation.evaluate.evaluate`."""

    stage: ClassVar[str] = "eval"

    max_samples: PositiveInt | None = option(
        None, "Score only this many rows from the start, or pieces of a long text.", common=True
    )
    max_length: PositiveInt = option(
        1024,
        "Rows are cut to this many tokens, and long texts into pieces of this length.",
        also="sequence_len cutoff_len",
    )
    stream: bool = option(False, "Never load the model: read it from disk layer by layer.")
