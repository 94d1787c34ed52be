"""A dry run computes what a recipe would do (sizes, memory, tokens) and reads no weight and writes no file."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from loram.alignment.arguments import build_arguments
from loram.alignment.inputs import divide
from loram.alignment.mixture import Rows, places
from loram.alignment.options import AlignOptions, resolve_trainer
from loram.base.errors import UserError
from loram.base.size import show_size
from loram.compute.device import compute_dtype, pick_device
from loram.compute.likelihood import SCORED, load_scored, predicted
from loram.compute.loading import empty_model, load_tokenizer, open_full
from loram.data.batches import IGNORED
from loram.data.mixture import Mixture, load_mixture
from loram.data.spec import Kind, WeightedSpec
from loram.data.stream import first_rows
from loram.data.tokens import Tokens
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.model.plan import PruningPlan
from loram.planner.memory import TrainingMemory, training_memory
from loram.planner.settings import TRAINING, Settings, make_settings
from loram.planner.shapes import Model
from loram.pruning.layout import blank_plan
from loram.pruning.options import PruneOptions, ResolvedPruneOptions
from loram.pruning.prune import load_calibration
from loram.run.pipeline import check
from loram.run.recipe import EvaluateSection, Recipe
from loram.run.stages import FULL_LORA
from loram.trainer.adapted import add_adapter
from loram.trainer.arguments import check_batches, checkpoints_activations
from loram.training.configs import build_configs
from loram.training.methods.table import METHODS
from loram.training.methods.weights import trained_layers
from loram.training.options import TrainOptions, resolve
from loram.training.rows import check_packed

EXAMPLES = 2


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Training(_Value):
    """The training of one model, as it would be.

    Args:
        parameters: the number of frozen parameters.
        adapter_parameters: the number of trained parameters.
        memory: the memory at the peak, if every row is as long as the longest; None if the planner cannot estimate it.
        problem: why the planner cannot estimate it; empty if it can.
    """

    parameters: int
    adapter_parameters: int
    memory: TrainingMemory | None
    problem: str = ""


class DataCounts(_Value):
    """The counts of a data set after tokenisation.

    Args:
        rows: the number of rows that are used.
        tokens: the number of tokens in these rows.
        tokens_in_loss: the number of these tokens that the loss counts.
        rows_truncated: the number of rows that were cut to the maximum length. It includes rows that were skipped
            because the cut left nothing in the loss.
        rows_skipped: the number of rows that are not used.
        longest: the number of tokens in the longest row.
        columns: what loram calls each column that is used -> its name in the data.
        unused: each column that is not used -> the number of rows that have a value there.
        chat_template: whether the rows go through the tokenizer's chat template.
        streamed: whether the rows are streamed; then these are the counts of the first rows.
    """

    rows: int
    tokens: int
    tokens_in_loss: int
    rows_truncated: int
    rows_skipped: int
    longest: int
    columns: dict[str, str]
    unused: dict[str, int]
    chat_template: bool
    streamed: bool = False


class Span(_Value):
    """A piece of an example's text with its special tokens; `in_loss` is true if training predicts the piece."""

    text: str
    in_loss: bool


class DryRun(_Value):
    """The result of `dry_run`: what a run would do.

    Args:
        model: the name of the full model.
        parameters: the number of its parameters.
        pruned_parameters: the number of parameters that remain after pruning.
        device: the device that training would use.
        dtype: the dtype that training would compute in.
        training: the training per model: "pruned", and also "full" if the recipe compares with LoRA on the full model.
        dataset: the counts of each data set for training; empty if the recipe trains nothing.
        align: the counts of each data set for alignment.
        calibration: the counts of the calibration data; None if pruning reads no text.
        refit: the counts of the data that a refit reads beside it; None if it reads no other.
        eval_dataset: the counts of each data set for evaluation.
        tasks: the names of the tasks that are run.
        examples: rows of the training data, or of the data for alignment; a long text is several, and so is a pair.
        example_rows: the number of each of these rows in its data set; the first is 1.
    """

    model: str
    parameters: int
    pruned_parameters: int
    device: str
    dtype: str
    training: dict[str, Training]
    dataset: dict[str, DataCounts]
    align: dict[str, DataCounts]
    calibration: DataCounts | None
    refit: DataCounts | None
    eval_dataset: dict[str, DataCounts]
    tasks: tuple[str, ...]
    examples: tuple[tuple[Span, ...], ...]
    example_rows: tuple[int, ...]

    def data_sets(self) -> Iterator[tuple[str, DataCounts]]:
        """Yield the counts of each data set with a label for people."""
        yield from ((f"alignment: {name}", counts) for name, counts in self.align.items())
        for name, counts in self.dataset.items():
            yield "training" if len(self.dataset) == 1 else f"training: {name}", counts
        if self.calibration is not None:
            yield "calibration", self.calibration
        if self.refit is not None:
            yield "refit", self.refit
        yield from ((f"evaluation: {name}", counts) for name, counts in self.eval_dataset.items())


