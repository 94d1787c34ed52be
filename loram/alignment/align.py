"""The align stage: all weights of a pruned model trained until it says what the full model says."""

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, set_seed

from loram.alignment.distill import AlignTrainer
from loram.alignment.judge import Judge, best_step, stale_probes
from loram.alignment.mixture import Rows, cached_rows, collate, draw, read_rows
from loram.alignment.options import build_arguments, check_options
from loram.alignment.probe import Probe, hold_out, split
from loram.alignment.sample import sample_rows
from loram.alignment.spec import AlignSpec
from loram.base import processes
from loram.base.errors import UserError
from loram.base.progress import track, training_progress
from loram.compute.device import allocate_, compute_dtype, fits, pick_device
from loram.compute.loading import load_model, load_tokenizer, open_full
from loram.data.spec import DataSpec
from loram.disk.artifacts import check_output, digest, find_manifest, publish
from loram.disk.checkpoint import Checkpoint
from loram.disk.files import copy_side_files
from loram.disk.opening import open_model
from loram.disk.writer import ShardedWriter
from loram.model.plan import MASKS_NAME, PruningPlan
from loram.trainer.arguments import checkpoints_activations
from loram.trainer.checkpoints import Checkpoints, guarded, lasting

logger = logging.getLogger(__name__)

LOG_NAME = "align_log.jsonl"
SAMPLED_ROWS = 512
_TRAINED_BYTES = 16  # a float32 value, its gradient and AdamW's two moments


def align(
    pruned: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    teacher: Any = None,
    base: str | Path | None = None,
    objective: str = "distill",
    clm_weight: float | None = None,
    train_embeddings: bool = False,
    probe: bool = True,
    probe_data: DataSpec | str | Path | Mapping[str, Any] | None = None,
    probe_steps: int = 16,
    eval_steps: int = 50,
    patience: int = 3,
    stream: bool = False,
    trainer: Mapping[str, Any] | None = None,
    seed: int = 42,
    device: str | None = None,
    fresh: bool = False,
) -> Path:
    """Train all weights of a pruned model, but for embedding and lm_head, on what the full model predicts.

    `distill` minimises the forward KL divergence from the full model at the places in the loss; `clm` is plain cross
    entropy; `mix` their weighted mean. What the full model predicts comes from caches that `teach` made, and then
    their rows are the data; without `teacher`, from the full model itself, in memory.

    Every `eval_steps`, before the first step and after the last, a probe is run (see `loram.alignment.probe`): a short
    LoRA run on the student, recovered, judged on the full model. The weights whose recovered loss is least are kept.

    Checkpoints go to `OUT-checkpoints`, as in `train`: the same call goes on after an interruption and ends with the
    same bytes.

    Args:
        pruned: the pruned folder.
        out: the aligned folder to make: like `pruned`, and the loss curve with the probes in `align_log.jsonl`.
        data: one data set or several (see `loram.data.tokens`), as names, mappings or specs, each with an optional
            `weight` (see `loram.alignment.mixture.draw`). Without any, and without `teacher`, text sampled from the
            full model.
        teacher: one folder that `teach` made, or several, likewise with weights.
        base: the full model, where it is not at the name that the plan has.
        objective: `distill`, `clm` or `mix`.
        clm_weight: of `mix`: the share of cross entropy, between 0 and 1 (default: 0.5).
        train_embeddings: train embedding and lm_head too.
        probe: whether to probe; else the last step's weights are kept.
        probe_data: rows for the probe; without it some rows of the data are held out for it.
        probe_steps: steps of the probe's LoRA run.
        eval_steps: alignment steps between probes.
        patience: stop after so many probes without a new best one.
        stream: read the full model from disk layer by layer in probes even where it fits in memory.
        trainer: options of transformers' `TrainingArguments` under their own names, and `max_length`, over
            `loram.alignment.options.TRAINER_DEFAULTS`.
        seed: of everything drawn.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.
        fresh: start over where `OUT-checkpoints` has an interrupted alignment.

    Returns:
        `out`.

    Raises:
        UserError: a folder, data set or option cannot be used, the teacher is not the plan's full model or does not
            fit in memory, `out` exists, or the interrupted alignment was one with other settings or data.
        FloatingPointError: a loss, gradient or weight is not finite; names the step and the tensor.
    """
    out = Path(out)
    spec = AlignSpec.of(
        dataset=data,
        teacher=teacher,
        objective=objective,
        clm_weight=clm_weight,
        train_embeddings=train_embeddings,
        probe=probe,
        probe_dataset=probe_data,
        probe_steps=probe_steps,
        eval_steps=eval_steps,
        patience=patience,
        stream=stream,
        trainer=dict(trainer or {}),
    )
    check_output(out, pruned)
    on = pick_device(device)
    processes.join(cpu=on.type == "cpu")
    job = _prepare(open_model(pruned), spec, base, seed, on)
    held = f", the probe trains on {len(job.probe[0])} and is judged by {len(job.probe[1])}" if job.probe else ""
    logger.info("aligning on %d rows%s", len(job.train), held)
    settings, made_from = job.settings, job.made_from
    checkpoints = Checkpoints(
        out.with_name(f"{out.name}-checkpoints"),
        made_from=made_from,
        settings={**settings, "device": job.device.type},
        limit=job.options["save_total_limit"],
    )
    with publish(out, kind="pruned", made_from=made_from, settings=settings) as staging, checkpoints.open(fresh=fresh):
        history, trained = _fit(job, checkpoints)
        if processes.first():
            row = job.student.architecture
            frozen = () if train_embeddings else (row.embedding_weight, row.head_weight)
            _write(job.student, trained, staging, frozen=frozen)
            log = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history)
            (staging / LOG_NAME).write_text(log, encoding="utf-8")
    if spec.trainer.get("save_strategy", "no") == "no":
        checkpoints.remove()
    return out


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be aligned, and on what.

    Args:
        spec, options: how; `options` are all of the trainer's.
        student: the pruned folder; `full` the full model, where it is needed.
        train, probe: rows to align on, and rows to train a probe on and to judge it by.
    """

    spec: AlignSpec
    options: Mapping[str, Any]
    device: torch.device
    student: Checkpoint
    plan: PruningPlan
    full: Checkpoint | None
    train: Rows
    probe: tuple[Rows, Rows] | None

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the outcome but for what it is made from."""
        told = self.spec.model_dump(mode="json", exclude={"trainer"})
        return {**told, "trainer": dict(self.options), "rows": len(self.train), "processes": processes.count()}

    @cached_property
    def made_from(self) -> dict[str, str]:
        """Fingerprints of what goes in."""
        found = {
            "base": self.plan.base.fingerprint,
            "plan": self.plan.fingerprint,
            "pruned": self.student.fingerprint,
            "rows": digest(self.train.lists()),
        }
        if self.spec.teacher:
            found["teacher"] = digest([_fingerprint(Path(cache.path)) for cache in self.spec.teacher])
        if self.probe is not None:
            found["probe_rows"] = digest([part.lists() for part in self.probe])
        return found


