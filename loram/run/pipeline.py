"""Run a recipe: stages in order, each a folder; finished ones are skipped, stale ones refused."""

from collections.abc import Mapping
from pathlib import Path

from loram.alignment.options import check_options as check_align_options
from loram.alignment.teacher import TeacherCache
from loram.base.errors import UserError
from loram.compute.loading import open_full
from loram.data.tokens import load_rows
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.model.families import architecture_of
from loram.pruning.prune import check_weights
from loram.pruning.settings import check_counts
from loram.run.recipe import PruneSection, Recipe
from loram.run.record import Done, Record, start_over
from loram.run.report import RunReport
from loram.run.stages import Small, adapt, asked, base_of, evaluation, judged, row_of, shrink, trained_on
from loram.training.methods.table import METHODS
from loram.training.options import check_options


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
    check_options(asked(recipe))
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
    check_weights(checkpoint)
    try:
        check_counts(section.settled(), checkpoint.geometry, architecture.model_type)
    except UserError as error:
        raise UserError(f"prune.{error}") from error


def run(recipe: Recipe, *, fresh: bool = False) -> RunReport:
    """Prune, align, train, recover, evaluate and compare: of these what the recipe has.

    Leaves `pruned/`, `aligned/`, `adapter/`, `recovered/` (`merged/` of masked updates) and, if asked, `polished/` and
    `full_lora/` under `output_dir`, each complete by itself, and `report.json`. A second run with the same recipe does
    only what is missing, and goes on with a training that was interrupted. `fresh` removes what an earlier run left
    there and starts over.

    Raises:
        UserError: the recipe cannot be run, or what is in `output_dir` was made with another one.
    """
    check(recipe)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    if fresh:
        start_over(recipe.output_dir)
    state = Record(recipe)
    small = shrink(state, recipe)
    made: Mapping[str, Done] = small.made
    adapters: Mapping[str, Path] = {}
    if recipe.dataset is not None:
        made, adapters = adapt(state, recipe, small, recipe.dataset)
    trained = {name: trained_on(folder) for name, folder in adapters.items()}
    if not recipe.eval_dataset:
        return state.finish(tuple(row_of(name, small.parameters, done, {}, None) for name, done in made.items()))
    rows = []
    for name, (model, adapter) in _compared(recipe, small).items():
        found = {dataset: evaluation(state, recipe, name, dataset, model, adapter) for dataset in recipe.eval_dataset}
        rows.append(row_of(name, small.parameters, made.get(name), found, trained.get(name)))
    return state.finish(tuple(rows))


def _compared(recipe: Recipe, small: Small) -> dict[str, tuple[str | Path, Path | None]]:
    """The rows of the report: name -> (model, adapter). From here on the full model is needed."""
    base, out = base_of(recipe, small.plan), recipe.output_dir
    open_full(small.plan, base)
    models: dict[str, tuple[str | Path, Path | None]] = {"base": (base, None)}
    if recipe.evaluate.full_lora:
        made = out / "full_lora"
        models["full LoRA"] = (made, None) if METHODS[recipe.train.method].weights else (base, made)
    models |= {name: (folder, None) for name, folder in small.folders.items()}
    if recipe.dataset is not None:
        models[f"{small.name} + adapter"] = (small.folder, out / "adapter")
        models |= judged(recipe, base)
    return models