def dry_run(recipe: Recipe, *, show_row: int | None = None) -> DryRun:
    """Check a recipe as `run` does and tokenise its data, but do not make `output_dir`.

    A model or data set on the hub is downloaded into the hub's cache, as in a run.

    Args:
        recipe: the recipe.
        show_row: the number of the row to show, from 1; by default the first two rows that are used.

    Raises:
        UserError: names the first problem that would stop the run, or the row to show is not used.
    """
    check(recipe)
    checkpoint = open_model(recipe.model_name_or_path, chat_template=recipe.chat_template_path)
    device = pick_device(recipe.device)
    training, dtype = resolve(recipe.train, checkpoint.architecture), compute_dtype(device)
    adapter, arguments = build_configs(training, device)
    plan = (
        PruningPlan.load(checkpoint.folder)
        if recipe.pruning is None
        else blank_plan(checkpoint, _pruning(recipe.pruning, checkpoint), seed=recipe.seed)
    )
    before, after = plan.parameters()
    tokenizer, options = load_tokenizer(checkpoint), recipe.evaluate or EvaluateSection()

    def mixture(specs: Sequence[WeightedSpec], trainer: Mapping[str, Any], kind: Kind = "text") -> Mixture | None:
        if not specs:
            return None
        known: dict[str, Any] = {"vocabulary": checkpoint.vocabulary, "seed": recipe.seed, "kinds": (kind,)}
        return load_mixture([first_rows(spec) for spec in specs], tokenizer, trainer["max_length"], **known)

    to_train = mixture(recipe.dataset, training.trainer, METHODS[training.method].learns)
    to_align = None
    if recipe.align is not None:
        aligning = resolve_trainer(recipe.align.trainer, recipe.seed)
        to_align = mixture(recipe.align.dataset, aligning)
        _check_alignment(recipe.align, aligning, to_align, device)
    scored = {
        name: load_scored(spec, checkpoint, tokenizer, options.max_samples, options.max_length, SCORED)
        for name, spec in recipe.held_out.items()
    }
    settings: Settings | UserError | None = None
    if to_train is not None:
        streamed = recipe.dataset[0].streaming
        if not streamed:
            check_packed(to_train.rows, arguments)
        longest = (
            arguments.max_length
            if streamed
            else max(len(ids) for tokens in to_train.sources for ids in tokens.sequences("input_ids"))
        )
        settings = _settings(training, adapter, arguments, device, longest)
    first = next((data.sources[0] for data in (to_train, to_align) if data is not None), None)
    examples = [] if first is None else _pick_examples(first, show_row)
    texts = dict(_pruning_texts(recipe.pruning, checkpoint, tokenizer))
    return DryRun(
        model=checkpoint.name,
        parameters=before,
        pruned_parameters=after,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        training={
            name: _training(model, sizes, full, adapter, training, settings)
            for name, model, sizes, full in _trained(recipe, checkpoint, plan, dtype)
        },
        dataset=_counts(recipe.dataset, to_train),
        align={} if recipe.align is None else _counts(recipe.align.dataset, to_align),
        calibration=texts.get("calibration"),
        refit=texts.get("refit"),
        eval_dataset={name: _count(tokens) for name, tokens in scored.items()},
        tasks=() if recipe.tasks is None else tuple(recipe.tasks.tasks or ()),
        examples=tuple(
            tuple(_spans(first.rows[index], tokenizer, prefix))
            for index in examples
            if first
            for prefix in first.answers
        ),
        example_rows=tuple(first.sources[index] + 1 for index in examples if first for _ in first.answers),
    )


