"""How recipes and the command line name a data set. Nothing is read here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from loram.base.errors import UserError, first_problem

Column = Literal["messages", "prompt", "completion", "text"]


class DataSpec(BaseModel):
    """The data set to read, and which of its rows.

    Args:
        path: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or the name of a data set on the Hugging Face hub.
        config: the configuration of a hub data set; a file has none.
        split: the split of a hub data set (default: `train`); a file has none.
        columns: our name of a column (messages, prompt, completion, text) -> its name in the file. Without it, the
            columns are recognised by their names.
        max_samples: read only this many rows, from the first on. An evaluation also takes only this many pieces of a
            long text.
        max_length: cut rows to this many tokens, where this data set needs another limit than its stage has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    config: str | None = None
    split: str | None = None
    columns: dict[Column, str] = Field(default_factory=dict)
    max_samples: PositiveInt | None = None
    max_length: PositiveInt | None = None


class WeightedSpec(DataSpec):
    """One data set of a mixture.

    Args:
        weight: the share of its rows in the mixture, relative to the weights of the other data sets. If no data set
            has a weight, the mixture has all rows of all data sets.
    """

    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def unweighted(self) -> DataSpec:
        """Return the same data set without its weight."""
        return DataSpec.model_validate(self.model_dump(exclude={"weight"}))


class CacheSpec(BaseModel):
    """One teacher cache of a mixture.

    Args:
        path: a folder that `teach` wrote.
        weight: the share of its rows, as in `WeightedSpec`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)


def as_spec(data: DataSpec | str | Path | Mapping[str, Any]) -> DataSpec:
    """Turn the name of a data set, or a mapping with the fields of `DataSpec`, into a spec; specs pass unchanged.

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
