"""The stages of a run as a table: which recipe has one, what decides its outcome, and how its folder is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loram.alignment.align import align
from loram.alignment.options import AlignOptions, TeachOptions, resolve_trainer
from loram.alignment.teach import teach
from loram.data.spec import DataSpec, WeightedSpec, one_or_all
from loram.disk.artifacts import edited_template, find_manifest
from loram.disk.opening import open_model
from loram.disk.template import as_setting
from loram.export.merge import merge
from loram.model.plan import PruningPlan
from loram.pruning.prune import prune
from loram.recovery.recover import recover
from loram.run.recipe import Recipe, file_digest
from loram.run.record import Done, Record
from loram.run.report import Cost, together
from loram.training.methods.table import METHODS
from loram.training.options import TrainOptions, resolve
from loram.training.polish import polish
from loram.training.train import train

Evaluated = tuple[str | Path, Path | None]  # a model, and the adapter on it if there is one


@dataclass(kw_only=True)
class Run:
    """A recipe on its way: its record, and the stages that are done.

    Args:
        recipe: the recipe.
        record: what has been done in its output folder.
        callbacks: transformers' callbacks for the trainings.
        done: the stages of this run that are done, by the name of their folder.
    """

    recipe: Recipe
    record: Record
    callbacks: Sequence[TrainerCallback] = ()
    done: dict[str, Done] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.recipe.output_dir / name

    @cached_property
    def pruned(self) -> Path:
        """The pruned folder: that of this run, or the one that the recipe begins with."""
        recipe = self.recipe
        return self.folder(PRUNED.folder) if recipe.prune is not None else open_model(recipe.model_name_or_path).folder

    @cached_property
    def plan(self) -> PruningPlan:
        """Return the plan: what the small model keeps of the full one."""
        return PruningPlan.load(self.pruned)

    @property
    def small_models(self) -> dict[str, Path]:
        """The row of the report of each small model -> its folder; the last one is trained on."""
        models = {"pruned": self.pruned}
        return models if self.recipe.align is None else {**models, "aligned": self.folder(ALIGNED.folder)}

    @property
    def small(self) -> tuple[str, Path]:
        """(row of the report, folder) of the small model that is trained on."""
        return list(self.small_models.items())[-1]

    @property
    def base(self) -> str:
        """The full model, by the name that the recipe has for it, else by the plan's."""
        if self.recipe.prune is not None:
            return self.recipe.model_name_or_path
        return self.recipe.base_model_name_or_path or self.plan.base.name

    @property
    def polished_on(self) -> Sequence[WeightedSpec]:
        """The data sets that a recipe polishes on."""
        section = self.recipe.polish
        return self.recipe.dataset if section is None else section.dataset or self.recipe.dataset

    @cached_property
    def common(self) -> dict[str, Any]:
        """The settings that decide the outcome of every stage."""
        model = open_model(self.recipe.model_name_or_path, chat_template=self.recipe.chat_template_path)
        chosen = as_setting(model.chat_template)
        return {"base": model.fingerprint, "seed": self.recipe.seed, "device": self.recipe.device, **chosen}

    @property
    def where(self) -> dict[str, Any]:
        """The keyword arguments that every stage takes from the recipe."""
        return {"seed": self.recipe.seed, "device": self.recipe.device, "chat_template": self.chat_template}

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template of every stage: the recipe's, or one that was put into the folder that it begins with."""
        if self.recipe.chat_template_path is not None or self.recipe.prune is not None:
            return self.recipe.chat_template_path
        edited = edited_template(self.pruned)
        return None if edited is None else str(edited)

    def perform(self, *stages: "Stage") -> None:
        """Do the stages that the recipe has, in order; finished ones are skipped."""
        for stage in stages:
            for number, name in enumerate(stage.folders(self.recipe)):
                action = _bound(stage.action, self, number, self.folder(name))
                self.done[name] = self.record.stage(name, stage.settings(self, number), action)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run: a folder that is made from other folders.

    Args:
        folder: the name of its folder below `output_dir` and of its entry in the record; `{number}` in it counts from 1
            where there are several.
        count: how many folders of this kind a recipe asks for; 0 where it has no such stage.
        settings: all that decides the outcome, as JSON values, by run and number.
        action: makes the folder, by run, number and its path.
        row: the row of the report; empty where it has none.
        evaluated: the model and adapter that the row evaluates.
        trains: whether training rows are counted in its manifest.
        on_full: whether the row is about the full model; recipes that train run their tasks on these rows alone.
    """

    folder: str
    count: Callable[[Recipe], int]
    settings: Callable[[Run, int], dict[str, Any]]
    action: Callable[[Run, int, Path], object]
    row: Callable[[Run], str] = lambda run: ""
    evaluated: Callable[[Run], Evaluated] = lambda run: (run.base, None)
    trains: bool = False
    on_full: bool = False

    def folders(self, recipe: Recipe) -> list[str]:
        """Return the names of the folders that a recipe has of this stage."""
        return [self.folder.format(number=number + 1) for number in range(self.count(recipe))]


def _bound(action: Callable[[Run, int, Path], object], run: Run, number: int, out: Path) -> Callable[[], None]:
    def perform() -> None:
        action(run, number, out)

    return perform


def _pruning(run: Run, number: int = 0) -> dict[str, Any]:
    section = run.recipe.pruning
    assert section is not None
    options = section.resolved().model_dump(mode="json")
    texts = {"calibration": described(section.calibration), "refit_dataset": described(section.refit_dataset)}
    return {**run.common, **options, **texts}


def _teaching(run: Run, number: int) -> dict[str, Any]:
    options = _teach_options(run.recipe).model_dump(mode="json")
    return {**run.common, **options, "dataset": described(_alignment(run.recipe).dataset[number].unweighted())}


def _aligning(run: Run, number: int = 0) -> dict[str, Any]:
    section, teach_section = _alignment(run.recipe), run.recipe.teach
    return {
        **run.common,
        **_of_small(run, aligned=False),
        **section.model_dump(mode="json"),
        "dataset": [described(spec) for spec in section.dataset],
        "teacher": [{**cache.model_dump(mode="json"), "content": cache.path} for cache in section.teacher],
        "probe_dataset": described(section.probe_dataset),
        "teach": None if teach_section is None else teach_section.model_dump(mode="json", exclude={"max_length"}),
    }


def _of_small(run: Run, *, aligned: bool = True) -> dict[str, Any]:
    """Return the settings that the small model was made with in this run."""
    settings = {} if run.recipe.prune is None else {"pruning": _pruning(run)}
    return {**settings, "aligning": _aligning(run)} if aligned and run.recipe.align is not None else settings


def _training(run: Run, number: int = 0) -> dict[str, Any]:
    return {**run.common, **run.recipe.train.model_dump(), "dataset": all_described(run.recipe.dataset)}


def _recovering(run: Run, number: int) -> dict[str, Any]:
    options = dict(run.recipe.recover).items()
    chosen = {name: described(value) if isinstance(value, DataSpec) else value for name, value in options}
    return {"training": _training(run), **_of_small(run), **chosen}


def _polishing(run: Run, number: int) -> dict[str, Any]:
    dataset = all_described(run.polished_on)
    adapter = fingerprint(run.folder(RECOVERED.folder))
    return {**run.common, **_polish_options(run.recipe), "dataset": dataset, "adapter": adapter}


def _tuning(run: Run, number: int) -> dict[str, Any]:
    return {**run.common, **run.recipe.train.model_dump(), "dataset": all_described(run.recipe.dataset)}


def _align(run: Run, number: int, out: Path) -> None:
    section = _alignment(run.recipe)
    options = section if run.recipe.teach is None else _from_caches(run, section)
    align(run.pruned, out, options=options, base=run.base, **run.where)


def _polish(run: Run, number: int, out: Path) -> None:
    section, adapter = run.recipe.polish, run.folder(RECOVERED.folder)
    assert section is not None
    polish(run.base, adapter, out, data=run.polished_on, **_polish_options(run.recipe), **run.where)


def _train(run: Run, model: str | Path, out: Path, options: TrainOptions, **changed: Any) -> None:
    train(model, out, data=run.recipe.dataset, options=options, callbacks=run.callbacks, **run.where, **changed)


PRUNED: Stage = Stage(
    folder="pruned",
    count=lambda recipe: int(recipe.prune is not None),
    settings=_pruning,
    action=lambda run, number, out: prune(run.recipe.model_name_or_path, out, options=run.recipe.pruning, **run.where),
    row=lambda run: "pruned",
    evaluated=lambda run: (run.pruned, None),
)
TEACHERS: Stage = Stage(
    folder="teacher-{number}",
    count=lambda recipe: 0 if recipe.teach is None else len(_alignment(recipe).dataset),
    settings=_teaching,
    action=lambda run, number, out: teach(
        run.base,
        out,
        data=_alignment(run.recipe).dataset[number].unweighted(),
        options=_teach_options(run.recipe),
        device=run.recipe.device,
        chat_template=run.chat_template,
    ),
)
ALIGNED: Stage = Stage(
    folder="aligned",
    count=lambda recipe: int(recipe.align is not None),
    settings=_aligning,
    action=_align,
    row=lambda run: "aligned",
    evaluated=lambda run: (run.folder(ALIGNED.folder), None),
)
ADAPTER: Stage = Stage(
    folder="adapter",
    count=lambda recipe: int(bool(recipe.dataset)),
    settings=lambda run, number: {**_training(run), **_of_small(run)},
    action=lambda run, number, out: _train(run, run.small[1], out, run.recipe.train, base=run.base),
    row=lambda run: f"{run.small[0]} + adapter",
    evaluated=lambda run: (run.small[1], run.folder(ADAPTER.folder)),
    trains=True,
)
RECOVERED: Stage = Stage(
    folder="recovered",
    count=lambda recipe: int(bool(recipe.dataset) and not recipe.train.mask_update),
    settings=_recovering,
    action=lambda run, number, out: recover(
        run.folder(ADAPTER.folder),
        out,
        options=run.recipe.recover,
        base=run.recipe.base_model_name_or_path,
        pruned=run.small[1],
        device=run.recipe.device,
        chat_template=run.chat_template,
    ),
    row=lambda run: "recovered",
    evaluated=lambda run: (run.base, run.folder(RECOVERED.folder)),
    on_full=True,
)
MERGED: Stage = Stage(  # a masked update cannot be recovered, only merged
    folder="merged",
    count=lambda recipe: int(bool(recipe.dataset) and recipe.train.mask_update),
    settings=_recovering,
    action=lambda run, number, out: merge(run.base, run.folder(ADAPTER.folder), out),
    row=lambda run: "merged",
    evaluated=lambda run: (run.folder(MERGED.folder), None),
    on_full=True,
)
POLISHED: Stage = Stage(
    folder="polished",
    count=lambda recipe: int(recipe.polish is not None),
    settings=_polishing,
    action=_polish,
    row=lambda run: "polished",
    evaluated=lambda run: (run.base, run.folder(POLISHED.folder)),
    on_full=True,
)
FULL_LORA: Stage = Stage(
    folder="full_lora",
    count=lambda recipe: int(recipe.compares),
    settings=_training,
    action=lambda run, number, out: _train(run, run.base, out, run.recipe.train, anchor_steps=0),
    row=lambda run: "full LoRA",
    evaluated=lambda run: _on_full(run, FULL_LORA),
    trains=True,
    on_full=True,
)
TUNED: Stage = Stage(  # a variant of a comparison that trains on the full model
    folder="tuned",
    count=lambda recipe: 1,
    settings=_tuning,
    action=lambda run, number, out: _train(run, run.recipe.model_name_or_path, out, run.recipe.train),
    evaluated=lambda run: _on_full(run, TUNED),
    trains=True,
)
SHRINKING = (PRUNED, TEACHERS, ALIGNED)
ADAPTING = (ADAPTER, RECOVERED, MERGED, POLISHED)
EVERY = (*SHRINKING, *ADAPTING, FULL_LORA, TUNED)


def final_of(recipe: Recipe) -> Stage:
    """Return the stage that a run of a recipe that trains is about: the full model with what was trained."""
    return next(stage for stage in (POLISHED, RECOVERED, MERGED) if stage.count(recipe))


def rows_of(run: Run) -> dict[str, Stage]:
    """Return the rows of the report below the base, in order: name -> the stage that made it."""
    stages = (FULL_LORA, PRUNED, ALIGNED, *ADAPTING)
    return {stage.row(run): stage for stage in stages if stage is PRUNED or stage.count(run.recipe)}


def cost_of(run: Run, stage: Stage) -> Cost | None:
    """Return what a stage took in this run; alignment also counts the caches that were made for it."""
    teachers = TEACHERS.folders(run.recipe) if stage is ALIGNED else []
    return together([run.done[name].cost for name in (*teachers, stage.folder) if name in run.done])


def described(spec: DataSpec | None) -> dict[str, Any] | None:
    """Return a data set as settings have it: what it is called, and the digest of its content, which counts."""
    return None if spec is None else {**spec.model_dump(mode="json"), "content": file_digest(spec)}


def all_described(specs: Sequence[WeightedSpec]) -> Any:
    """Return the data sets of a training as settings have them."""
    return one_or_all([described(spec) for spec in specs])


def fingerprint(folder: Path) -> str:
    """Return the fingerprint of a folder that a stage made."""
    manifest = find_manifest(folder)
    assert manifest is not None, folder
    return manifest.fingerprint


def _alignment(recipe: Recipe) -> AlignOptions:
    assert recipe.align is not None
    return recipe.align


def _teach_options(recipe: Recipe) -> TeachOptions:
    """Return the options of `teach`, whose rows are as long as those of the alignment."""
    return TeachOptions.of(recipe.teach, max_length=resolve_trainer(_alignment(recipe).trainer)["max_length"])


def _from_caches(run: Run, section: AlignOptions) -> AlignOptions:
    """Return the options of `align` with the folders that `teach` wrote in place of its data sets."""
    caches = [
        {"path": str(run.folder(name)), "weight": spec.weight}
        for name, spec in zip(TEACHERS.folders(run.recipe), section.dataset, strict=True)
    ]
    trainer = dict(section.trainer)
    if section.probe_dataset is None:  # then no row is read whose length is still to be decided
        trainer.pop("max_length", None)
    return AlignOptions.of(section, dataset=(), teacher=caches, trainer=trainer)


def _polish_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options of `polish`; its learning rate is that of training where none is given."""
    section = recipe.polish
    assert section is not None
    chosen = section.model_dump(exclude={"dataset"})
    if section.learning_rate is None:
        chosen["learning_rate"] = float(resolve(recipe.train).trainer["learning_rate"])
    return chosen


def _on_full(run: Run, stage: Stage) -> Evaluated:
    """Return what a training on the full model made: a model if weights train, else an adapter on the base."""
    folder = run.folder(stage.folder)
    return (folder, None) if METHODS[run.recipe.train.method].weights else (run.base, folder)
