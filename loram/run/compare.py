"""Compare methods, on the full and on the pruned model, with the same data, steps and seed, in one table."""

import json
import logging
import multiprocessing
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table
from transformers import TrainerCallback

from loram.base.errors import UserError, first_problem
from loram.base.quiet import quieten_libraries
from loram.evaluation.evaluate import Report
from loram.run.pipeline import check
from loram.run.recipe import Recipe, Variant
from loram.run.record import Done, Record
from loram.run.rows import evaluations
from loram.run.stages import ADAPTER, ADAPTING, SHRINKING, TUNED, Run, cost_of, final_of

logger = logging.getLogger(__name__)

TABLE_NAME, PLOT_NAME, JSON_NAME = "compare.md", "compare.png", "compare.json"
_METER = "meter.json"


class Measured(BaseModel):
    """One row of a comparison.

    Args:
        name: the name of the variant; `untuned` is the full model alone.
        on: the model that was trained on: `full` or `pruned`.
        method: a key of `loram.training.methods.table.METHODS`; empty for the untuned model.
        perplexity: the perplexity of the full model with what was trained, by data set; never that of the pruned one.
        parameters: the parameters of the model that was trained on, adapter included; a weight in 4 bits counts whole.
        trained: how many of them train; with LISA, how many train at a time.
        optimizer_bytes: the largest size of the optimiser's state.
        peak_memory: the peak memory of the training in bytes: the resident memory of the process, or on a GPU what
            torch allocated there.
        seconds: the duration of the training.
        made_seconds: the duration of pruning and alignment before it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    on: str
    method: str
    perplexity: dict[str, float]
    parameters: int = 0
    trained: int = 0
    optimizer_bytes: int = 0
    peak_memory: int = 0
    seconds: float = 0.0
    made_seconds: float = 0.0


def compare(recipe: Recipe) -> list[Measured]:
    """Run every variant of a recipe, one after the other, each in a process of its own, and evaluate the full model.

    Leaves one folder per variant under `output_dir`, and there `compare.json`, `compare.md` and, where matplotlib is
    installed, `compare.png`. A second call does only what is missing.

    Raises:
        UserError: the recipe has no variants, or one of them cannot be run.
    """
    variants = {name: variant_of(recipe, name) for name in recipe.compare}
    if not variants:
        raise UserError("compare: missing; name the variants, each with what it changes in `prune` and `train`")
    if not recipe.dataset or recipe.prune is None:
        raise UserError("compare: needs `dataset` and `prune`, to train on the full and on the pruned model")
    if not recipe.held_out:
        raise UserError(
            "compare: needs `eval_dataset`, and no `evaluate: false`: variants are compared on held-out rows"
        )
    if recipe.tasks is not None:
        raise UserError(
            "compare: puts perplexities side by side; leave evaluate.tasks out, or run each recipe by itself"
        )
    check(recipe)
    for name, variant in variants.items():
        try:
            check(variant)
        except UserError as error:
            raise UserError(f"compare.{name}: {error}") from error
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    rows = [_alone(_untuned, recipe)]
    for name, variant in variants.items():
        logger.info("%s ...", name)
        on = recipe.compare[name].base
        if on == "pruned":
            _alone(_shrunk, variant)  # by itself, so that what it leaves in memory does not count as training's
        rows.append(_alone(_measured, variant, name, on))
        _write(recipe.output_dir, rows)
    return rows


def variant_of(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe of one variant.

    Raises:
        UserError: what it changes is not valid there.
    """
    variant: Variant = recipe.compare[name]
    values = recipe.model_dump(exclude={"compare"}, exclude_unset=True)
    for section in ("prune", "train"):
        values[section] = _over(values.get(section) or {}, getattr(variant, section))
    values["output_dir"] = recipe.output_dir / re.sub(r"[^\w.-]+", "_", name)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"compare.{name}: {first_problem(error)}") from error


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Put `above` over `below`, and so with the mappings in them; a value of None falls back to the default."""
    merged = dict(below)
    for key, value in above.items():
        deeper = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _over(merged[key], value) if deeper else value
    return {key: value for key, value in merged.items() if value is not None}


def _alone(action: Any, *arguments: Any) -> Any:
    """Call a function in a fresh process, so that its peak memory is its own."""
    level = logging.getLogger("loram").level
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=_as_here, initargs=(level,)) as pool:
        try:
            return pool.submit(action, *arguments).result()
        except BaseException:
            for child in multiprocessing.active_children():  # it may still train
                child.terminate()
            raise


def _as_here(level: int) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("loram").setLevel(level or logging.INFO)
    if level != logging.DEBUG:
        quieten_libraries()


def _untuned(recipe: Recipe) -> Measured:
    job, base = Run(recipe=recipe, record=Record(recipe)), recipe.model_name_or_path
    reports = _reports(evaluations(job, "untuned", (base, None)))
    parameters = next(report.parameters for report in reports.values())
    perplexity = {name: report.perplexity for name, report in reports.items()}
    return Measured(name="untuned", on="full", method="", perplexity=perplexity, parameters=parameters)


def _reports(evaluated: Mapping[str, Done]) -> dict[str, Report]:
    return {name: done.report for name, done in evaluated.items() if done.report is not None}


def _shrunk(recipe: Recipe) -> None:
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    Run(recipe=recipe, record=Record(recipe)).perform(*SHRINKING)


def _measured(recipe: Recipe, name: str, on: str) -> Measured:
    """Train, if that is still to be done, and evaluate the full model with what was trained."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    meter = recipe.output_dir / _METER
    job = Run(recipe=recipe, record=Record(recipe), callbacks=[_Meter(meter)])
    stages = (TUNED,) if on == "full" else (*SHRINKING, *ADAPTING)
    job.perform(*stages)
    trained, final = (TUNED, TUNED) if on == "full" else (ADAPTER, final_of(recipe))
    cost, before = cost_of(job, trained), [cost_of(job, stage) for stage in SHRINKING if stage in stages]
    reports = _reports(evaluations(job, name, final.evaluated(job)))
    counts = json.loads(meter.read_text(encoding="utf-8"))
    return Measured(
        name=name,
        on=on,
        method=recipe.train.method,
        perplexity={dataset: report.perplexity for dataset, report in reports.items()},
        parameters=counts["parameters"],
        trained=counts["trained"],
        optimizer_bytes=counts["optimizer_bytes"],
        peak_memory=counts["allocated"] or (0 if cost is None else cost.peak_rss),
        seconds=0.0 if cost is None else cost.seconds,
        made_seconds=sum(part.seconds for part in before if part is not None),
    )


