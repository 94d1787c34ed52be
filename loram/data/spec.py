"""Which data set: what recipes and the command line say of one, without reading it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from loram.base.errors import UserError, first_problem

Column = Literal["messages", "prompt", "completion", "text"]


class DataSpec(BaseModel):
    """Which rows of which data set.

    Args:
        path: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a name on the hub.
        config, split: of a hub data set; the split defaults to `train`. A file has neither.
        columns: our name (messages, prompt, completion, text) -> the file's name; by inspection where not given.
        max_samples: only the first so many rows; in an evaluation also so many pieces of a long text.
        max_length: tokens a row is cut to, where this data set needs another limit than the stage's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    config: str | None = None
    split: str | None = None
    columns: dict[Column, str] = Field(default_factory=dict)
    max_samples: PositiveInt | None = None
    max_length: PositiveInt | None = None


class WeightedSpec(DataSpec):
    """A data set of a mixture.

    Args:
        weight: its share of the rows, beside the other data sets' weights; None in all takes all rows of all.
    """

    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def unweighted(self) -> DataSpec:
        """The data set by itself."""
        return DataSpec.model_validate(self.model_dump(exclude={"weight"}))


class CacheSpec(BaseModel):
    """A folder that `teach` made, of a mixture.

    Args:
        path: the folder.
        weight: as of a data set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)


def as_spec(data: DataSpec | str | Path | Mapping[str, Any]) -> DataSpec:
    """A data set given by name, as a mapping, or already as a spec.

    Raises:
        UserError: the mapping has an unknown key or a bad value.
    """
    if isinstance(data, DataSpec):
        return data
    try:
        return DataSpec.model_validate(dict(data) if isinstance(data, Mapping) else {"path": str(data)})
    except ValidationError as error:
        raise UserError(f"data: {first_problem(error)}") from error


def as_mapping(value: Any) -> Any:
    """`{"path": value}` of a path alone, as recipes and Python allow; anything else as it is."""
    return {"path": str(value)} if isinstance(value, str | Path) else value
