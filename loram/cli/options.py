"""Arguments and flags that several subcommands share, and what their values become."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from loram.base.errors import UserError, first_problem
from loram.training.methods.table import METHODS

Model = Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset", help="A .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a hub name.", show_default=False
    ),
]
Split = Annotated[str | None, typer.Option("--dataset-split", help="Split of a hub data set (default: train).")]
Config = Annotated[str | None, typer.Option("--dataset-config", help="Configuration of a hub data set.")]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", help="Name a column: prompt=question. Of messages, prompt, completion, text. Repeatable."),
]
MaxSamples = Annotated[int | None, typer.Option(help="Only the first so many rows.")]
Ratio = Annotated[
    float | None,
    typer.Option(help="Share of heads and channels, or of weights, to remove; n:m implies it.", show_default=False),
]
Pattern = Annotated[str, typer.Option(help="structured; or sparse: 4:8, 2:4 (n of every m are kept), unstructured.")]
KeepFirst = Annotated[int | None, typer.Option(help="First layers to leave whole (default 4; of sparse patterns 0).")]
KeepLast = Annotated[int | None, typer.Option(help="Last layers to leave whole (default 2; of sparse patterns 0).")]
Seed = Annotated[int, typer.Option(help="Seed of all that is random.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one).")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on with what was interrupted.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after so many steps.")]
Epochs = Annotated[float | None, typer.Option(help="Default 1.")]
BatchSize = Annotated[int | None, typer.Option(help="Default 4.")]
Accumulation = Annotated[int | None, typer.Option(help="Default 1.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens a row (default 512).")]
ReportTo = Annotated[str | None, typer.Option(help="none, tensorboard, wandb, trackio (default none).")]
LoraR = Annotated[int | None, typer.Option(help="Rank (default 8).")]
LoraTargets = Annotated[
    list[str] | None, typer.Option(help="Repeatable (default: all seven linears of a layer; lm_head if asked).")
]
LoraDropout = Annotated[float | None, typer.Option(help="Default 0.05; with dora and lora-fa 0.")]
LoraSpShare = Annotated[float | None, typer.Option(help="LoRA-SP: share of the adapter that trains (default 0.5).")]
Method = Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {key: value for key, value in flags.items() if value is not None}


def pairs(items: list[str] | None, flag: str) -> dict[str, Any]:
    """`key=value` flags; values are YAML, as in a recipe."""
    from loram.run.recipe import parse_pair

    return dict(parse_pair(item, flag) for item in items or [])


def weighted(text: str) -> dict[str, Any]:
    """`PATH=SHARE`, or a path alone."""
    path, _, share = text.rpartition("=")
    try:
        return {"path": path, "weight": float(share)} if path else {"path": text}
    except ValueError:
        return {"path": text}


def data_spec(
    path: str, config: str | None, split: str | None, columns: list[str] | None, max_samples: int | None
) -> Any:
    """The data set that the flags name.

    Raises:
        UserError: a value is out of range.
    """
    from loram.data.spec import DataSpec

    named = pairs(columns, "--column")
    values = {"path": path, "config": config, "split": split, "columns": named, "max_samples": max_samples}
    try:
        return DataSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(f"--dataset, --column, --max-samples: {first_problem(error)}") from error
