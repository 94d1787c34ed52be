"""The polish stage: a few exact LoRA steps on the full model, with one of its decoder layers in memory at a time.

What an adapter could not learn on the pruned model (what the pruned heads and channels would have learnt, and what it
learnt to make up for them) it learns here. A step reads the full model from disk twice, whatever the batch.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from loram.base.errors import UserError
from loram.base.progress import track
from loram.compute.device import compute_dtype, pick_device
from loram.compute.loading import load_tokenizer
from loram.compute.streaming import BATCH_TOKENS, Stream
from loram.data.batches import make_batches
from loram.data.spec import DataSpec, as_spec
from loram.data.tokens import load_tokens
from loram.disk.adapter import Adapter, load_for, save_adapter
from loram.disk.artifacts import check_output, digest, find_manifest, publish
from loram.disk.checkpoint import Checkpoint
from loram.disk.files import copy_side_files
from loram.disk.opening import open_model
from loram.trainer.checkpoints import Checkpoints

logger = logging.getLogger(__name__)

LOG_NAME = "polish_log.jsonl"
_FACTORS, _OPTIMIZER, _LOG = "factors.safetensors", "optimizer.pt", "log.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolishOptions:
    """How to polish; names and meanings as in transformers' `TrainingArguments`.

    Args:
        max_steps: optimiser steps, each of which reads the full model twice.
        per_device_train_batch_size: rows a step; they go through a layer in micro-batches of 2,048 tokens.
        learning_rate: at the first step; falls to 0 along a cosine.
        max_length: tokens a row.
        max_grad_norm: gradients are clipped to.
    """

    max_steps: int = 8
    per_device_train_batch_size: int = 16
    learning_rate: float = 5e-4
    max_length: int = 512
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise UserError(f"polish: {name} is {value}, but should be above 0")


def polish(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    data: DataSpec | str | Path | Mapping[str, Any],
    options: PolishOptions | None = None,
    seed: int = 42,
    device: str | None = None,
    fresh: bool = False,
) -> Path:
    """Go on training a recovered adapter on the full model, which is read from disk layer by layer.

    Gradients are those of the whole model (reverse mode through one layer at a time), by AdamW without weight decay.
    Memory: a decoder layer, the adapter three times over, and the hidden states of a step's rows before every layer,
    which go to a scratch file beyond 256 MB. Factors on lm_head stay as they are.

    Every step leaves a checkpoint in `OUT-checkpoints`; the same call after an interruption goes on from there and ends
    with the same bytes.

    Args:
        base: hub id, folder or GGUF file of the full model, in 16 or 32 bits.
        adapter: the recovered adapter, or any LoRA adapter of `base`.
        out: the adapter folder to make, of the same shapes.
        data: the training rows (see `loram.data.tokens`).
        options: steps, rows a step, learning rate, lengths.
        seed: of the order of rows.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.
        fresh: start over where `OUT-checkpoints` has an interrupted run.

    Returns:
        `out`.

    Raises:
        UserError: model, adapter, data or an option cannot be used, `out` exists, or the interrupted run was one with
            other settings or data.
        FloatingPointError: a loss or gradient is not finite.
    """
    out, source, chosen = Path(out), Path(adapter), options or PolishOptions()
    check_output(out, base, source)
    checkpoint, spec = open_model(base), as_spec(data)
    start = load_for(checkpoint, source)
    if start.dora:
        raise UserError(f"{source}: a DoRA adapter, and only plain LoRA can be polished")
    length = spec.max_length or chosen.max_length
    rows = load_tokens(spec, load_tokenizer(checkpoint), length, vocabulary=checkpoint.vocabulary).rows
    rows = rows.shuffle(seed=seed)
    on, before = pick_device(device), find_manifest(source)
    made_from = {
        **({} if before is None else before.made_from),
        "base": checkpoint.fingerprint,
        "adapter": start.fingerprint,
        "rows": digest([rows["input_ids"][:], rows["labels"][:]]),
    }
    settings = {**dataclasses.asdict(chosen), "data": spec.model_dump(mode="json"), "seed": seed}
    checkpoints = Checkpoints(
        out.with_name(f"{out.name}-checkpoints"),
        made_from=made_from,
        settings={**settings, "device": on.type},
        limit=1,
    )
    kind = "adapter" if before is None else before.kind
    with publish(out, kind=kind, made_from=made_from, settings=settings) as staging:
        with checkpoints.open(fresh=fresh):
            log, tensors = _fit(checkpoint, start, rows, chosen, on, checkpoints)
        dtypes = {name: tensor.dtype for name, tensor in start.tensors.items()}
        save_adapter(staging, start.config, {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()})
        copy_side_files(source, staging)
        (staging / LOG_NAME).write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    checkpoints.remove()
    return out


def _fit(
    checkpoint: Checkpoint,
    start: Adapter,
    rows: Any,
    options: PolishOptions,
    device: torch.device,
    checkpoints: Checkpoints,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Take the steps; returns the log and the adapter's tensors in float32."""
    tensors = {name: tensor.float().clone() for name, tensor in start.tensors.items()}
    trained = {name: tensor for name, tensor in tensors.items() if checkpoint.architecture.split(name) is not None}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=options.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, options.max_steps)
    log: list[dict[str, float]] = []
    if (newest := checkpoints.newest()) is not None:
        logger.info("going on from %s in %s", newest.name, newest.parent)
        log = json.loads((newest / _LOG).read_text(encoding="utf-8"))
        for name, tensor in load_file(newest / _FACTORS).items():
            tensors[name].copy_(tensor)
        state = torch.load(newest / _OPTIMIZER, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    adapter = dataclasses.replace(start, tensors=tensors)
    size = options.per_device_train_batch_size
    for step in track(range(len(log), options.max_steps), "Polishing"):
        places = [(step * size + row) % len(rows) for row in range(size)]
        batch = rows.select(places)
        loss = _differentiate_(checkpoint, adapter, (batch["input_ids"][:], batch["labels"][:]), device)
        norm = nn.utils.clip_grad_norm_(list(trained.values()), options.max_grad_norm)
        if not (torch.isfinite(norm) and loss == loss):
            raise FloatingPointError(f"step {step + 1}: loss {loss}, norm of the gradient {norm}; lower learning_rate")
        log.append({"step": step + 1, "loss": loss, "learning_rate": schedule.get_last_lr()[0]})
        logger.info("step %d of %d: loss %.4f", step + 1, options.max_steps, loss)
        optimizer.step()
        schedule.step()
        _save(checkpoints, tensors, {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, log)
    return log, tensors


def _differentiate_(
    checkpoint: Checkpoint, adapter: Adapter, rows: tuple[list[list[int]], list[list[int]]], device: torch.device
) -> float:
    """Set the gradients of an adapter's factors, by their mean loss on some rows; returns that."""
    batches = make_batches(*rows, max_tokens=BATCH_TOKENS)
    stream = Stream(checkpoint, batches, device=device, dtype=compute_dtype(device), adapter=adapter)
    for _ in stream.forward(keep_from=0):
        pass

    def take(name: str, factor: Tensor, gradient: Tensor) -> None:
        adapter.tensors[name].grad = gradient.to("cpu", copy=True)

    for _ in stream.backward(0, take, of="factors"):
        pass
    assert stream.loss is not None
    return stream.loss


def _save(
    checkpoints: Checkpoints, tensors: dict[str, Tensor], state: dict[str, Any], log: list[dict[str, float]]
) -> None:
    folder = checkpoints.staging / f"checkpoint-{len(log)}"
    folder.mkdir(parents=True)
    save_file(tensors, folder / _FACTORS)
    torch.save(state, folder / _OPTIMIZER)
    (folder / _LOG).write_text(json.dumps(log), encoding="utf-8")
    checkpoints.adopt(len(log))
