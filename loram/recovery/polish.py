"""The polish stage: a few exact LoRA steps on the full model, with one of its decoder layers in memory at a time.

An adapter cannot learn on the pruned model what the pruned heads and channels would have learnt, and it learns there to
make up for them. Both are mended here. A step reads the full model from disk twice, whatever the batch size.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from loram.base.constants import BATCH_TOKENS
from loram.base.errors import UserError
from loram.base.paths import local
from loram.base.progress import track
from loram.compute.belonging import load_for
from loram.compute.device import compute_dtype
from loram.compute.loading import load_tokenizer
from loram.compute.streaming import Stream
from loram.data.batches import make_batches
from loram.data.spec import DataSpec, as_spec
from loram.data.tokens import load_tokens
from loram.disk.adapter import Adapter, save_adapter
from loram.disk.artifacts import check_output, digest, find_manifest
from loram.disk.checkpoint import Checkpoint
from loram.disk.files import CHAT_TEMPLATE, copy_side_files
from loram.disk.opening import open_model
from loram.disk.renamed import in_wrapper
from loram.disk.template import as_setting
from loram.recovery.options import PolishOptions
from loram.trainer.checkpoints import Checkpoints
from loram.trainer.frame import Job, Outcome, join_processes, run_job
from loram.trainer.guard import check_gradients
from loram.trainer.resume import first_start

logger = logging.getLogger(__name__)

LOG_NAME = "polish_log.jsonl"
_FACTORS, _OPTIMIZER, _LOG = "factors.safetensors", "optimizer.pt", "log.json"


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
    chat_template: str | Path | None = None,
    **fields: Any,
) -> Path:
    """Go on training a recovered adapter on the full model, which is read from disk layer by layer.

    The gradients are those of the whole model, computed backward through one layer at a time; the optimiser is AdamW
    without weight decay. Memory holds one decoder layer, the adapter three times over, and the hidden states of a
    step's rows before every layer, which go to a scratch file beyond 256 MB. Factors on lm_head stay as they are.

    Every step leaves a checkpoint in `OUT-checkpoints`. After an interruption the same call goes on from there and ends
    with the same bytes.

    Args:
        base: the hub id, folder or GGUF file of the full model, in 16 or 32 bits.
        adapter: the recovered adapter, or any LoRA adapter of `base`.
        out: the adapter folder to make; its tensors have the same shapes.
        data: the training rows (see `loram.data.tokens`).
        options: how to polish; single options may be given by name instead: `max_steps=4`.
        seed: the seed of the order of rows.
        device: `cpu`, `cuda`, ...; by default the first GPU if there is one.
        fresh: begin anew where `OUT-checkpoints` has an interrupted run.
        chat_template: a .jinja file, or a model whose tokenizer has a template, in place of the model's own template.
        fields: single options by name, over `options`; see `PolishOptions`.

    Returns:
        `out`.

    Raises:
        UserError: the model, the adapter, the data or an option cannot be used, `out` exists, or the interrupted run
            had settings or data with another result.
        FloatingPointError: a loss or gradient is not finite.
        MissingGradientError: a tensor of the adapter gets no gradient; names it.
    """
    source, chosen = local(adapter), PolishOptions.of(options, **fields)
    out = check_output(out, base, source)
    checkpoint, spec = open_model(base, chat_template=chat_template), as_spec(data)
    start = load_for(checkpoint, source)
    if start.dora:
        raise UserError(f"{source}: a DoRA adapter, and only plain LoRA can be polished")
    if start.of_experts:
        raise UserError(f"{source}: adapts experts, and only adapters on linears can be polished")
    on, manifest = join_processes(device), find_manifest(source)
    length = spec.max_length or chosen.max_length
    started = first_start(out, fresh=fresh)
    tokens = load_tokens(spec, load_tokenizer(checkpoint), length, vocabulary=checkpoint.vocabulary, now=started)
    rows = tokens.rows.shuffle(seed=seed)
    job = _PolishJob(
        kind="adapter" if manifest is None else manifest.kind,
        made_from={
            **({} if manifest is None else manifest.made_from),
            "base": checkpoint.fingerprint,
            "adapter": start.fingerprint,
            "rows": digest([rows["input_ids"][:], rows["labels"][:]]),
        },
        settings={
            **chosen.model_dump(),
            "data": spec.model_dump(mode="json"),
            "seed": seed,
            **as_setting(checkpoint.chat_template),
        },
        names={"rows": spec.path, "base": checkpoint.name, "adapter": str(source)},
        started=started,
        device=on,
        checkpoint=checkpoint,
        start=start,
        rows=rows,
        options=chosen,
    )
    return run_job(job, out, fresh=fresh)


@dataclass(frozen=True, kw_only=True)
class Polished(Outcome):
    """The outcome of polishing.

    Args:
        tensors: the adapter's tensors in float32.
    """

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _PolishJob(Job[Polished]):
    """A polishing.

    Args:
        checkpoint: the full model.
        start: the adapter to begin with.
        rows: the tokenised rows, in the order that they are trained on.
        options: the options of polishing.
    """

    log_name: ClassVar[str] = LOG_NAME

    checkpoint: Checkpoint
    start: Adapter
    rows: Dataset
    options: PolishOptions

    def fit(self, checkpoints: Checkpoints, newest: Path | None) -> Polished:
        """Take the steps that are left."""
        architecture = self.checkpoint.architecture
        in_layers = [name for name in self.start.tensors if architecture.split(name) is not None]
        progress = _Progress(self.start, in_layers, self.options)
        if newest is not None:
            progress.load_(newest)
        adapter = dataclasses.replace(self.start, tensors=progress.tensors)
        for step in track(range(len(progress.log), self.options.max_steps), "Polishing"):
            loss = _differentiate_(self.checkpoint, adapter, self._batch(step), self.device)
            progress.step_(loss)
            progress.save(checkpoints)
        return Polished(log=progress.log, tensors=progress.tensors)

    def _batch(self, step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Return the token ids and labels of a step's rows, again from the first row when all are used up."""
        size = self.options.per_device_train_batch_size
        batch = self.rows.select([(step * size + row) % len(self.rows) for row in range(size)])
        return batch["input_ids"][:], batch["labels"][:]

    def write(self, out: Path, outcome: Polished) -> Mapping[str, float]:
        """Write the adapter in the dtypes that it came in."""
        tensors = {name: tensor.to(self.start.tensors[name].dtype) for name, tensor in outcome.tensors.items()}
        polished = dataclasses.replace(self.start, tensors=tensors)
        if self.checkpoint.wrapper is not None:
            polished = in_wrapper(polished, self.checkpoint.wrapper)
        save_adapter(out, polished.config, polished.tensors)
        copy_side_files(self.start.folder, out)
        if self.checkpoint.chat_template is not None:
            (out / CHAT_TEMPLATE).write_text(self.checkpoint.chat_template, encoding="utf-8")
        return {}


