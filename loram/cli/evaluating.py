"""The command `loram eval`: a perplexity on a data set, tasks of lm-evaluation-harness, or both."""

import json as json_text
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import typer

from loram.base import processes
from loram.base.errors import UserError
from loram.cli.console import console
from loram.cli.flags import Flag, flags_of
from loram.data.spec import DataSpec
from loram.evaluation.options import EvaluateOptions, TaskOptions

_HARNESS = "harness"  # where the options of tasks are among the keyword arguments
_OF_TASKS = TaskOptions.model_fields.keys() - EvaluateOptions.model_fields.keys()


def _flags() -> Iterator[Flag]:
    data = flags_of(DataSpec, "Data set", only=("path", "config", "split", "columns"), under=("data",))
    for flag in data:  # --dataset may be left out where there are tasks
        yield replace(flag, required=False)
    yield from flags_of(TaskOptions, "Tasks of lm-evaluation-harness", only=_OF_TASKS, under=(_HARNESS,))
    yield from flags_of(EvaluateOptions, "Further options")


FLAGS = tuple(_flags())


def evaluate(
    model: str,
    *,
    data: Mapping[str, Any] | None = None,
    harness: Mapping[str, Any] | None = None,
    json: bool = False,
    max_samples: int | None = None,
    max_length: int | None = None,
    **where: Any,
) -> None:
    """Measure perplexity or run tasks, with or without an adapter.

    --dataset FILE measures the perplexity of MODEL, and --tasks runs tasks of lm-evaluation-harness. One of them is
    needed, and both may be given.
    """
    limits = {"max_samples": max_samples, "max_length": max_length}
    of_perplexity: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    if data is None and harness is None:
        raise UserError("eval: give --dataset FILE for a perplexity, --tasks NAMES for tasks, or both")
    if data is None and of_perplexity:
        raise UserError(f"--{next(iter(of_perplexity)).replace('_', '-')}: is for --dataset; tasks have --limit")
    parts: dict[str, Any] = {}
    if data is not None:
        from loram.evaluation.evaluate import evaluate as measure

        report = measure(model, data=data, **of_perplexity, **where)
        parts |= report.model_dump(mode="json")
        if not json and processes.first():
            typer.echo(
                f"perplexity {report.perplexity:.4f} (loss {report.loss:.4f} nats) over {report.tokens:,} tokens "
                f"of {report.rows:,} rows"
            )
            if report.preferences is not None:
                typer.echo(
                    f"the chosen answer is likelier in {100 * report.preferences.accuracy:.1f}% of pairs, by "
                    f"{report.preferences.margin:.2f} nats on average"
                )
    if harness is not None:
        from loram.evaluation.tasks import evaluate_tasks, table

        results = evaluate_tasks(model, **harness, **where)
        parts |= results.model_dump(mode="json")
        if not json and processes.first():
            console().print(table(results))
    if json and processes.first():
        typer.echo(json_text.dumps(parts))
