"""What an alignment reads: the models, the rows to align on, and the rows of the probe."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loram.alignment.mixture import Rows, cached_rows, places, read_rows
from loram.alignment.options import AlignOptions
from loram.alignment.probe import hold_out, split
from loram.alignment.sample import sample_rows
from loram.base import processes
from loram.base.errors import UserError
from loram.base.paths import local
from loram.compute.device import compute_dtype, fits
from loram.compute.loading import load_model, load_tokenizer, open_full
from loram.disk.artifacts import digest, find_manifest
from loram.disk.checkpoint import Checkpoint
from loram.disk.merged import check_mergeable
from loram.model.plan import PruningPlan

logger = logging.getLogger(__name__)

SAMPLED_ROWS = 512
_TRAINED_BYTES = 16  # a float32 value, its gradient and AdamW's two moments


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The models and rows of an alignment.

    Args:
        student: the pruned model.
        plan: its plan.
        full: the full model; None where neither the loss nor the probe needs it.
        teacher: the fingerprints of the teacher caches.
        rows: the rows to align on.
        probe: the rows that a probe trains on, and those that judge it; None without a probe.
    """

    student: Checkpoint
    plan: PruningPlan
    full: Checkpoint | None
    teacher: tuple[str, ...]
    rows: Rows
    probe: tuple[Rows, Rows] | None

    def fingerprints(self) -> dict[str, str]:
        """Input -> its fingerprint."""
        fingerprints = {
            "base": self.plan.base.fingerprint,
            "plan": self.plan.fingerprint,
            "pruned": self.student.fingerprint,
            "rows": digest(self.rows.lists()),
        }
        if self.teacher:
            fingerprints["teacher"] = digest(self.teacher)
        if self.probe is not None:
            fingerprints["probe_rows"] = digest([part.lists() for part in self.probe])
        return fingerprints


def open_inputs(
    student: Checkpoint,
    spec: AlignOptions,
    trainer: Mapping[str, Any],
    base: str | Path | None,
    device: torch.device,
    *,
    now: datetime,
) -> Inputs:
    """Open and check everything, so that an error comes before any training.

    Args:
        student: the pruned model.
        spec: the options of the alignment.
        trainer: the options of the Trainer with every default filled in.
        base: the full model, if it is not at the name that the plan has.
        device: the device to train on.
        now: the time for chat templates that write one.

    Raises:
        UserError: a folder or data set cannot be used, or the full model does not fit in memory beside the student.
    """
    if not student.pruned:
        raise UserError(
            f"{student.name}: not a pruned folder; alignment trains what `loram prune` made of a full model"
        )
    if spec.lora_r is not None:
        check_mergeable(student)
        if student.quantized:
            raise UserError(f"{student.name}: is quantised, and the LoRA could not be added to it; take its original")
    plan, tokenizer = PruningPlan.load(student.folder), load_tokenizer(student)
    full = open_full(plan, base) if spec.live or spec.sampled or spec.probe else None
    if spec.live and full is not None:
        own = _TRAINED_BYTES if spec.lora_r is None else compute_dtype(device).itemsize
        needed = full.parameters * compute_dtype(device).itemsize + student.parameters * own
        remedy = "`loram teach` it first, and give the folder that makes with --teacher"
        _check_fits(full, needed, device, f"as a teacher beside the pruned model; {remedy}")
    length, seed = trainer["max_length"], trainer["seed"]
    if spec.teacher:
        rows = cached_rows(spec.teacher, plan.base, seed)
    elif spec.dataset:
        rows = read_rows(spec.dataset, tokenizer, length, student.vocabulary, seed, now=now)
    else:
        assert full is not None
        rows = _sampled(full, tokenizer, trainer, device)
    rows, probe = divide(rows, spec, seed)
    if spec.probe_dataset is not None:
        probe_rows = read_rows([spec.probe_dataset], tokenizer, length, student.vocabulary, seed, now=now)
        probe = split(probe_rows, spec.probe_steps, seed, spec.probe_dataset.path)
    caches = tuple(_fingerprint(local(cache.path)) for cache in spec.teacher)
    return Inputs(student=student, plan=plan, full=full, teacher=caches, rows=rows, probe=probe)


def divide(rows: Rows, spec: AlignOptions, seed: int) -> tuple[Rows, tuple[Rows, Rows] | None]:
    """Divide rows into those to align on and those of the probe, where it has no data set of its own.

    Raises:
        UserError: there are too few rows.
    """
    if not spec.probe or spec.probe_dataset is not None:
        return rows, None
    return hold_out(rows, spec.probe_steps, seed)


def load_on(model: Checkpoint, device: torch.device) -> PreTrainedModel:
    """Return a model that only predicts, on a device, in the dtype that it computes in."""
    loaded: Any = load_model(model, dtype=compute_dtype(device))  # PreTrainedModel hides the types of `to` and `eval`
    placed: PreTrainedModel = loaded.to(device).eval()
    return placed


def _check_fits(full: Checkpoint, nbytes: int, device: torch.device, purpose: str) -> None:
    if not fits(nbytes, device):
        raise UserError(f"{full.name}: {nbytes / 1e9:.1f} GB do not fit in free memory {purpose}")


def _sampled(
    full: Checkpoint, tokenizer: PreTrainedTokenizerBase, trainer: Mapping[str, Any], device: torch.device
) -> Rows:
    """Return as many rows as the steps need, written by the full model."""
    needed = full.parameters * compute_dtype(device).itemsize
    _check_fits(full, needed, device, "to sample text from it; give text with --dataset")
    steps, seed = trainer.get("max_steps", -1), trainer["seed"]
    rows_per_step = trainer["per_device_train_batch_size"] * trainer.get("gradient_accumulation_steps", 1)
    count = steps * rows_per_step if steps > 0 else SAMPLED_ROWS
    logger.info("no data set given: sampling %d rows from %s", count, full.name)

    def sample() -> list[dict[str, list[int]]]:
        return sample_rows(load_on(full, device), tokenizer, count, trainer["max_length"], seed)

    return Rows([processes.broadcast(sample)], places([range(count)]))


def _fingerprint(folder: Path) -> str:
    manifest = find_manifest(folder)
    return "" if manifest is None else manifest.fingerprint