def _pick_examples(tokens: Tokens, show_row: int | None) -> list[int]:
    """Return which of the tokenised rows to show."""
    if show_row is None:
        return list(range(min(EXAMPLES, len(tokens.rows))))
    pieces = [index for index, source in enumerate(tokens.sources) if source == show_row - 1]
    if not pieces:
        raise UserError(f"show_row: row {show_row} is not used: it has no token in the loss, or there is no such row")
    return pieces


def _check_alignment(
    section: AlignOptions, trainer: Mapping[str, Any], data: Mixture | None, device: torch.device
) -> None:
    """Refuse options that cannot work, and rows that are too few for an alignment and its probe."""
    arguments = build_arguments(trainer, device, Path("unused"))
    if data is None:
        return  # it aligns on a teacher's folders, or on text that the full model is still to write
    rows = Rows([tokens.rows for tokens in data.sources], places(data.shares))
    check_batches(len(divide(rows, section, trainer["seed"])[0]), arguments)


def _trained(
    recipe: Recipe, checkpoint: Checkpoint, plan: PruningPlan, dtype: torch.dtype
) -> Iterator[tuple[str, Any, Model, Model | None]]:
    """Yield each model that gets an adapter.

    Each item holds the model's name, transformers' model without weights, the planner's sizes of it, and the sizes of
    the full model if its gradients may serve as anchors.
    """
    if not recipe.dataset:
        return
    sizes = Model(
        architecture=plan.architecture,
        geometry=plan.geometry,
        config={**checkpoint.config, "model_type": plan.model_type},
    )
    if plan.sparse:
        pruned = dataclasses.replace(sizes, sparse=plan.kept_values(), narrowed=plan.sparse_layers)
    else:
        units = {layer: plan.units(layer) for layer in plan.layers}
        pruned = dataclasses.replace(
            sizes,
            units=units,
            narrowed=tuple(units),
            dropped=plan.dropped,
            refit=plan.refit,
            bypass_rank=plan.bypass_rank,
        )
    yield "pruned", empty_model(checkpoint, dtype, None if recipe.prune is None else plan), pruned, sizes
    if FULL_LORA.count(recipe):
        full = checkpoint if recipe.prune is not None else open_full(plan, recipe.base_model_name_or_path)
        yield "full", empty_model(full, dtype), sizes, None


def _pruning(section: PruneOptions, checkpoint: Checkpoint) -> ResolvedPruneOptions:
    return section.resolved().for_model(checkpoint.geometry, checkpoint.architecture)


def _pruning_texts(
    section: PruneOptions | None, checkpoint: Checkpoint, tokenizer: Any
) -> Iterator[tuple[str, DataCounts]]:
    """Yield the counts of the texts that pruning reads: the calibration data, and a refit's where they differ."""
    if section is None or not (settings := _pruning(section, checkpoint)).reads_text(checkpoint.architecture):
        return
    texts = {"calibration": section}
    if settings.refit:
        texts |= {"calibration": section.for_refit} if section.refit_dataset is None else {"refit": section.for_refit}
    for name, options in texts.items():
        yield name, _count(load_calibration(checkpoint, tokenizer, options), all_in_loss=True)


def _training(
    model: Any,
    sizes: Model,
    full: Model | None,
    adapter: Any,
    chosen: TrainOptions,
    settings: Settings | UserError | None,
) -> Training:
    """Count the parameters on a model without weights, after PEFT and the method have changed it."""
    total = sum(parameter.numel() for parameter in model.parameters())
    pruned = sizes.pruned
    if METHODS[chosen.method].weights:
        trained, size = _count_weights(model, chosen, pruned=pruned)
        problem = f"{settings}; weights, gradients and AdamW's two moments alone are {show_size(size)}"
        return Training(parameters=total - trained, adapter_parameters=trained, memory=None, problem=problem)
    trained = _count_adapter(model, adapter, chosen, pruned=pruned)
    if not isinstance(settings, Settings):
        return Training(parameters=total, adapter_parameters=trained, memory=None, problem=str(settings))
    return Training(parameters=total, adapter_parameters=trained, memory=training_memory(sizes, settings, full))