class _Progress:
    """The state of polishing after some steps: the adapter's tensors, the optimiser and the log.

    Args:
        start: the adapter to begin with.
        trained: the names of the tensors that train, those in decoder layers; factors on the head stay as they are.
        options: the options of polishing.
    """

    def __init__(self, start: Adapter, trained: Sequence[str], options: PolishOptions) -> None:
        self.options, self.log = options, list[dict[str, float]]()
        self.tensors = {name: tensor.float().clone() for name, tensor in start.tensors.items()}
        self._trained = {name: self.tensors[name] for name in trained}
        self._optimizer = torch.optim.AdamW(self._trained.values(), lr=options.learning_rate, weight_decay=0.0)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, 0, options.max_steps)

    def step_(self, loss: float) -> None:
        """Take an optimiser step along the gradients of the tensors.

        Raises:
            FloatingPointError: the loss or a gradient is not finite.
            MissingGradientError: a tensor has no gradient.
        """
        step, options = len(self.log) + 1, self.options
        check_gradients(self._trained, step)
        norm = nn.utils.clip_grad_norm_(self._trained.values(), options.max_grad_norm)
        if not (torch.isfinite(norm) and math.isfinite(loss)):
            raise FloatingPointError(f"step {step}: loss {loss}, norm of the gradient {norm}; lower learning_rate")
        self.log.append({"step": step, "loss": loss, "learning_rate": self._schedule.get_last_lr()[0]})
        logger.info("step %d of %d: loss %.4f", step, options.max_steps, loss)
        self._optimizer.step()
        self._schedule.step()

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint and put it in place."""
        step = len(self.log)
        folder = checkpoints.staging / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(self.tensors, folder / _FACTORS)
        state = {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}
        torch.save(state, folder / _OPTIMIZER)
        (folder / _LOG).write_text(json.dumps(self.log), encoding="utf-8")
        checkpoints.adopt(step)

    def load_(self, folder: Path) -> None:
        """Go back to what a checkpoint holds."""
        self.log = json.loads((folder / _LOG).read_text(encoding="utf-8"))
        for name, tensor in load_file(folder / _FACTORS).items():
            self.tensors[name].copy_(tensor)
        state = torch.load(folder / _OPTIMIZER, weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def _differentiate_(
    checkpoint: Checkpoint, adapter: Adapter, rows: tuple[list[list[int]], list[list[int]]], device: torch.device
) -> float:
    """Set the gradients of an adapter's factors: those of the mean loss on some rows.

    Args:
        checkpoint: the full model, read from disk layer by layer.
        adapter: the adapter on it; its tensors get gradients.
        rows: the token ids and the labels of each row.
        device: the device that computes.

    Returns:
        The loss, in nats per token.
    """
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