def _prepare(student: Checkpoint, spec: AlignSpec, base: str | Path | None, seed: int, device: torch.device) -> _Job:
    """Everything opened and checked, so that what cannot work is said before anything is trained."""
    options = check_options(spec.trainer, seed)
    if not student.pruned:
        raise UserError(
            f"{student.name}: not a pruned folder; alignment trains what `loram prune` made of a full model"
        )
    plan, tokenizer = PruningPlan.load(student.folder), load_tokenizer(student)
    full = open_full(plan, base) if spec.live or spec.sampled or spec.probe else None
    if spec.live and full is not None:
        needed = full.parameters * compute_dtype(device).itemsize + student.parameters * _TRAINED_BYTES
        remedy = "`loram teach` it first, and give the folder that makes with --teacher"
        _check_fits(full, needed, device, f"as a teacher beside the pruned model; {remedy}")
    if spec.teacher:
        rows = cached_rows(spec.teacher, plan.base, seed)
    elif spec.dataset:
        rows = read_rows(spec.dataset, tokenizer, options["max_length"], student.vocabulary, seed)
    else:
        assert full is not None
        rows = _sampled(full, tokenizer, options, device)
    probe = None
    if spec.probe_dataset is not None:
        own = read_rows([spec.probe_dataset], tokenizer, options["max_length"], student.vocabulary, seed)
        probe = split(own, spec.probe_steps, seed, spec.probe_dataset.path)
    elif spec.probe:
        rows, probe = hold_out(rows, spec.probe_steps, seed)
    return _Job(
        spec=spec, options=options, device=device, student=student, plan=plan, full=full, train=rows, probe=probe
    )


def _check_fits(full: Checkpoint, nbytes: int, device: torch.device, what: str) -> None:
    if not fits(nbytes, device):
        raise UserError(f"{full.name}: {nbytes / 1e9:.1f} GB do not fit in free memory {what}")


