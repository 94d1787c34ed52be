"""Run tasks of lm-evaluation-harness on a model, with or without an adapter."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict

from loram.base.errors import UserError
from loram.base.paths import local
from loram.compute.belonging import load_for
from loram.compute.device import compute_dtype, fits, join_processes
from loram.compute.loading import load_tokenizer
from loram.compute.resident import load_adapted
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.evaluation.options import TaskOptions

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict
    from rich.table import Table


class TaskResult(BaseModel):
    """The result of a task, or of a group of tasks.

    Args:
        examples: how many examples were used; 0 for a group that has no metric of its own.
        num_fewshot: how many solved examples stood before each question; None where it differs within a group.
        metrics: the metrics by lm-evaluation-harness's names, which are `METRIC,FILTER` and `METRIC_stderr,FILTER`;
            None where a metric is not a finite number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int
    num_fewshot: int | None
    metrics: dict[str, float | None]

    def labelled(self) -> Iterator[tuple[str, float | None, float | None]]:
        """Yield (the name of a metric for people, its value, its standard error, None where it has none)."""
        for key, value in self.metrics.items():
            metric, _, filtered = key.partition(",")
            if not metric.endswith("_stderr"):
                label = metric if filtered == "none" else f"{metric} ({filtered})"
                yield label, value, self.metrics.get(f"{metric}_stderr,{filtered}")


class TaskReport(BaseModel):
    """The results of tasks.

    Args:
        tasks: the results by the names of tasks and groups.
        streamed: whether the model was read from disk layer by layer.
        parameters: the number of parameters, including the adapter's; a tied weight counts once.
        model, adapter: the names of the model and the adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: dict[str, TaskResult]
    streamed: bool
    parameters: int
    model: str
    adapter: str | None


def evaluate_tasks(
    base: str | Path,
    *,
    adapter: str | Path | None = None,
    options: TaskOptions | None = None,
    device: str | None = None,
    chat_template: str | Path | None = None,
    **fields: Any,
) -> TaskReport:
    """Run tasks of lm-evaluation-harness, with its prompts and metrics.

    A model that fits into the memory that is free is loaded. Otherwise, or with `stream=True`, it is read from disk one
    decoder layer at a time, and only tasks that score texts can be run: multiple choice, likelihood and perplexity.
    Several processes of a launcher share the requests of the tasks, and all get the report.

    Args:
        base, adapter, device, chat_template: as for `loram.evaluate`.
        options: which tasks to run, and how.
        fields: single options by name, over `options`; see `TaskOptions`.

    Raises:
        UserError: the model, the adapter or a task cannot be used, or lm-evaluation-harness is not installed.

    Example: `evaluate_tasks("pruned", adapter="adapter", tasks=["arc_easy"], limit=100).tasks["arc_easy"].metrics`.
    """
    settings = TaskOptions.of(options, **fields)
    checkpoint, compute_device = open_model(base, chat_template=chat_template), join_processes(device)
    loaded_adapter = None if adapter is None else load_for(checkpoint, local(adapter))
    tasks, streamed = open_tasks(checkpoint, settings, compute_device)
    tokenizer = load_tokenizer(checkpoint)
    from loram.evaluation import harness  # which is there, since the tasks are open

    if streamed:
        added = 0 if loaded_adapter is None else sum(tensor.numel() for tensor in loaded_adapter.tensors.values())
        parameters = checkpoint.parameters + added
        model = harness.StreamedModel(checkpoint, loaded_adapter, tokenizer, compute_device)
    else:
        loaded, parameters = load_adapted(checkpoint, loaded_adapter, compute_device)
        model = harness.loaded_model(loaded, tokenizer, settings.batch_size)
    results = harness.run_tasks(model, tasks, settings)
    return TaskReport(
        tasks={name: _result(name, results) for name in results["results"]},
        streamed=streamed,
        parameters=parameters,
        model=checkpoint.name,
        adapter=None if adapter is None else str(adapter),
    )


def open_tasks(checkpoint: Checkpoint, settings: TaskOptions, device: torch.device) -> "tuple[TaskDict, bool]":
    """Read tasks with their data, and check that a model can run them.

    Args:
        checkpoint: the model.
        settings: which tasks to run, and how.
        device: where the model computes.

    Returns:
        (the tasks as lm-evaluation-harness has them; whether the model is read from disk layer by layer).

    Raises:
        UserError: as in `evaluate_tasks`.
    """
    if not settings.tasks:
        raise UserError("eval: name at least one task")
    try:
        from loram.evaluation import harness
    except ModuleNotFoundError as error:
        raise UserError(
            f"eval: tasks need lm-evaluation-harness, and {error.name} is not installed: pip install 'loram[tasks]'"
        ) from error
    if settings.apply_chat_template and load_tokenizer(checkpoint).chat_template is None:
        raise UserError(
            f"{checkpoint.name}: apply_chat_template needs a chat template, and its tokenizer has none; name one with "
            "--chat-template"
        )
    weights = checkpoint.parameters * compute_dtype(device).itemsize
    streamed = settings.stream or not (checkpoint.quantized or fits(weights, device))
    tasks = harness.load_tasks(settings.tasks)
    for task in tasks["tasks"].values():
        if streamed and task.OUTPUT_TYPE == "generate_until":
            raise UserError(harness.refusal(task.task_name))
        if getattr(task, "UNSAFE_CODE", False) and not settings.confirm_run_unsafe_code:
            raise UserError(
                f"{task.task_name}: runs the code that the model writes; allow it with --confirm-run-unsafe-code, on a "
                "machine where nothing can go wrong"
            )
    return tasks, streamed


def _result(name: str, results: Mapping[str, Any]) -> TaskResult:
    values = {key: value for key, value in results["results"][name].items() if "," in key}
    numbers = {key: float(value) for key, value in values.items() if not isinstance(value, str)}  # "N/A"
    return TaskResult(
        examples=results["results"][name].get("sample_len", 0),
        num_fewshot=results["n-shot"].get(name),
        metrics={key: number if math.isfinite(number) else None for key, number in numbers.items()},
    )


def table(report: TaskReport) -> "Table":
    """Return the results as a table, with one line per metric."""
    from rich.table import Table

    result = Table(title=report.model if report.adapter is None else f"{report.model} with {report.adapter}")
    for heading, justify in (("task", "left"), ("examples", "right"), ("few-shot", "right"), ("metric", "left")):
        result.add_column(heading, justify="right" if justify == "right" else "left")
    result.add_column("value", justify="right")
    result.add_column("± standard error", justify="right")
    for name, task in report.tasks.items():
        shots = "" if task.num_fewshot is None else str(task.num_fewshot)
        for label, value, error in task.labelled():
            result.add_row(
                name, f"{task.examples:,}", shots, label, shown(value), "" if error is None else shown(error)
            )
    return result


def shown(value: float | None) -> str:
    """Return a metric for people."""
    return "not finite" if value is None else f"{value:.4f}"
