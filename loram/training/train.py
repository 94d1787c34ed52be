"""The train stage: an adapter on a pruned or full model, or the weights themselves, by one of the methods."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from trl import SFTConfig

from loram.base import processes
from loram.base.errors import UserError
from loram.base.options import Options
from loram.base.paths import local
from loram.compute.device import compute_dtype, join_processes
from loram.compute.loading import load_tokenizer, open_full
from loram.compute.loss import Balance, use_chunked_loss_, use_log_probs_
from loram.compute.nf4_streamed import Nf4Checkpoint
from loram.data.spec import Datasets, WeightedSpec, as_specs, one_or_all
from loram.data.stream import check_streams
from loram.disk.adapter import Adapter
from loram.disk.artifacts import check_output, find_manifest
from loram.disk.card import Making, write_card
from loram.disk.checkpoint import Checkpoint
from loram.disk.files import copy_side_files
from loram.disk.kept import kept_in_ram
from loram.disk.opening import open_model
from loram.disk.template import as_setting
from loram.disk.writer import write_trained
from loram.model.plan import PruningPlan, find_plan
from loram.trainer.adapted import plain_model
from loram.trainer.checkpoints import Checkpoints
from loram.trainer.fit import fit_model_, is_over, losses, read_state
from loram.trainer.frame import Job, run_job
from loram.trainer.resume import first_start
from loram.trainer.sharding import check_sharding, sharding
from loram.training.adapt import trainable_model
from loram.training.anchors import Course
from loram.training.check import check_model
from loram.training.configs import build_configs
from loram.training.engine import STREAMED
from loram.training.liger import use_liger_
from loram.training.methods.method import Method
from loram.training.methods.preference import Preference
from loram.training.methods.table import METHODS
from loram.training.options import TrainOptions, resolve, why_not_sharded
from loram.training.preference import PreferenceTrainer
from loram.training.rounds import anchored
from loram.training.rows import arrange, check_packed, first_batches, read_rows
from loram.training.start import load_start, options_of
from loram.training.streamed import StreamedPass, StreamedTrainer, stream_loss_
from loram.training.trainer import AdapterTrainer
from loram.training.write import Trained, training_step, write_adapter

logger = logging.getLogger(__name__)

LOG_NAME = "training_log.jsonl"
_EVA_BATCHES = 16


def train(
    model: str | Path,
    out: str | Path,
    *,
    data: Datasets,
    options: TrainOptions | None = None,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    seed: int = 42,
    device: str | None = None,
    fresh: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    chat_template: str | Path | None = None,
    **fields: Any,
) -> Path:
    """Train an adapter on a pruned folder or on any supported full model; or train the weights themselves.

    Methods that train the weights (`lisa`, `full`) make a full model from a full one. What they change in a pruned
    model is extracted as an adapter at the end.

    Checkpoints go to `OUT-checkpoints`. After an interruption the same call goes on from the newest whole checkpoint
    and ends with the same bytes as an undisturbed run on that machine. The folder is removed at the end, unless
    `trainer` sets `save_strategy`.

    Args:
        model: a pruned folder, or the hub id, folder or GGUF file of a full model.
        out: the adapter folder to make, with PEFT's files, the tokenizer with its chat template, and the plan if the
            model is pruned. With `lisa` or `full` on a full model it is an ordinary model folder.
        data: the training rows (see `loram.data.tokens`); several data sets are mixed by their weights.
        options: how to train; single options may be given by name instead: `method="dora", lora={"r": 16}`. Methods
            that train the weights use only r of `lora`, the rank of the extracted adapter, and warn about any other.
        adapter: an adapter folder that fits `model`, to go on with; its rank, targets and scaling stay as they are.
        base: the full model for anchors, if it is not at the name that the plan has.
        seed: the seed of initialisation, data order, dropout and LISA's draws.
        device: `cpu`, `cuda`, ...; by default the first GPU if there is one.
        fresh: begin anew where `OUT-checkpoints` has an interrupted training.
        callbacks: callbacks of transformers, called while the training goes on.
        chat_template: a .jinja file, or a model whose tokenizer has a template, in place of the model's own template.
        fields: single options by name, over `options`; see `TrainOptions`.

    Returns:
        `out`.

    Raises:
        UserError: a model, data set or option cannot be used, no step would be taken, `out` exists, or the interrupted
            training had settings or data with another result.
        FloatingPointError: a loss, gradient or weight is not finite; names the step and the tensor.
        MissingGradientError: a parameter that should train gets no gradient; names it.
    """
    source = None if adapter is None else local(adapter)
    out = check_output(out, model, *([] if source is None else [source]))
    checkpoint, specs = open_model(model, chat_template=chat_template), as_specs(data)
    chosen = TrainOptions.of(options, **fields)
    start = None if source is None else load_start(checkpoint, source, chosen)
    lengths = [spec.max_length for spec in specs if spec.max_length]
    length = {"max_length": max(lengths)} if len(lengths) == len(specs) else {}
    trainer = {"seed": seed, **chosen.trainer, **length}
    check_streams(specs, trainer)
    in_4bit = chosen.load_in_4bit or checkpoint.quantized
    options = resolve(chosen.model_copy(update={"trainer": trainer, "load_in_4bit": in_4bit}), checkpoint.architecture)
    if start is not None:
        options = options.model_copy(update={"lora": options_of(start, options.lora)})
    check_model(checkpoint, options)
    if METHODS[options.method].weights and (unused := sorted(chosen.lora.keys() - {"r"})):
        logger.warning("method %s has no use for lora.%s: it trains the weights themselves", options.method, unused[0])
    on = join_processes(device)
    _check_sharding(options, on)
    course = _course(checkpoint, options, base, on, scratch=out.parent) if options.anchor_steps else None
    keep = "save_strategy" in chosen.trainer
    job = _prepare(
        checkpoint,
        specs,
        options,
        on,
        start=start,
        course=course,
        callbacks=callbacks,
        keep_checkpoints=keep,
        scratch=out.parent,
        started=first_start(out, fresh=fresh),
    )
    return run_job(job, out, fresh=fresh)


def _check_sharding(options: TrainOptions, device: torch.device) -> None:
    """Refuse sharding where it cannot take place, or what it does not go with."""
    kind = sharding(options.trainer)
    if kind is not None and (problem := why_not_sharded(options)):
        raise UserError(f"{kind}: {problem}")
    check_sharding(options.trainer, device)


def _course(
    checkpoint: Checkpoint, options: TrainOptions, base: str | Path | None, device: torch.device, *, scratch: Path
) -> Course:
    """Return the full model's course that a pruned model is trained on.

    Raises:
        UserError: the model is a full one, or its full model is not there.
    """
    plan = find_plan(checkpoint.folder)
    if plan is None:
        raise UserError(f"{checkpoint.name}: a full model is on its own course; anchor_steps is for pruned ones")
    row = checkpoint.architecture
    if row.experts is not None and not row.experts.path.startswith(row.blocks):
        raise UserError(
            f"anchor_steps: {checkpoint.name} has experts beside an MLP, whose outputs cannot be anchored; leave it out"
        )
    if plan.refit:
        logger.warning(
            "%s: was refitted at pruning, so anchored gradients are not exact; for that, prune with --no-refit",
            checkpoint.name,
        )
    scratch.mkdir(parents=True, exist_ok=True)
    return Course(
        base=kept_in_ram(open_full(plan, base), options.ram_bytes),
        plan=plan,
        steps=options.anchor_steps,
        gradients=options.anchor_gradients,
        device=device,
        dtype=compute_dtype(device),
        scratch=scratch,
    )


def _prepare(
    checkpoint: Checkpoint,
    specs: Sequence[WeightedSpec],
    options: TrainOptions,
    device: torch.device,
    *,
    start: Adapter | None,
    course: Course | None,
    callbacks: Sequence[TrainerCallback],
    keep_checkpoints: bool,
    scratch: Path,
    started: datetime,
) -> "_TrainJob":
    """Read the rows and say what the training is made from."""
    plan, tokenizer = find_plan(checkpoint.folder), load_tokenizer(checkpoint)
    length, learns = options.trainer["max_length"], METHODS[options.method].learns
    known: dict[str, Any] = {"vocabulary": checkpoint.vocabulary, "seed": options.trainer["seed"], "now": started}
    data = read_rows(specs, tokenizer, length, kind=learns, **known)
    check_packed(data.rows, build_configs(options, device)[1])
    inputs = {"base": checkpoint.fingerprint}
    if plan is not None:
        inputs = {"base": plan.base.fingerprint, "plan": plan.fingerprint, "pruned": checkpoint.fingerprint}
    kind, before = "model" if METHODS[options.method].weights and plan is None else "adapter", None
    if start is not None:
        before = find_manifest(start.folder)
        inputs = {**({} if before is None else before.made_from), **inputs, "adapter": start.fingerprint}
    return _TrainJob(
        kind=kind if before is None else before.kind,
        made_from={**inputs, "rows": data.digest},
        settings={
            **options.model_dump(),
            "data": one_or_all([spec.model_dump(mode="json") for spec in specs]),
            **data.counts,
            "processes": processes.count(),
            **({"sharding": shards} if (shards := sharding(options.trainer)) else {}),
            **as_setting(checkpoint.chat_template),
        },
        names={
            "rows": ", ".join(spec.path for spec in specs),
            "base": checkpoint.name,
            "pruned": checkpoint.name,
            "adapter": "" if start is None else str(start.folder),
        },
        started=started,
        device=device,
        checkpoint_limit=options.trainer["save_total_limit"],
        keep_checkpoints=keep_checkpoints,
        checkpoint=checkpoint,
        plan=plan,
        options=options,
        rows=data.rows,
        datasets=tuple(spec.path for spec in specs),
        tokenizer=tokenizer,
        start=start,
        course=course,
        callbacks=callbacks,
        scratch=scratch,
    )


@dataclass(frozen=True, kw_only=True)
class _TrainJob(Job[Trained]):
    """A training.

    Args:
        checkpoint: the pruned or full model.
        plan: the plan of the pruned model; None for a full one.
        options: the options, with every default filled in.
        rows: the tokenised rows.
        datasets: the names of the data sets that they come from.
        tokenizer: the model's tokenizer.
        start: the adapter to go on with; None for a new one.
        course: the full model's course, for anchors.
        callbacks: the user's callbacks.
        scratch: the folder for what a streamed model keeps in files.
    """

    log_name: ClassVar[str] = LOG_NAME

    checkpoint: Checkpoint
    plan: PruningPlan | None
    options: TrainOptions
    rows: Dataset | IterableDataset
    datasets: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    start: Adapter | None
    course: Course | None
    callbacks: Sequence[TrainerCallback]
    scratch: Path

    @property
    def method(self) -> Method:
        """The row of the method."""
        return METHODS[self.options.method]

    def fit(self, checkpoints: Checkpoints, newest: Path | None) -> Trained:
        """Train, or go on; a training that is over is not trained again."""
        over = None
        if newest is not None and is_over(state := read_state(newest)):
            over = Trained(folder=newest, log=losses(state, "loss"))
            if not self.method.adds_files:
                return over
        adapter, arguments = build_configs(self.options, self.device, checkpoints.staging)
        set_seed(arguments.seed)
        rows, collator = arrange(self.rows, arguments, self.tokenizer, self.checkpoint.vocabulary, self.method.learns)

        def batches() -> Sequence[Mapping[str, torch.Tensor]]:
            return first_batches(rows, collator, arguments.per_device_train_batch_size, _EVA_BATCHES)

        model = trainable_model(self.checkpoint, adapter, self.options, self.device, batches, self.start)
        own = self.method.own_options(self.options)
        callbacks = [*self.method.callbacks(model, own, arguments.seed), *self.callbacks]
        added_files = self.method.added_files(model)
        if over is not None:
            return Trained(folder=over.folder, log=over.log, added_files=added_files)
        if self.options.engine == STREAMED:
            assert isinstance(model, PeftModel)
            stream_loss_(model, self._pass())
        else:
            self._use_kernels_(model, arguments)
        trainer = fit_model_(
            self._trainer_class(),
            model,
            arguments,
            device=self.device,
            rows=rows,
            collator=collator,
            checkpoints=checkpoints,
            newest=newest,
            lean=self.options.load_in_4bit or self.options.engine == STREAMED,
            callbacks=callbacks,
            processing_class=self.tokenizer,
            **self._of_trainer(own),
        )
        folder = checkpoints.staging / "trained"
        trainer.save_model(str(folder))
        return Trained(folder=folder, log=losses(trainer.state, "loss"), added_files=added_files)

    def _pass(self) -> StreamedPass:
        """Return where the model is streamed."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        return StreamedPass(self._streamed(), self.device, self.scratch)

    def _streamed(self) -> Checkpoint:
        """Return the model as it is read: in NF4 if the options say so, and kept in RAM as far as they allow."""
        room = self.options.ram_bytes
        if not self.options.load_in_4bit:
            return kept_in_ram(self.checkpoint, room)
        return Nf4Checkpoint(self.checkpoint, device=self.device, dtype=compute_dtype(self.device), budget=room)

    def _use_kernels_(self, model: PreTrainedModel | PeftModel, arguments: SFTConfig) -> None:
        """Put the loss into a model in memory, and Liger's kernels where the arguments ask for them."""
        base = plain_model(model)
        if self.method.learns == "text":
            use_chunked_loss_(base, balance=self._balance())
        else:
            use_log_probs_(base)
        if arguments.use_liger_kernel:
            use_liger_(base, arguments.liger_kernel_config)
            arguments.use_liger_kernel = False  # transformers knows no pruned models, and would put its loss over ours

    def _balance(self) -> Balance | None:
        coefficient = self.options.trainer["router_aux_loss_coef"]
        geometry = (self.checkpoint if self.plan is None else self.plan).geometry
        chosen = geometry.num_experts_per_tok if coefficient else None
        return None if chosen is None else Balance(coefficient=coefficient, chosen=chosen)

    def _trainer_class(self) -> type[Trainer]:
        if self.options.engine == STREAMED:
            return StreamedTrainer
        if isinstance(self.method, Preference):
            return PreferenceTrainer
        return AdapterTrainer if self.course is None else anchored(AdapterTrainer, self.course)

    def _of_trainer(self, own: Options | None) -> dict[str, Any]:
        """Return what the Trainer of the method takes beyond transformers' own."""
        if not isinstance(self.method, Preference):
            return {}
        return {"method": self.method, "preference": own, "start": self.start}

    def write(self, out: Path, outcome: Trained) -> Mapping[str, float]:
        """Write the model, or the adapter with the tokenizer beside it."""
        if self.kind == "model":
            write_trained(out, self.checkpoint, outcome.folder)
            write_card(out, self._making())
            return {}
        if self.start is not None:
            copy_side_files(self.start.folder, out)
        figures = write_adapter(out, outcome, self.checkpoint, self.plan, self.options, self.start)
        self.checkpoint.copy_tokenizer(out)
        write_card(out, self._making())
        return figures

    def _making(self) -> Making:
        before = [] if self.start is None else [self.start.folder]
        return Making(
            kind=self.kind,
            step=training_step(self.settings, further=self.start is not None, anchored=self.options.anchor_steps or 0),
            model=self.checkpoint.name,
            parents=[*before, self.checkpoint.folder],
            datasets=self.datasets,
            wrapped=self.checkpoint.wrapper is not None,
        )