def _sampled(full: Checkpoint, tokenizer: Any, options: Mapping[str, Any], device: torch.device) -> Rows:
    """As many rows as the steps need, written by the full model."""
    dtype, steps, seed = compute_dtype(device), options.get("max_steps", -1), options["seed"]
    _check_fits(full, full.parameters * dtype.itemsize, device, "to sample text from it; give text with --dataset")
    each = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
    count = steps * each if steps > 0 else SAMPLED_ROWS
    logger.info("no data set given: sampling %d rows from %s", count, full.name)

    def sample() -> Any:
        model = load_model(full, dtype=dtype).to(device).eval()
        return sample_rows(model, tokenizer, count, options["max_length"], seed)

    return Rows([processes.agreed(sample)], draw([count], [None], seed))


def _fingerprint(folder: Path) -> str:
    manifest = find_manifest(folder)
    return "" if manifest is None else manifest.fingerprint


def _fit(job: _Job, checkpoints: Checkpoints) -> tuple[list[dict[str, Any]], Path | None]:
    """Train; returns the log and the checkpoint whose weights are kept, or None for those at the beginning."""
    newest = checkpoints.newest()
    if newest is not None:
        logger.info("going on from %s in %s", newest.name, newest.parent)
        state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
        checkpoints.best = best_step(state["log_history"])
        if state["global_step"] >= state["max_steps"] or stale_probes(state["log_history"]) >= job.spec.patience:
            return _outcome(state["log_history"], newest, checkpoints)
    arguments = build_arguments(job.options, job.device, checkpoints.staging)
    allocate_(job.device, lean=checkpoints_activations(arguments))
    set_seed(arguments.seed)
    model = load_model(job.student, dtype=torch.float32)
    if not job.spec.train_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
    runner = guarded(AlignTrainer, checkpoints)(
        model=model,
        args=arguments,
        train_dataset=job.train,
        data_collator=collate,
        clm_weight=job.spec.text_share,
        teacher=_teacher(job),
        judge=_judge(job, checkpoints),
    )
    for callback in (ProgressCallback, PrinterCallback):  # they print to stdout, which is for results
        runner.remove_callback(callback)
    runner.add_callback(training_progress())
    runner.train(resume_from_checkpoint=newest and str(newest))
    return _outcome(runner.state.log_history, checkpoints.path(runner.state.global_step), checkpoints)


def _outcome(
    log: list[dict[str, Any]], last: Path, checkpoints: Checkpoints
) -> tuple[list[dict[str, Any]], Path | None]:
    step = best_step(log)
    kept = last if step is None else checkpoints.path(step) if step > 0 else None
    if kept is not None and not kept.is_dir():
        raise UserError(f"{kept}: has the best weights so far, but is gone; give --fresh to start over")
    if step is not None:
        logger.info("kept: the weights of step %d", step)
    return lasting(log, "loss", "recovered_loss"), kept


def _teacher(job: _Job) -> Any:
    if not job.spec.live or job.full is None:
        return None
    model: Any = load_model(job.full, dtype=compute_dtype(job.device))
    return model.to(job.device).eval().requires_grad_(False)


def _judge(job: _Job, checkpoints: Checkpoints) -> Judge | None:
    if job.probe is None or job.full is None:
        return None
    train, dev = job.probe
    probe = Probe(
        job.full,
        job.plan,
        train=train,
        dev=dev,
        steps=job.spec.probe_steps,
        seed=job.options["seed"],
        device=job.device,
        stream=job.spec.stream,
    )
    return Judge(probe=probe, every=job.spec.eval_steps, patience=job.spec.patience, checkpoints=checkpoints)


def _write(student: Checkpoint, trained: Path | None, out: Path, *, frozen: Collection[str]) -> None:
    """The student's folder with the weights of a checkpoint, in the student's dtypes, a block of rows at a time."""
    source, student = None if trained is None else Checkpoint(trained).stored, student.stored
    masks = {name: file for name, file in student.index.items() if file == MASKS_NAME}  # as they were
    specs = {name: student.spec(name) for name in student.names() if name not in masks}
    with ShardedWriter(out, specs, beside=masks) as writer:
        for name in track(list(specs), "Writing"):
            if source is None or name in frozen:
                writer.copy(name, student)
                continue
            for row, block in source.blocks(source.holder(name)):
                writer.write(name, block.to(specs[name].dtype), row)
    copy_side_files(student.folder, out)
    shutil.copyfile(student.folder / "config.json", out / "config.json")
