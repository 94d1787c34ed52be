"""The rows of the report of a run: evaluations of each model, and what became of the training rows."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from loram.base.hashes import file_sha256
from loram.disk.adapter import WEIGHTS_NAME
from loram.disk.artifacts import find_manifest
from loram.disk.opening import open_model
from loram.disk.template import as_setting
from loram.disk.tensorfile import TensorFile
from loram.evaluation.evaluate import evaluate
from loram.evaluation.options import EvaluateOptions, is_file_of_a_task
from loram.evaluation.tasks import evaluate_tasks
from loram.run.record import Done
from loram.run.report import Cost, Row, RowCounts, together
from loram.run.stages import Evaluated, Run, described, fingerprint


def evaluations(run: Run, name: str, evaluated: Evaluated) -> dict[str, Done]:
    """Return the perplexity of a model, with or without an adapter, on every evaluation data set, by its name.

    Args:
        run: the run; finished evaluations are not repeated.
        name: the row of the report that they are for.
        evaluated: the model and the adapter.
    """
    return {dataset: _evaluation(run, name, dataset, *evaluated) for dataset in run.recipe.held_out}


def _evaluation(run: Run, name: str, dataset: str, model: str | Path, adapter: Path | None) -> Done:
    spec, section = run.recipe.held_out[dataset], run.recipe.evaluate
    assert section is not None
    options = EvaluateOptions.of(**section.model_dump(include=set(EvaluateOptions.model_fields)))
    opened = open_model(model, chat_template=run.recipe.chat_template_path)
    settings = {
        **as_setting(opened.chat_template),
        "dataset": described(spec),
        **options.model_dump(exclude={"stream"}),  # which changes nothing
        "model": opened.fingerprint,
        "adapter": None if adapter is None else fingerprint(adapter),
    }
    return run.record.stage(
        f"evaluate {name} on {dataset}",
        settings,
        lambda: evaluate(
            model,
            adapter=adapter,
            data=spec,
            options=options,
            device=run.recipe.device,
            chat_template=run.chat_template,
        ),
    )


def tasks_of(run: Run, name: str, evaluated: Evaluated) -> Done | None:
    """Return the results of the recipe's tasks on a model, with or without an adapter; None if it has no tasks."""
    options, (model, adapter) = run.recipe.tasks, evaluated
    if options is None:
        return None
    opened = open_model(model, chat_template=run.recipe.chat_template_path)
    files = {task: file_sha256(Path(task)) for task in options.tasks or () if is_file_of_a_task(task)}
    settings = {
        **as_setting(opened.chat_template),
        **options.model_dump(exclude={"stream", "batch_size"}),  # which change nothing
        "descriptions": files,
        "model": opened.fingerprint,
        "adapter": None if adapter is None else fingerprint(adapter),
    }
    where = {"device": run.recipe.device, "chat_template": run.chat_template}
    action = partial(evaluate_tasks, model, adapter=adapter, options=options, **where)
    return run.record.stage(f"run tasks on {name}", settings, action)


def parameters_of(run: Run, evaluated: Evaluated) -> int:
    """Return how many parameters a model has with its adapter, by the plan and the adapter's file alone."""
    (full, pruned), (model, adapter) = run.plan.parameters(), evaluated
    specs = {} if adapter is None else TensorFile(adapter / WEIGHTS_NAME).specs
    return (pruned if model in run.small_models.values() else full) + sum(math.prod(s.shape) for s in specs.values())


def row_of(
    name: str,
    parameters: int,
    cost: Cost | None,
    evaluated: Mapping[str, Done],
    trained_on: RowCounts | None,
    tasks: Done | None = None,
) -> Row:
    """Return one row of the report.

    Args:
        name: its name.
        parameters: the parameters of the model, where no evaluation has counted them.
        cost: what making it took.
        evaluated: the evaluations by data set.
        trained_on: what became of the training rows, where something was trained.
        tasks: the results of tasks.
    """
    reports = {dataset: done.report for dataset, done in evaluated.items() if done.report is not None}
    return Row(
        name=name,
        parameters=next((report.parameters for report in reports.values()), parameters),
        perplexity={dataset: report.perplexity for dataset, report in reports.items()},
        tokens={dataset: report.tokens for dataset, report in reports.items()},
        evaluated_on={
            dataset: RowCounts(used=report.rows, truncated=report.rows_truncated, skipped=report.rows_skipped)
            for dataset, report in reports.items()
        },
        trained_on=trained_on,
        tasks={} if tasks is None or tasks.tasks is None else tasks.tasks.tasks,
        made=cost,
        preferences={name: report.preferences for name, report in reports.items() if report.preferences is not None},
        evaluated=together([done.cost for done in (*evaluated.values(), *([] if tasks is None else [tasks]))]),
    )


def trained_on(folder: Path) -> RowCounts | None:
    """Return what became of the rows that an adapter or a model was trained on; None where they were streamed."""
    manifest = find_manifest(folder)
    assert manifest is not None, folder
    settings = manifest.settings
    if settings["rows"] is None:
        return None
    return RowCounts(used=settings["rows"], truncated=settings["rows_truncated"], skipped=settings["rows_skipped"])
