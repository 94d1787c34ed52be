"""What the stages of a recipe make: the small model, adapters, evaluations; each once, by the record of the run."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loram.alignment.align import align
from loram.alignment.options import AlignOptions, TeachOptions, resolve_trainer
from loram.alignment.teach import teach
from loram.data.spec import DataSpec
from loram.disk.artifacts import find_manifest
from loram.disk.opening import open_model
from loram.evaluation.evaluate import evaluate
from loram.evaluation.options import EvaluateOptions
from loram.export.merge import merge
from loram.model.plan import PruningPlan
from loram.pruning.options import PruneOptions
from loram.pruning.prune import prune
from loram.recovery.polish import polish
from loram.recovery.recover import recover
from loram.run.recipe import PolishSection, Recipe, file_digest
from loram.run.record import Done, Record
from loram.run.report import Cost, Row, RowCounts, together
from loram.training.methods.table import ANCHOR_STEPS, METHODS
from loram.training.options import TrainOptions, resolve, why_not_anchored
from loram.training.train import train


@dataclass(frozen=True, kw_only=True)
class Small:
    """The small model of a run.

    Args:
        folders: pruned and, if so, aligned -> where it is; the last one is trained on.
        plan: what was pruned.
        made: what was made in this run, by the rows of the report.
        settings: what the last one was made with.
    """

    folders: Mapping[str, Path]
    plan: PruningPlan
    made: Mapping[str, Done]
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


def shrink(state: Record, recipe: Recipe) -> Small:
    """Prune and align, as far as the recipe says so."""
    if recipe.prune is None:
        folder = open_model(recipe.model_name_or_path).folder
        small = Small(folders={"pruned": folder}, plan=PruningPlan.load(folder), made={}, settings={})
    else:
        small = _prune(state, recipe, recipe.prune)
    return small if recipe.align is None else _align(state, recipe, small, recipe.align)


def _prune(state: Record, recipe: Recipe, section: PruneOptions) -> Small:
    folder = recipe.output_dir / "pruned"
    options = section.resolved()
    calibration = _data(section.calibration)
    pruning = {**_common(recipe), **options.model_dump(mode="json"), "calibration": calibration}

    def action() -> None:
        prune(recipe.model_name_or_path, folder, options=section, seed=recipe.seed, device=recipe.device)

    done = state.stage("pruned", pruning, action)
    return Small(
        folders={"pruned": folder},
        plan=PruningPlan.load(folder),
        made={"pruned": done},
        settings={"pruning": pruning},
    )


def _align(state: Record, recipe: Recipe, small: Small, section: AlignOptions) -> Small:
    folder, base = recipe.output_dir / "aligned", base_of(recipe, small.plan)
    aligning = {
        **_common(recipe),
        **small.settings,
        **section.model_dump(mode="json"),
        "dataset": [_data(spec) for spec in section.dataset],
        "probe_dataset": _data(section.probe_dataset),
        "teach": None if recipe.teach is None else recipe.teach.model_dump(mode="json", exclude={"max_length"}),
    }
    options, costs = section, []
    if recipe.teach is not None:
        costs = [_teach(state, recipe, number, base) for number in range(len(section.dataset))]
        options = _from_caches(recipe, section)

    def action() -> None:
        align(small.folder, folder, options=options, base=base, seed=recipe.seed, device=recipe.device)

    done = state.stage("aligned", aligning, action)
    done = done.model_copy(update={"cost": together([*costs, done.cost])})
    return dataclasses.replace(
        small,
        folders={**small.folders, "aligned": folder},
        made={**small.made, "aligned": done},
        settings={**small.settings, "aligning": aligning},
    )


def _from_caches(recipe: Recipe, section: AlignOptions) -> AlignOptions:
    """The options of `align` with the folders that `teach` writes in place of its data sets."""
    caches = [
        {"path": str(_teacher(recipe, number)), "weight": spec.weight} for number, spec in enumerate(section.dataset)
    ]
    trainer = dict(section.trainer)
    if section.probe_dataset is None:  # then no row is read whose length is still to be decided
        trainer.pop("max_length", None)
    return AlignOptions.of(section, dataset=(), teacher=caches, trainer=trainer)


def _teacher(recipe: Recipe, number: int) -> Path:
    return recipe.output_dir / f"teacher-{number + 1}"


def _teach(state: Record, recipe: Recipe, number: int, base: str) -> Cost | None:
    """Cache what the full model predicts on one of the data sets of `align`; returns what that took."""
    assert recipe.teach is not None
    assert recipe.align is not None
    length = resolve_trainer(recipe.align.trainer)["max_length"]
    options = TeachOptions.of(recipe.teach, max_length=length)
    folder, spec = _teacher(recipe, number), recipe.align.dataset[number]

    def action() -> None:
        teach(base, folder, data=spec.unweighted(), options=options, device=recipe.device)

    return state.stage(
        folder.name, {**_common(recipe), **options.model_dump(mode="json"), "dataset": _data(spec.unweighted())}, action
    ).cost


def adapt(
    state: Record, recipe: Recipe, small: Small, dataset: DataSpec, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[dict[str, Done], dict[str, Path]]:
    """Train, recover and polish, as far as the recipe says so.

    Returns:
        What was made in all, and the trained adapters, by the rows of the report.
    """
    out, base = recipe.output_dir, base_of(recipe, small.plan)
    options = TrainOptions.of(recipe.train, anchor_steps=anchor_steps(recipe))
    training = {**_common(recipe), **options.model_dump(), "dataset": _data(dataset)}
    recovering = {"correct": recipe.recover.correct, "dev_dataset": _data(recipe.recover.dev_dataset)}

    def fit(model: str | Path, folder: str, **changed: Any) -> None:
        common: dict[str, Any] = {
            "seed": recipe.seed,
            "device": recipe.device,
            "callbacks": callbacks,
            "options": options,
        }
        train(model, out / folder, data=dataset, **{**common, **changed})

    final = final_of(recipe)

    def widen() -> None:
        if final == "merged":
            merge(base, out / "adapter", out / final)
            return
        recover(
            out / "adapter",
            out / final,
            options=recipe.recover,
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
    if recipe.polish is not None:
        made["polished"] = _polish(state, recipe, base, recipe.polish.dataset or dataset, recipe.polish)
    if recipe.evaluate.full_lora:
        made["full LoRA"] = state.stage("full_lora", training, lambda: fit(base, "full_lora", anchor_steps=0))
        adapters["full LoRA"] = out / "full_lora"
    return made, adapters


def anchor_steps(recipe: Recipe) -> int:
    """As the recipe says; where it does not, the default if it prunes, so that the full model is at hand."""
    if (chosen := recipe.train.anchor_steps) is not None:
        return chosen
    possible = recipe.prune is not None and why_not_anchored(recipe.train) is None
    return ANCHOR_STEPS if possible else 0


def _polish(state: Record, recipe: Recipe, base: str, dataset: DataSpec, section: PolishSection) -> Done:
    """Train the recovered adapter a few steps on, on the full model."""
    adapter, folder = recipe.output_dir / "recovered", recipe.output_dir / "polished"
    chosen = section.model_dump(exclude={"dataset"})
    if section.learning_rate is None:
        chosen["learning_rate"] = float(resolve(recipe.train).trainer["learning_rate"])
    settings = {**_common(recipe), **chosen, "dataset": _data(dataset), "adapter": _fingerprint(adapter)}

    def action() -> None:
        polish(base, adapter, folder, data=dataset, seed=recipe.seed, device=recipe.device, **chosen)

    return state.stage("polished", settings, action)


def tune(
    state: Record, recipe: Recipe, dataset: DataSpec, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[Done, tuple[str | Path, Path | None]]:
    """Train on the full model itself.

    Returns:
        What was done, and what to evaluate: model and adapter.
    """
    model, out, options = recipe.model_name_or_path, recipe.output_dir / "tuned", recipe.train

    def action() -> None:
        train(model, out, data=dataset, options=options, seed=recipe.seed, device=recipe.device, callbacks=callbacks)

    settings = {**_common(recipe), **options.model_dump(), "dataset": _data(dataset)}
    done = state.stage("tuned", settings, action)
    return done, ((out, None) if METHODS[recipe.train.method].weights else (model, out))


def final_of(recipe: Recipe) -> str:
    """What the full model gets of the adapter: masked updates can only be merged."""
    return "merged" if recipe.train.mask_update else "recovered"


def judged(recipe: Recipe, base: str) -> dict[str, tuple[str | Path, Path | None]]:
    """The full model with what was trained, by the rows of the report: (model, adapter). The last one counts."""
    out, final = recipe.output_dir, final_of(recipe)
    found: dict[str, tuple[str | Path, Path | None]] = {
        final: (out / final, None) if final == "merged" else (base, out / final)
    }
    return found if recipe.polish is None else {**found, "polished": (base, out / "polished")}


def _common(recipe: Recipe) -> dict[str, Any]:
    model = open_model(recipe.model_name_or_path)
    return {"base": model.fingerprint, "seed": recipe.seed, "device": recipe.device}


def base_of(recipe: Recipe, plan: PruningPlan) -> str:
    """The full model, by the name that the recipe has for it, else the plan."""
    if recipe.prune is not None:
        return recipe.model_name_or_path
    return recipe.base_model_name_or_path or plan.base.name


def evaluation(state: Record, recipe: Recipe, name: str, dataset: str, model: str | Path, adapter: Path | None) -> Done:
    """Perplexity of a model, with an adapter or without, on one of the recipe's evaluation data sets."""
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
            options=EvaluateOptions.of(**options.model_dump(exclude={"full_lora"})),
            device=recipe.device,
        ),
    )


def row_of(
    name: str, parameters: int, made: Done | None, found: Mapping[str, Done], trained_on: RowCounts | None
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


def trained_on(adapter: Path) -> RowCounts:
    """What became of the rows that an adapter was trained on."""
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
