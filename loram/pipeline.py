"""Run a recipe: stages in order, each a folder; finished ones are skipped, stale ones refused."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loram.artifacts import difference, find_manifest, library_versions, sync
from loram.data import load_rows
from loram.data_spec import DataSpec
from loram.errors import UserError, first_problem
from loram.evaluate import Report, evaluate
from loram.model.architecture import architecture_of
from loram.model.checkpoint import open_model
from loram.model.device import peak_rss, reset_peak_rss
from loram.options import TrainOptions, check_options
from loram.prune.counts import kept_units, prunable_layers
from loram.prune.criteria import CRITERIA
from loram.prune.stage import check_weights, prune
from loram.recipe import Recipe, file_digest
from loram.recover import recover
from loram.report import Cost, Row, RowCounts, RunReport, kept_gain
from loram.train import train

logger = logging.getLogger(__name__)

STATE_NAME, REPORT_NAME = "stages.json", "report.json"


class _Done(BaseModel):
    """A finished stage: what it was run with, what it took (if known), and, for an evaluation, what it found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    cost: Cost | None
    report: Report | None = None


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid")

    stages: dict[str, _Done] = {}
    begun: dict[str, dict[str, Any]] = {}  # stage -> what it was started with


class _Run:
    """The output folder of a run and what has been done in it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.out = recipe, recipe.output_dir
        self.path = self.out / STATE_NAME
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else "{}"
            self.state = _State.model_validate_json(text)
        except (ValidationError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: not a valid record of stages: {first_problem(error)}") from error

    def stage(self, name: str, settings: Mapping[str, Any], action: Callable[[], Report | None]) -> _Done:
        """Do a stage, or take it as done when it was done with the same settings.

        Raises:
            UserError: it was done or begun with other settings; the first difference is shown.
        """
        asked: dict[str, Any] = json.loads(json.dumps(settings))  # as they are read back
        done, folder = self.state.stages.get(name), self.out / name
        found = folder.exists() and find_manifest(folder) is not None
        kept = done is not None and (found or done.report is not None)
        before = done.settings if kept and done is not None else self.state.begun.get(name)
        if before is not None and (changed := difference(before, asked)):
            raise UserError(
                f"{self.out}: {name} was made with other settings ({changed}); "
                "choose another output_dir, or give --fresh to start over"
            )
        if kept and done is not None:
            logger.info("%s: done already", name)
            return done
        if found:
            if before is None:
                raise UserError(f"{folder}: exists already, but {STATE_NAME} knows nothing of it; move it away")
            logger.info("%s: done already, just before the process was stopped", name)
            return self._record(name, _Done(settings=asked, cost=None))
        logger.info("%s ...", name)
        self.state.begun[name] = asked
        self._save(self.path, self.state)
        reset_peak_rss()
        started = time.monotonic()
        report = action()
        cost = Cost(seconds=time.monotonic() - started, peak_rss=peak_rss())
        logger.info("%s: %.1f s, peak RSS %.2f GB", name, cost.seconds, cost.peak_rss / 1e9)
        return self._record(name, _Done(settings=asked, cost=cost, report=report))

    def _record(self, name: str, done: _Done) -> _Done:
        self.state.stages[name] = done
        self.state.begun.pop(name, None)
        self._save(self.path, self.state)
        return done

    def _save(self, path: Path, value: BaseModel) -> None:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(value.model_dump_json(indent=2) + "\n", encoding="utf-8")
        sync(partial)
        os.replace(partial, path)

    def finish(self, rows: tuple[Row, ...]) -> RunReport:
        """Write report.json."""
        report = RunReport(
            recipe=self.recipe.model_dump(mode="json"),
            versions=library_versions(),
            rows=rows,
            kept_gain=kept_gain({row.name: row for row in rows}),
        )
        self._save(self.out / REPORT_NAME, report)
        return report


def _start_over(out: Path) -> None:
    """Remove what a run has left in its output folder, and nothing else."""
    for name in ("pruned", "adapter", "recovered", "full_lora"):
        for path in (out / name, out / f"{name}-checkpoints"):
            shutil.rmtree(path, ignore_errors=True)
    for name in (STATE_NAME, REPORT_NAME):
        (out / name).unlink(missing_ok=True)


def check(recipe: Recipe) -> None:
    """Find what would stop a run before any of it begins: model, data, options.

    Raises:
        UserError: the first problem.
    """
    checkpoint = open_model(recipe.model_name_or_path)
    architecture = architecture_of(checkpoint.config, checkpoint.name)
    check_weights(checkpoint, architecture)
    if recipe.prune.criterion not in CRITERIA:
        raise UserError(f"prune.criterion {recipe.prune.criterion!r} is not known; known are {', '.join(CRITERIA)}")
    prunable_layers(checkpoint.geometry, recipe.prune.keep_first, recipe.prune.keep_last)
    for space in architecture.spaces:
        kept_units(space, checkpoint.geometry.units(space), recipe.prune.ratio)
    check_options(TrainOptions(**recipe.train.model_dump()))
    if "seed" in recipe.train.trainer:
        raise UserError("train.trainer.seed: set the recipe's own seed, which every stage uses")
    for spec in (recipe.dataset, *recipe.eval_dataset.values()):
        load_rows(spec)


def run(recipe: Recipe, *, fresh: bool = False) -> RunReport:
    """Prune, train, recover, evaluate, and compare, as the recipe says.

    Leaves `pruned/`, `adapter/`, `recovered/` and, if asked, `full_lora/` under `output_dir`, each complete by itself,
    and `report.json`. A second run with the same recipe does only what is missing, and goes on with a training that was
    interrupted. `fresh` removes what an earlier run left there and starts over.

    Raises:
        UserError: the recipe cannot be run, or what is in `output_dir` was made with another one.
    """
    check(recipe)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    if fresh:
        _start_over(recipe.output_dir)
    state, base, out = _Run(recipe), recipe.model_name_or_path, recipe.output_dir
    checkpoint = open_model(base)
    common = {"base": checkpoint.fingerprint, "seed": recipe.seed, "device": recipe.device}
    pruning = {**common, **recipe.prune.model_dump(mode="json"), "calibration": _data(recipe.prune.calibration)}
    training = {**common, **recipe.train.model_dump(mode="json"), "dataset": _data(recipe.dataset)}

    def fit(model: str | Path, folder: str) -> None:
        options = recipe.train.model_dump()
        train(model, out / folder, data=recipe.dataset, seed=recipe.seed, device=recipe.device, **options)

    def cut() -> None:
        prune(base, out / "pruned", seed=recipe.seed, device=recipe.device, **dict(recipe.prune))

    def widen() -> None:
        recover(out / "adapter", out / "recovered")

    made = {
        "pruned": state.stage("pruned", pruning, cut),
        "pruned + adapter": state.stage(
            "adapter", {**training, "pruning": pruning}, lambda: fit(out / "pruned", "adapter")
        ),
        "recovered": state.stage("recovered", {"training": training, "pruning": pruning}, widen),
    }
    models: dict[str, tuple[str | Path, Path | None]] = {"base": (base, None)}
    if recipe.evaluate.full_lora:
        made["full LoRA"] = state.stage("full_lora", training, lambda: fit(base, "full_lora"))
        models["full LoRA"] = (base, out / "full_lora")
    models |= {
        "pruned": (out / "pruned", None),
        "pruned + adapter": (out / "pruned", out / "adapter"),
        "recovered": (base, out / "recovered"),
    }
    adapters = {"pruned + adapter": out / "adapter", "full LoRA": out / "full_lora"}
    trained = {name: _trained_on(folder) for name, folder in adapters.items() if name in made}
    rows = []
    for name, (model, adapter) in models.items():
        found = {dataset: _evaluation(state, recipe, name, dataset, model, adapter) for dataset in recipe.eval_dataset}
        rows.append(_row(name, made.get(name), found, trained.get(name)))
    return state.finish(tuple(rows))


def _evaluation(state: _Run, recipe: Recipe, name: str, dataset: str, model: str | Path, adapter: Path | None) -> _Done:
    spec, options = recipe.eval_dataset[dataset], recipe.evaluate
    settings = {
        "dataset": _data(spec),
        "max_samples": options.max_samples,
        "max_length": options.max_length,
        "model": open_model(model).fingerprint,
        "adapter": None if adapter is None else _fingerprint(adapter),
    }
    return state.stage(
        f"evaluate {name} on {dataset}",
        settings,
        lambda: evaluate(
            model,
            adapter=adapter,
            data=spec,
            max_samples=options.max_samples,
            max_length=options.max_length,
            stream=options.stream,
            device=recipe.device,
        ),
    )


def _row(name: str, made: _Done | None, found: Mapping[str, _Done], trained_on: RowCounts | None) -> Row:
    reports = {dataset: done.report for dataset, done in found.items() if done.report is not None}
    costs = [done.cost for done in found.values() if done.cost is not None]  # evaluations always have one
    return Row(
        name=name,
        parameters=next(iter(reports.values())).parameters,
        perplexity={dataset: report.perplexity for dataset, report in reports.items()},
        tokens={dataset: report.tokens for dataset, report in reports.items()},
        evaluated_on={
            dataset: RowCounts(used=report.rows, truncated=report.rows_truncated, skipped=report.rows_skipped)
            for dataset, report in reports.items()
        },
        trained_on=trained_on,
        made=made.cost if made else None,
        evaluated=Cost(seconds=sum(cost.seconds for cost in costs), peak_rss=max(cost.peak_rss for cost in costs)),
    )


def _trained_on(adapter: Path) -> RowCounts:
    manifest = find_manifest(adapter)
    assert manifest is not None, adapter
    found = manifest.settings
    return RowCounts(used=found["rows"], truncated=found["rows_truncated"], skipped=found["rows_skipped"])


def _fingerprint(folder: Path) -> str:
    manifest = find_manifest(folder)
    assert manifest is not None, folder
    return manifest.fingerprint


def _data(spec: DataSpec | None) -> dict[str, Any] | None:
    return None if spec is None else {**spec.model_dump(mode="json"), "sha256": file_digest(spec)}