class _Meter(TrainerCallback):
    """Counts what trains and what the optimiser holds, and leaves it in a file when the training has ended."""

    def __init__(self, path: Path) -> None:
        self.path, self.optimizer_bytes, self.trained = path, 0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        held = [entry for values in rest["optimizer"].state.values() for entry in values.values()]
        nbytes = sum(entry.nbytes for entry in held if isinstance(entry, torch.Tensor) and entry.ndim)
        self.optimizer_bytes = max(self.optimizer_bytes, nbytes)
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        from loram.compute.nf4 import count_parameters

        read = {
            "parameters": count_parameters(model),
            "trained": self.trained,
            "optimizer_bytes": self.optimizer_bytes,
            "allocated": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        }
        self.path.write_text(json.dumps(read) + "\n", encoding="utf-8")


def table(rows: list[Measured]) -> Table:
    """Return the comparison for a terminal."""
    result = Table(title="the full model with what was trained")
    for place, heading in enumerate(_headings(rows)):
        result.add_column(heading, justify="left" if place < 2 else "right")
    for row in rows:
        result.add_row(*_cells(row))
    return result


def _headings(rows: list[Measured]) -> list[str]:
    perplexities = [f"perplexity {name}" for name in rows[0].perplexity]
    return ["", "trained on", *perplexities, "trains", "optimiser MB", "peak GB", "seconds", "before"]


def _cells(row: Measured) -> list[str]:
    cells = [row.name, f"{row.on}, {row.method}" if row.method else "", *(f"{v:.3f}" for v in row.perplexity.values())]
    if not row.method:
        return [*cells, *[""] * 5]
    return [
        *cells,
        f"{row.trained:,}",
        f"{row.optimizer_bytes / 1e6:.1f}",
        f"{row.peak_memory / 1e9:.2f}",
        f"{row.seconds:.0f}",
        f"{row.made_seconds:.0f}",
    ]


def _write(out: Path, rows: list[Measured]) -> None:
    content = json.dumps([row.model_dump() for row in rows], indent=2)
    (out / JSON_NAME).write_text(content + "\n", encoding="utf-8")
    lines = [_headings(rows), ["---"] * len(_headings(rows)), *(_cells(row) for row in rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (out / TABLE_NAME).write_text(text, encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        logger.info("no plot: matplotlib is not installed; pip install 'loram[plots]'")
        return
    matplotlib.use("Agg")
    _plot(rows, out / PLOT_NAME)


def _plot(rows: list[Measured], path: Path) -> None:
    """Draw the perplexity on the first data set against the peak memory and the seconds of the training."""
    from matplotlib import pyplot

    dataset = next(iter(rows[0].perplexity))
    figure, both = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    memory, seconds = [row.peak_memory / 1e9 for row in rows[1:]], [row.seconds for row in rows[1:]]
    headings = ("peak memory of the training, GB", "seconds of the training")
    for axes, heading, values in zip(both, headings, (memory, seconds), strict=True):
        for row, value in zip(rows[1:], values, strict=True):
            color = "#08519c" if row.on == "pruned" else "#a63603"
            axes.plot(value, row.perplexity[dataset], "o", color=color)
            axes.annotate(row.name, (value, row.perplexity[dataset]), xytext=(4, 4), textcoords="offset points")
        axes.axhline(rows[0].perplexity[dataset], color="grey", linewidth=0.8, linestyle="--")
        axes.set_xlabel(heading)
    both[0].set_ylabel(f"perplexity on {dataset}, of the full model (dashed: untuned)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
