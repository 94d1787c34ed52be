"""How recipes and the command line name a data set. Nothing is read here."""

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from loram.base.errors import UserError, first_problem
from loram.base.options import option

Column = Literal[
    "messages", "prompt", "completion", "question", "answer", "instruction", "input", "output", "text",
    "system", "history", "tools", "chosen", "rejected", "label",
]  # fmt: skip

# What is learnt from rows: how a text goes on, which of two answers is better, or whether an answer is good.
Kind = Literal["text", "pairs", "labels"]

BUFFER_ROWS = 10_000


T = TypeVar("T")


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
    streaming: bool = option(
        False,
        "Read the rows while the training goes on, and never all of them; then the steps are limited by max_steps.",
        exclude_if=operator.not_,  # as above
    )
    buffer_size: PositiveInt = option(
        BUFFER_ROWS,
        "With streaming: each row is drawn from this many that are read ahead; 1 keeps the order of the rows.",
        flag="",
        exclude_if=lambda size: size == BUFFER_ROWS,
    )

    def reading(self) -> dict[str, Any]:
        """Return what decides which rows are read, and what becomes of them, as JSON values."""
        return self.model_dump(mode="json", include={"columns", "apply_chat_template", "max_samples"})


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


Dataset = DataSpec | str | Path | Mapping[str, Any]  # how Python names one data set
Datasets = Dataset | Sequence[Dataset]  # and how one or several


def several(value: Any) -> Any:
    """Return data sets as a list, where one stands alone or none is given; for validators."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def one_or_all(values: Sequence[T]) -> T | list[T]:
    """Return what is known of several data sets as settings have it: a list, or of a single one that alone."""
    return values[0] if len(values) == 1 else list(values)


def as_specs(data: Datasets) -> tuple[WeightedSpec, ...]:
    """Turn the name of a data set, a mapping with the fields of `WeightedSpec`, or several of them, into specs.

    Raises:
        UserError: there is none, a mapping has an unknown key or a bad value, or some have a weight and some have none.
    """
    try:
        specs = tuple(
            WeightedSpec.model_validate(dict(one) if isinstance(one, Mapping) else one) for one in several(data)
        )
    except ValidationError as error:
        raise UserError(f"data: {first_problem(error)}") from error
    if not specs:
        raise UserError("data: name at least one data set")
    if problem := why_not_weighted(specs):
        raise UserError(f"data: {problem}")
    return specs


def why_not_weighted(specs: Sequence[WeightedSpec | CacheSpec]) -> str | None:
    """Return why some data sets or caches make no mixture, if they make none."""
    weights = [spec.weight for spec in specs]
    return "give every one a weight, or none" if None in weights and any(weights) else None


def as_spec(data: Dataset) -> DataSpec:
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