def _count_adapter(model: Any, adapter: Any, chosen: TrainOptions, *, pruned: bool) -> int:
    """Count the parameters of the adapter that train."""
    # The other initialisations compute with the weights, and this model has none.
    config = dataclasses.replace(adapter, init_lora_weights=True, eva_config=None)
    adapted = add_adapter(model, config, low_cpu_mem_usage=True)
    method = METHODS[chosen.method]
    method.specialise_(adapted, method.own_options(chosen), pruned=pruned)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _count_weights(model: Any, chosen: TrainOptions, *, pruned: bool) -> tuple[int, int]:
    """Count the weights that train, and the bytes that they need.

    Returns:
        (the number of weights that train at any time, the bytes of weights, gradients and AdamW's two moments in
        float32). LISA trains every layer sooner or later, but it holds the gradients of a few at a time.
    """
    method = METHODS[chosen.method]
    own = method.own_options(chosen)
    method.specialise_(model, own, pruned=pruned)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    per_layer = sorted(sum(parameter.numel() for parameter in layer) for layer in trained_layers(model))
    waiting = len(per_layer) - method.layers_at_once(len(per_layer), own)
    return trained, 4 * total + 12 * (trained - sum(per_layer[:waiting]))


def _settings(
    chosen: TrainOptions, adapter: Any, arguments: Any, device: torch.device, longest: int
) -> Settings | UserError:
    """Collect what the planner needs to know about a training, or the reason why it cannot estimate this one."""
    if chosen.mask_update:
        return UserError("the planner cannot count the full-size updates that mask_update makes")
    if adapter.target_parameters:
        return UserError(
            "the planner cannot count adapters on experts, whose weights PEFT updates in each forward pass"
        )
    sections = {"": chosen, "lora": adapter, "trainer": arguments}
    options = {
        name: getattr(sections.get(planned.section) or getattr(chosen, planned.section), planned.name, None)
        for name, planned in TRAINING.items()
    }
    options |= {
        "lora_target_modules": tuple(sorted(adapter.target_modules)),
        "max_length": arguments.max_length if arguments.packing else longest,
        "optim": str(getattr(arguments.optim, "value", arguments.optim)),
        "gradient_checkpointing": checkpoints_activations(arguments),
    }
    try:
        return make_settings(device=device.type, **options)
    except UserError as error:
        return error


def _counts(specs: Sequence[WeightedSpec], data: Mixture | None) -> dict[str, DataCounts]:
    sources = [] if data is None else data.sources
    return {spec.path: _count(tokens, streamed=spec.streaming) for spec, tokens in zip(specs, sources, strict=False)}


def _count(tokens: Tokens, *, all_in_loss: bool = False, streamed: bool = False) -> DataCounts:
    inputs = tokens.sequences("input_ids")
    return DataCounts(
        rows=len(tokens.rows),
        tokens=sum(map(len, inputs)),
        tokens_in_loss=predicted(inputs if all_in_loss else tokens.sequences("labels")),
        rows_truncated=tokens.truncated,
        rows_skipped=tokens.skipped,
        longest=max(map(len, inputs)),
        columns=dict(tokens.columns),
        unused=dict(tokens.unused),
        chat_template=tokens.templated,
        streamed=streamed,
    )


def _spans(row: Mapping[str, Sequence[int]], tokenizer: Any, prefix: str = "") -> Iterator[Span]:
    """Split a row's text, or an answer's, into pieces, each of which is either in the loss or outside it."""
    ids, labels = list(row[f"{prefix}input_ids"]), row[f"{prefix}labels"]
    inside = [False, *(label != IGNORED for label in labels[1:])]
    start = 0
    for in_loss, run in itertools.groupby(inside):
        stop = start + len(list(run))
        # The piece is what it adds to the text before it, because some tokenizers drop a space at a text's beginning.
        text = _text(tokenizer, ids[:stop])[len(_text(tokenizer, ids[:start])) :]
        yield Span(text=text, in_loss=in_loss)
        start = stop


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
