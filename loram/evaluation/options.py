"""Options of evaluation."""

from typing import ClassVar

from pydantic import PositiveInt

from loram.base.options import Options, option


class EvaluateOptions(Options):
    """How to evaluate a model; see `loram.evaluation.evaluate.evaluate`."""

    stage: ClassVar[str] = "eval"

    max_samples: PositiveInt | None = option(
        None, "Score only the first so many rows, or pieces of a long text.", common=True
    )
    max_length: PositiveInt = option(
        1024, "Each row is cut to so many tokens, a long text into pieces of so many.", also="sequence_len cutoff_len"
    )
    stream: bool = option(False, "Never load the model: read it from disk layer by layer.")
