"""Run a recipe: check it, do its stages in order, evaluate what they make."""

from loram.alignment.options import resolve_trainer
from loram.alignment.teacher import TeacherCache
from loram.base.errors import UserError
from loram.compute.device import pick_device
from loram.compute.likelihood import SCORED
from loram.compute.loading import open_full
from loram.data.spec import DataSpec
from loram.data.stream import check_streams, first_rows
from loram.data.tokens import check_rows
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.evaluation.tasks import open_tasks
from loram.model.families import architecture_of
from loram.pruning.check import check_prunable
from loram.pruning.options import PruneOptions
from loram.run.cards import complete_cards
from loram.run.examples import examples_of, held_out_rows
from loram.run.recipe import Recipe
from loram.run.record import Record, start_over
from loram.run.report import RunReport
from loram.run.rows import evaluations, parameters_of, row_of, tasks_of, trained_on
from loram.run.stages import ADAPTING, EVERY, FULL_LORA, SHRINKING, Run, cost_of, final_of, rows_of
from loram.training.methods.table import METHODS
from loram.training.options import resolve


def check(recipe: Recipe) -> None:
    """Find what would stop a run before any of it begins: model, data, options.

    Raises:
        UserError: the first problem.
    """
    checkpoint = open_model(recipe.model_name_or_path, chat_template=recipe.chat_template_path)
    if recipe.prune is not None:
        _check_pruning(checkpoint, recipe.prune)
    elif not checkpoint.pruned:
        raise UserError(
            f"prune: missing, and {checkpoint.name} is a full model; add the section, or name a pruned folder"
        )
    resolve(recipe.train)
    if recipe.train.mask_update and not (checkpoint.sparse if recipe.prune is None else recipe.prune.resolved().sparse):
        raise UserError("train.mask_update: is for sparse models; set prune.pattern to 4:8, or leave it out")
    if recipe.prune is not None and recipe.recover.correct and recipe.prune.resolved().refit:
        raise UserError(
            "recover.correct: would take out what prune.refit makes up for; leave it out, or set refit: false"
        )
    check_streams(recipe.dataset, recipe.train.trainer)
    for rows in recipe.dataset:
        check_rows(first_rows(rows), (METHODS[recipe.train.method].learns,))
    for held_out in recipe.held_out.values():
        check_rows(held_out, SCORED)
    specs: list[DataSpec | None] = [recipe.recover.dev_dataset]
    if recipe.polish is not None:
        check_streams(recipe.polish.dataset, dict(recipe.polish))
        specs += [first_rows(spec) for spec in recipe.polish.dataset]
    if recipe.align is not None:
        resolve_trainer(recipe.align.trainer)
        specs += [*recipe.align.dataset, recipe.align.probe_dataset]
        for cache in recipe.align.teacher:
            TeacherCache(cache.path)
    for section, options in (("train", recipe.train), ("align", recipe.align)):
        if options is not None and "seed" in options.trainer:
            raise UserError(f"{section}.trainer.seed: set the recipe's own seed, which every stage uses")
    for spec in specs:
        if spec is not None:
            check_rows(spec)
    if recipe.tasks is not None:
        open_tasks(checkpoint, recipe.tasks, pick_device(recipe.device))
    for spec in recipe.held_out.values() if recipe.examples else ():
        held_out_rows(spec, recipe.examples)


def _check_pruning(checkpoint: Checkpoint, section: PruneOptions) -> None:
    architecture = architecture_of(checkpoint.config, checkpoint.name)
    try:
        settings = section.resolved()
        settings.check_fits(checkpoint.geometry, architecture, checkpoint.config)
    except UserError as error:
        raise UserError(f"prune.{error}") from error
    check_prunable(checkpoint, settings)


def run(recipe: Recipe, *, fresh: bool = False) -> RunReport:
    """Do the stages that a recipe has, evaluate what they make, and compare. Without held-out rows it only does them.

    Leaves one folder per stage under `output_dir` (`pruned/`, `aligned/`, `adapter/`, `recovered/`, or `merged/` for a
    masked update, and on request `polished/` and `full_lora/`), each complete by itself, and `report.json`. A second
    run with the same recipe does only what is missing, and goes on with a training that was interrupted. `fresh`
    removes what an earlier run left there and starts over.

    Raises:
        UserError: the recipe cannot be run, or what is in `output_dir` was made with another one.
    """
    check(recipe)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    if fresh:
        start_over(recipe.output_dir, [stage.folder.format(number="[0-9]*") for stage in EVERY])
    job = Run(recipe=recipe, record=Record(recipe))
    job.perform(*SHRINKING, *ADAPTING, FULL_LORA)
    stages, parameters = rows_of(job), job.plan.parameters()[0]
    rows = []
    if recipe.held_out or recipe.tasks is not None:
        open_full(job.plan, job.base)  # from here on the full model is needed
        base = (job.base, None)
        rows.append(row_of("base", parameters, None, evaluations(job, "base", base), None, tasks_of(job, "base", base)))
    else:
        stages = {name: stage for name, stage in stages.items() if stage.folder in job.done}
    for name, stage in stages.items():
        counts = trained_on(job.folder(stage.folder)) if stage.trains else None
        model = stage.evaluated(job)
        tasks = tasks_of(job, name, model) if stage.on_full or not recipe.dataset else None
        parameters, evaluated = parameters_of(job, model), evaluations(job, name, model)
        rows.append(row_of(name, parameters, cost_of(job, stage), evaluated, counts, tasks))
    final = final_of(recipe) if recipe.dataset else None
    examples = examples_of(job, final) if final is not None and recipe.examples else ()
    report = job.record.finish(rows, None if final is None else final.row(job), examples)
    folders = {name: job.folder(stage.folder) for name, stage in stages.items() if stage.folder in job.done}
    complete_cards(report, folders, recipe.held_out)
    return report
