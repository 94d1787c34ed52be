"""The commands: what each takes, which function it calls (imported when it is called), and what it prints."""

import json as json_text
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from loram.alignment.options import AlignOptions, TeachOptions
from loram.base import processes
from loram.base.options import Options, option
from loram.cli.console import console as _console
from loram.cli.evaluating import FLAGS as EVALUATION
from loram.cli.evaluating import evaluate
from loram.cli.flags import RUN, Flag, each_of, flags_of, of_several
from loram.cli.generation import CHAT, PROMPTS, chat, generate
from loram.cli.sharing import Push, Report, push, report
from loram.cli.start import Init, init
from loram.data.spec import DataSpec
from loram.export.table import Export, exports
from loram.planner.settings import PlannerOptions
from loram.pruning.options import PruneOptions
from loram.recovery.options import RecoverOptions
from loram.run.recipe import Recipe, load_recipe
from loram.training.options import PolishOptions, TrainOptions


@dataclass(frozen=True, kw_only=True)
class Argument:
    """A part of the line without a flag; of the type list[str] it may be left out, or stand several times."""

    name: str
    type: Any
    help: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its help is the docstring of the function that it calls.

    Args:
        call: takes the arguments by position and the flags that were given by keyword.
        arguments, flags: what stands on the line.
        together: whether several processes of a launcher may do it together.
    """

    call: Callable[..., None]
    arguments: tuple[Argument, ...] = ()
    flags: tuple[Flag, ...] = ()
    together: bool = False


class _Fresh(Options):
    fresh: bool = option(False, "Start over instead of continuing what was interrupted.")


class _Json(Options):
    json_: bool = option(False, "Print one JSON object on stdout and nothing else.", flag="json")


class _DryRun(Options):
    dry_run: bool = option(
        False, "Check everything, show sizes, memory and the tokens of the rows, and write nothing.", common=True
    )
    show_row: int | None = option(
        None, "With --dry-run: show this row of the training data (default: the first two that are used)."
    )


class _Memory(Options):
    memory: str | None = option(
        None, "Find the smallest ratio with which training fits into this much memory: 12GiB, 24GB.", common=True
    )


class _Adapter(Options):
    adapter: Path | None = option(None, "An adapter folder that fits MODEL.", common=True)


class _Start(Options):
    adapter: Path | None = option(None, "Go on training this adapter, which fits MODEL (default: a new one).")


class _Pruned(Options):
    pruned: str | None = option(
        None, "The folder that was trained on, for --correct or 4 bits, if it is not where the adapter says."
    )


MODEL = Argument(name="model", type=str, help="The hub id, folder or .gguf file of a model.")
OUT = Argument(name="out", type=Path, help="The folder to make.")
ADAPTER = Argument(name="adapter", type=Path, help="The folder of a recovered adapter.")
OVERRIDES = Argument(name="overrides", type=list[str], help="Values that replace those of the recipe: key.sub=value.")
DATA = (*flags_of(DataSpec, "Data set", under=("data",)),)
MIXED = (*of_several(flags_of(DataSpec, "Data sets", under=("data",))),)
BASE = (*flags_of(Recipe, RUN, only=("base_model_name_or_path",)),)
SEED, DEVICE, TEMPLATE = (
    tuple(flags_of(Recipe, RUN, only=(name,))) for name in ("seed", "device", "chat_template_path")
)
STARTED = (*flags_of(_Start, RUN),)
FRESH, JSON = (tuple(flags_of(options, RUN)) for options in (_Fresh, _Json))


def _stage(options: type[Options]) -> tuple[Flag, ...]:
    return tuple(flags_of(options, "Further options"))


def _say(result: str) -> None:
    """Print the result of a stage that several processes may share; only the first one does."""
    if processes.first():
        typer.echo(result)


def prune(model: str, out: Path, **options: Any) -> None:
    """Remove units, layers or weights of MODEL: a smaller model.

    Structured pruning removes whole key-value groups, MLP channels and experts, and whole layers; sparse patterns
    remove single weights. The folder has loram_plan.json, which says what was kept.
    """
    from loram.pruning.prune import prune as stage

    full, pruned = stage(model, out, **options).parameters()
    _say(f"{out}: {full:,} -> {pruned:,} parameters ({full / pruned:.2f}x fewer)")


def align(pruned: str, out: Path, **options: Any) -> None:
    """Train a pruned model to predict what the full model predicts.

    All weights of PRUNED train, except the embedding and lm_head; OUT is a pruned folder again.
    """
    from loram.alignment.align import align as stage

    stage(pruned, out, **options)
    _say(f"{out}: aligned model written")


def teach(model: str, out: Path, **options: Any) -> None:
    """Cache what the full model predicts on a text, for alignment.

    MODEL is read from disk layer by layer.
    """
    from loram.alignment.teach import teach as stage

    stage(model, out, **options)
    _say(f"{out}: teacher cache written")


def train(model: str, out: Path, *, data: Mapping[str, Any], **options: Any) -> None:
    """Train an adapter, or weights themselves, on MODEL.

    MODEL is a pruned folder or a full model. The methods lisa and full train the weights themselves.
    """
    from loram.training.train import train as stage

    stage(model, out, data=each_of(data), **options)
    _say(f"{out}: {'adapter' if (out / 'adapter_config.json').exists() else 'model'} written")


def recover(adapter: Path, out: Path, **options: Any) -> None:
    """Widen an adapter of a pruned model so that it fits the full one.

    OUT is a stock PEFT adapter.
    """
    from loram.recovery.recover import recover as stage

    stage(adapter, out, **options)
    typer.echo(f"{out}: recovered adapter written")


def polish(model: str, adapter: Path, out: Path, *, data: Mapping[str, Any], **options: Any) -> None:
    """Train a recovered adapter a few more steps on the full model.

    MODEL is read from disk layer by layer.
    """
    from loram.training.polish import polish as stage

    stage(model, adapter, out, data=each_of(data), **options)
    _say(f"{out}: polished adapter written")


def run(
    recipe: Path,
    overrides: list[str] | None,
    *,
    fresh: bool = False,
    dry_run: bool = False,
    show_row: int | None = None,
    json: bool = False,
) -> None:
    """Run a recipe: prune, align, train, recover, polish, evaluate.

    The recipe's stages run in this order, and stages that are already done are skipped.
    """
    loaded = load_recipe(recipe, overrides)
    if dry_run:
        from loram.run.dry_run import dry_run as compute
        from loram.run.show import show

        result = compute(loaded, show_row=show_row)
        if json:
            typer.echo(result.model_dump_json())
        else:
            show(result, _console())
        return

    from loram.generation.table import side_by_side
    from loram.run.page import PAGE_NAME
    from loram.run.pipeline import run as pipeline
    from loram.run.report import REPORT_NAME, summary, table, task_table

    report = pipeline(loaded, fresh=fresh)
    if json:
        typer.echo(report.model_dump_json())
        return
    console = _console()
    console.print(table(report))
    if loaded.tasks is not None:
        console.print(task_table(report))
    console.print(summary(report), highlight=False)
    for example in report.examples:
        title = f"\n{example.dataset}: {example.prompt}\nexpected: {example.expected}"
        console.print(side_by_side(example.answers, title))
    console.print(
        f"Report: {loaded.output_dir / REPORT_NAME}, and {PAGE_NAME} beside it", highlight=False, soft_wrap=True
    )


def compare(recipe: Path, overrides: list[str] | None, *, json: bool = False) -> None:
    """Train by several methods and put them into one table.

    Each variant in the recipe's section `compare` trains on the full or on the pruned model.
    """
    from loram.run.compare import TABLE_NAME, table
    from loram.run.compare import compare as stage

    loaded = load_recipe(recipe, overrides)
    rows = stage(loaded)
    if json:
        typer.echo(json_text.dumps({"rows": [row.model_dump() for row in rows]}))
        return
    console = _console()
    console.print(table(rows))
    console.print(f"Table and plot: {loaded.output_dir / TABLE_NAME}", highlight=False, soft_wrap=True)


def estimate(model: str, *, memory: str | None = None, json: bool = False, **options: Any) -> None:
    """Say what pruning saves and what training takes.

    It reads only config.json. With --memory, it finds the smallest ratio that fits. Training options that are left
    out take the defaults of `loram train`.
    """
    from loram.base.size import parse_size
    from loram.planner.fit import fit
    from loram.planner.show import show
    from loram.planner.total import estimate as compute

    chosen = PlannerOptions.of(**options)
    fitting = None if memory is None else fit(model, parse_size(memory), options=chosen)
    estimated = compute(model, options=chosen) if fitting is None else fitting.estimate
    if json:
        typer.echo((fitting or estimated).model_dump_json())
        return
    show(estimated, _console(), None if fitting is None else fitting.memory)
    if fitting is not None:
        typer.echo(f"\nThe least pruning that fits into {memory} is written like this in a recipe:\n\n{fitting.recipe}")


def convert(gguf: Path, out: Path) -> None:
    """Turn a GGUF file into an ordinary model folder."""
    from loram.disk.gguf import convert_gguf

    convert_gguf(gguf, out)
    typer.echo(f"{out}: model folder written")


def verify(folder: Path, *, json: bool = False) -> None:
    """Compare every byte of a folder with its manifest."""
    from loram.disk.artifacts import verify as stage

    manifests = stage(folder)
    if json:
        typer.echo(json_text.dumps({path: manifest.model_dump(mode="json") for path, manifest in manifests.items()}))
        return
    for path, manifest in manifests.items():
        size = sum(entry.size for entry in manifest.files.values())
        typer.echo(f"{path}: {manifest.kind}, {len(manifest.files)} files, {size / 1e6:,.1f} MB, all as written")


def doctor(*, json: bool = False) -> None:
    """Show what this machine can do, and what is missing.

    It looks at versions, devices, fast dtypes, free memory and free disk.
    """
    from loram.compute.doctor import doctor as examine

    report = examine()
    typer.echo(report.model_dump_json() if json else report.text())


def _exporting(export: Export) -> Command:
    """Return the command of an export."""

    def call(*paths: str | Path, json: bool = False, **options: Any) -> None:
        report = export.function(*paths, **options)
        if export.reports:
            typer.echo(report.model_dump_json() if json else report.text())
        else:
            typer.echo(f"{paths[-1]}: {export.result} written")

    call.__doc__ = f"{export.summary}\n\n{export.detail}".rstrip()
    inputs = {"model": MODEL, "adapter": ADAPTER}
    flags = (*(_stage(export.options) if export.options else ()), *(JSON if export.reports else ()))
    return Command(call=call, arguments=(*(inputs[name] for name in export.takes), OUT), flags=flags)


RECIPE = Argument(name="recipe", type=Path, help="A recipe in YAML.")
COMMANDS: dict[str, Command] = {  # in the order of a run
    "init": Command(call=init, arguments=(OUT,), flags=(*flags_of(Init, RUN),)),
    "estimate": Command(
        call=estimate,
        arguments=(Argument(name="model", type=str, help="A config.json, a model folder or a hub id."),),
        flags=(*_stage(PlannerOptions), *flags_of(_Memory, RUN), *JSON),
    ),
    "prune": Command(
        call=prune, arguments=(MODEL, OUT), flags=(*_stage(PruneOptions), *TEMPLATE, *SEED, *DEVICE), together=True
    ),
    "align": Command(
        call=align,
        arguments=(Argument(name="pruned", type=str, help="A pruned folder."), OUT),
        flags=(*_stage(AlignOptions), *BASE, *TEMPLATE, *SEED, *DEVICE, *FRESH),
        together=True,
    ),
    "train": Command(
        call=train,
        arguments=(MODEL, OUT),
        flags=(*MIXED, *_stage(TrainOptions), *STARTED, *BASE, *TEMPLATE, *SEED, *DEVICE, *FRESH),
        together=True,
    ),
    "recover": Command(
        call=recover,
        arguments=(Argument(name="adapter", type=Path, help="A folder that train made."), OUT),
        flags=(
            *_stage(RecoverOptions),
            *flags_of(DataSpec, "Development rows", only=("columns", "max_samples"), under=("dev_dataset",)),
            *flags_of(_Pruned, RUN),
            *BASE,
            *TEMPLATE,
            *DEVICE,
        ),
    ),
    "polish": Command(
        call=polish,
        arguments=(MODEL, ADAPTER, OUT),
        flags=(*MIXED, *_stage(PolishOptions), *TEMPLATE, *SEED, *DEVICE, *FRESH),
        together=True,
    ),
    "eval": Command(
        call=evaluate,
        arguments=(MODEL,),
        flags=(
            *EVALUATION,
            *flags_of(_Adapter, RUN),
            *TEMPLATE,
            *DEVICE,
            *JSON,
        ),
        together=True,
    ),
    "generate": Command(
        call=generate, arguments=(MODEL,), flags=(*PROMPTS, *flags_of(_Adapter, RUN), *TEMPLATE, *SEED, *DEVICE)
    ),
    "chat": Command(call=chat, arguments=(MODEL,), flags=(*CHAT, *flags_of(_Adapter, RUN), *TEMPLATE, *SEED, *DEVICE)),
    **{name: _exporting(export) for name, export in exports().items()},
    "run": Command(call=run, arguments=(RECIPE, OVERRIDES), flags=(*flags_of(_DryRun, RUN), *FRESH, *JSON)),
    "compare": Command(call=compare, arguments=(RECIPE, OVERRIDES), flags=JSON),
    "report": Command(
        call=report,
        arguments=(Argument(name="runs", type=list[str], help="The output_dir of a run that has ended."),),
        flags=(*flags_of(Report, RUN), *JSON),
    ),
    "push": Command(
        call=push,
        arguments=(
            Argument(name="folder", type=Path, help="A folder that loram made."),
            Argument(name="repo", type=str, help="The repository on the hub: owner/name."),
        ),
        flags=(*flags_of(Push, RUN), *JSON),
    ),
    "teach": Command(
        call=teach,
        arguments=(MODEL, OUT),
        flags=(*DATA, *_stage(TeachOptions), *TEMPLATE, *DEVICE, *FRESH),
        together=True,
    ),
    "convert": Command(call=convert, arguments=(Argument(name="gguf", type=Path, help="A .gguf file."), OUT)),
    "verify": Command(
        call=verify,
        arguments=(Argument(name="folder", type=Path, help="A folder that loram made, or one with such folders."),),
        flags=JSON,
    ),
    "doctor": Command(call=doctor, flags=JSON),
}
