"""Run a recipe: stages in order, each a folder; finished ones are skipped, stale ones refused."""

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loram.align.options import check_options as check_align_options
from loram.align.spec import AlignSpec
from loram.align.stage import align
from loram.artifacts import difference, find_manifest, library_versions, sync
from loram.data import load_rows
from loram.data_spec import DataSpec
from loram.errors import UserError, first_problem
from loram.evaluate import Report, evaluate
from loram.merge import merge
from loram.methods.table import METHODS
from loram.model.architecture import architecture_of
from loram.model.checkpoint import Checkpoint, open_model
from loram.model.device import peak_rss, reset_peak_rss
from loram.model.plan import PruningPlan
from loram.model.pruned import open_full
from loram.model.teacher import TeacherCache
from loram.options import TrainOptions, check_options
from loram.prune.settings import check_counts
from loram.prune.stage import check_weights, prune
from loram.recipe import PruneSection, Recipe, file_digest
from loram.recover import recover
from loram.report import Cost, Row, RowCounts, RunReport, kept_gain, together
from loram.teach import teach
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
    teachers = [path.name for path in out.glob("teacher-[0-9]*") if not path.name.endswith("-parts")]
    for name in ("pruned", "aligned", "adapter", "recovered", "merged", "full_lora", *teachers):
        for path in (out / name, out / f"{name}-checkpoints", out / f"{name}-parts"):
            shutil.rmtree(path, ignore_errors=True)
    for name in (STATE_NAME, REPORT_NAME):
        (out / name).unlink(missing_ok=True)


def check(recipe: Recipe) -> None:
    """Find what would stop a run before any of it begins: model, data, options.

    Raises:
        UserError: the first problem.
    """
    checkpoint = open_model(recipe.model_name_or_path)
    if recipe.prune is not None:
        _check_pruning(checkpoint, recipe.prune)
    elif not checkpoint.pruned:
        raise UserError(
            f"prune: missing, and {checkpoint.name} is a full model; add the section, or name a pruned folder"
        )
    check_options(TrainOptions(**recipe.train.model_dump()))
    if recipe.train.mask_update and not (checkpoint.sparse if recipe.prune is None else recipe.prune.settled().sparse):
        raise UserError("train.mask_update: is for sparse models; set prune.pattern to 4:8, or leave it out")
    specs = [recipe.dataset, *recipe.eval_dataset.values(), recipe.recover.dev_dataset]
    if recipe.align is not None:
        check_align_options(recipe.align.trainer)
        specs += [*recipe.align.dataset, recipe.align.probe_dataset]
        for cache in recipe.align.teacher:
            TeacherCache(Path(cache.path))
    for section, options in (("train", recipe.train), ("align", recipe.align)):
        if options is not None and "seed" in options.trainer:
            raise UserError(f"{section}.trainer.seed: set the recipe's own seed, which every stage uses")
    for spec in specs:
        if spec is not None:
            load_rows(spec)


def _check_pruning(checkpoint: Checkpoint, section: PruneSection) -> None:
    architecture = architecture_of(checkpoint.config, checkpoint.name)
    check_weights(checkpoint, architecture)
    try:
        check_counts(section.settled(), checkpoint.geometry, architecture.model_type)
    except UserError as error:
        raise UserError(f"prune.{error}") from error


def run(recipe: Recipe, *, fresh: bool = False) -> RunReport:
    """Prune, align, train, recover, evaluate and compare: of these what the recipe has.

    Leaves `pruned/`, `aligned/`, `adapter/`, `recovered/` (`merged/` of masked updates) and, if asked, `full_lora/`
    under `output_dir`, each complete by itself, and `report.json`. A second run with the same recipe does only what is
    missing, and goes on with a training that was interrupted. `fresh` removes what an earlier run left there and starts
    over.

    Raises:
        UserError: the recipe cannot be run, or what is in `output_dir` was made with another one.
    """
    check(recipe)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    if fresh:
        _start_over(recipe.output_dir)
    state = _Run(recipe)
    small = _shrink(state, recipe)
    made: Mapping[str, _Done] = small.made
    adapters: Mapping[str, Path] = {}
    if recipe.dataset is not None:
        made, adapters = _adapt(state, recipe, small, recipe.dataset)
    trained = {name: _trained_on(folder) for name, folder in adapters.items()}
    if not recipe.eval_dataset:
        return state.finish(tuple(_row(name, small.parameters, done, {}, None) for name, done in made.items()))
    rows = []
    for name, (model, adapter) in _compared(recipe, small).items():
        found = {dataset: _evaluation(state, recipe, name, dataset, model, adapter) for dataset in recipe.eval_dataset}
        rows.append(_row(name, small.parameters, made.get(name), found, trained.get(name)))
    return state.finish(tuple(rows))


