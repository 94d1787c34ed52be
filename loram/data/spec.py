"""How recipes and the command line name a data set. Nothing is read here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from loram.base.errors import UserError, first_problem
from loram.base.options import option

Column = Literal[
    "messages", "prompt", "completion", "question", "answer", "instruction", "input", "output", "text",
    "system", "history", "tools", "chosen", "rejected", "label",
]  # fmt: skip

# What is learnt from rows: how a text goes on, which of two answers is better, or whether an answer is good.
Kind = Literal["text", "pairs", "labels"]


class _ByPath(BaseModel):
    """Something that recipes and Python may also name by its path alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _as_mapping(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return {"path": str(value)}
        return value.model_dump() if isinstance(value, BaseModel) and not isinstance(value, cls) else value


class DataSpec(_ByPath):
    """The data set to read, and which of its rows."""

    path: str = option(
        ...,
        "A .jsonl, .json, .csv, .tsv, .parquet or .txt file, several by a pattern, a folder of them, or a name on the "
        "hub.",
        flag="dataset",
        common=True,
        min_length=1,
    )
    config: str | None = option(None, "The configuration of a hub data set.", flag="dataset-config")
    split: str | None = option(None, "The split of a hub data set or a folder (default: train).", flag="dataset-split")
    columns: dict[Column, str] = option(
        {},
        f"The data's name for one of our columns ({', '.join(get_args(Column))}), such as question=query (default: "
        "columns are found by inspection).",
        flag="column",
    )
    apply_chat_template: bool = option(
        True,
        "Write rows of a prompt and a completion, a question and an answer, or an instruction and an output as chats, "
        "where the tokenizer has a chat template.",
        exclude_if=bool,  # so that folders of earlier versions, which know nothing of it, are gone on with
    )
    max_samples: PositiveInt | None = option(
        None, "Use only this many rows from the start; an evaluation counts pieces of a long text."
    )
    max_length: PositiveInt | None = option(
        None,
        "Rows are cut to this many tokens, if this data set needs another limit than the stage's.",
        flag="",
    )


class WeightedSpec(DataSpec):
    """One data set of a mixture."""

    weight: float | None = option(
        None,
        "The share of the rows that come from here, relative to the other weights (default: all rows of all).",
        gt=0,
        allow_inf_nan=False,
    )

    def unweighted(self) -> DataSpec:
        """Return the same data set without its weight."""
        return DataSpec.model_validate(self.model_dump(exclude={"weight"}))


class CacheSpec(_ByPath):
    """One teacher cache of a mixture."""

    path: str = option(..., "The folder.", min_length=1)
    weight: float | None = option(
        None,
        "The share of the rows that come from here, relative to the other weights (default: all rows of all).",
        gt=0,
        allow_inf_nan=False,
    )


def as_spec(data: DataSpec | str | Path | Mapping[str, Any]) -> DataSpec:
    """Turn the name of a data set, or a mapping with the fields of `DataSpec`, into a spec; specs pass unchanged.

    Raises:
        UserError: the mapping has an unknown key or a bad value.
    """
    if isinstance(data, DataSpec):
        return data
    try:
        return DataSpec.model_validate(dict(data) if isinstance(data, Mapping) else data)
    except ValidationError as error:
        raise UserError(f"data: {first_problem(error)}") from error