@dataclass(frozen=True, kw_only=True)
class _Small:
    """The small model of a run.

    Args:
        folders: pruned and, if so, aligned -> where it is; the last one is trained on.
        plan: what was pruned.
        made: what was made in this run, by the rows of the report.
        settings: what the last one was made with.
    """

    folders: Mapping[str, Path]
    plan: PruningPlan
    made: Mapping[str, _Done]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What is trained on: pruned or aligned."""
        return list(self.folders)[-1]

    @property
    def folder(self) -> Path:
        """Where that is."""
        return self.folders[self.name]

    @property
    def parameters(self) -> int:
        """How many it has."""
        return self.plan.parameters()[1]


def _shrink(state: _Run, recipe: Recipe) -> _Small:
    """Prune and align, as far as the recipe says so."""
    if recipe.prune is None:
        folder = open_model(recipe.model_name_or_path).folder
        small = _Small(folders={"pruned": folder}, plan=PruningPlan.load(folder), made={}, settings={})
    else:
        small = _prune(state, recipe, recipe.prune)
    return small if recipe.align is None else _align(state, recipe, small, recipe.align)


def _prune(state: _Run, recipe: Recipe, section: PruneSection) -> _Small:
    folder = recipe.output_dir / "pruned"
    told = {**section.model_dump(mode="json"), "calibration": _data(section.calibration)}
    pruning = {**_common(recipe), **told, **dataclasses.asdict(section.settled())}

    def action() -> None:
        prune(recipe.model_name_or_path, folder, seed=recipe.seed, device=recipe.device, **dict(section))

    done = state.stage("pruned", pruning, action)
    return _Small(
        folders={"pruned": folder},
        plan=PruningPlan.load(folder),
        made={"pruned": done},
        settings={"pruning": pruning},
    )


def _align(state: _Run, recipe: Recipe, small: _Small, section: AlignSpec) -> _Small:
    folder, base = recipe.output_dir / "aligned", _base(recipe, small.plan)
    aligning = {
        **_common(recipe),
        **small.settings,
        **section.model_dump(mode="json"),
        "dataset": [_data(spec) for spec in section.dataset],
        "probe_dataset": _data(section.probe_dataset),
        "teach": None if recipe.teach is None else recipe.teach.model_dump(mode="json"),
    }
    options: dict[str, Any] = dict(section)
    costs: list[Cost | None] = []
    if recipe.teach is not None:
        costs = [_teach(state, recipe, number, base) for number in range(len(section.dataset))]
        options |= {
            "dataset": (),
            "teacher": [
                {"path": str(_teacher(recipe, number)), "weight": spec.weight}
                for number, spec in enumerate(section.dataset)
            ],
        }
        if section.probe_dataset is None:  # then no row is read whose length is still to be decided
            options["trainer"] = {key: value for key, value in section.trainer.items() if key != "max_length"}
    data, probe_data = options.pop("dataset"), options.pop("probe_dataset")

    def action() -> None:
        options.update(base=base, seed=recipe.seed, device=recipe.device)
        align(small.folder, folder, data=data, probe_data=probe_data, **options)

    done = state.stage("aligned", aligning, action)
    done = done.model_copy(update={"cost": together([*costs, done.cost])})
    return dataclasses.replace(
        small,
        folders={**small.folders, "aligned": folder},
        made={**small.made, "aligned": done},
        settings={**small.settings, "aligning": aligning},
    )


def _teacher(recipe: Recipe, number: int) -> Path:
    return recipe.output_dir / f"teacher-{number + 1}"


def _teach(state: _Run, recipe: Recipe, number: int, base: str) -> Cost | None:
    """Cache what the full model predicts on one of the data sets of `align`; returns what that took."""
    assert recipe.teach is not None
    assert recipe.align is not None
    options = {
        **recipe.teach.model_dump(mode="json"),
        "max_length": check_align_options(recipe.align.trainer)["max_length"],
    }
    folder, spec = _teacher(recipe, number), recipe.align.dataset[number]

    def action() -> None:
        teach(base, folder, data=spec.unweighted(), device=recipe.device, **options)

    return state.stage(folder.name, {**_common(recipe), **options, "dataset": _data(spec.unweighted())}, action).cost


def _adapt(state: _Run, recipe: Recipe, small: _Small, dataset: DataSpec) -> tuple[dict[str, _Done], dict[str, Path]]:
    """Train and recover; returns what was made in all and the trained adapters, by the rows of the report."""
    out, base = recipe.output_dir, _base(recipe, small.plan)
    training = {**_common(recipe), **recipe.train.model_dump(mode="json"), "dataset": _data(dataset)}
    recovering = {"correct": recipe.recover.correct, "dev_dataset": _data(recipe.recover.dev_dataset)}

    options = recipe.train.model_dump()

    def fit(model: str | Path, folder: str, **changed: Any) -> None:
        train(model, out / folder, data=dataset, seed=recipe.seed, device=recipe.device, **{**options, **changed})

    final = _final(recipe)

    def widen() -> None:
        if final == "merged":
            merge(base, out / "adapter", out / final)
            return
        chosen = recipe.recover
        recover(
            out / "adapter",
            out / final,
            correct=chosen.correct,
            dev_data=chosen.dev_dataset,
            base=base,
            pruned=small.folder,
            device=recipe.device,
        )

    adapters = {f"{small.name} + adapter": out / "adapter"}
    made = {
        **small.made,
        f"{small.name} + adapter": state.stage(
            "adapter", {**training, **small.settings}, lambda: fit(small.folder, "adapter", base=base)
        ),
        final: state.stage(final, {"training": training, **small.settings, **recovering}, widen),
    }
    if recipe.evaluate.full_lora:
        made["full LoRA"] = state.stage("full_lora", training, lambda: fit(base, "full_lora", anchor_steps=None))
        adapters["full LoRA"] = out / "full_lora"
    return made, adapters


def _compared(recipe: Recipe, small: _Small) -> dict[str, tuple[str | Path, Path | None]]:
    """The rows of the report: name -> (model, adapter). From here on the full model is needed."""
    base, out = _base(recipe, small.plan), recipe.output_dir
    open_full(small.plan, base)
    models: dict[str, tuple[str | Path, Path | None]] = {"base": (base, None)}
    if recipe.evaluate.full_lora:
        made = out / "full_lora"
        models["full LoRA"] = (made, None) if METHODS[recipe.train.method].weights else (base, made)
    models |= {name: (folder, None) for name, folder in small.folders.items()}
    if recipe.dataset is not None:
        models[f"{small.name} + adapter"] = (small.folder, out / "adapter")
        final = _final(recipe)
        models[final] = (out / final, None) if final == "merged" else (base, out / final)
    return models


def _final(recipe: Recipe) -> str:
    """What the full model gets of the adapter: masked updates can only be merged."""
    return "merged" if recipe.train.mask_update else "recovered"


def _common(recipe: Recipe) -> dict[str, Any]:
    model = open_model(recipe.model_name_or_path)
    return {"base": model.fingerprint, "seed": recipe.seed, "device": recipe.device}


def _base(recipe: Recipe, plan: PruningPlan) -> str:
    """The full model, by the name that the recipe has for it, else the plan."""
    if recipe.prune is not None:
        return recipe.model_name_or_path
    return recipe.base_model_name_or_path or plan.base.name


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


def _row(
    name: str, parameters: int, made: _Done | None, found: Mapping[str, _Done], trained_on: RowCounts | None
) -> Row:
    """A row of the report; `parameters` where nothing was evaluated, which would count them."""
    reports = {dataset: done.report for dataset, done in found.items() if done.report is not None}
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
        made=made.cost if made else None,
        evaluated=together([done.cost for done in found.values()]),
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
