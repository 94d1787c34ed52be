"""The train stage: a pruned (or plain) model by one of the methods, by transformers' Trainer, PEFT and parts of TRL."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback

from loram.base import processes
from loram.base.errors import UserError
from loram.base.progress import training_progress
from loram.compute.device import allocate_, compute_dtype, pick_device
from loram.compute.loading import load_model, load_tokenizer, open_full
from loram.compute.loss import use_chunked_loss_
from loram.compute.masked import mask_updates_
from loram.data.spec import DataSpec, as_spec
from loram.data.tokens import load_tokens
from loram.disk.adapter import ROW_LENGTHS_NAME, Adapter, save_adapter
from loram.disk.artifacts import check_output, publish
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.model.plan import MASKS_NAME, find_plan
from loram.trainer.arguments import as_user_error, checkpoints_activations
from loram.trainer.checkpoints import Checkpoints, guarded, lasting
from loram.training.anchors import Course, anchored
from loram.training.liger import use_liger_
from loram.training.methods.adapters import draw_from_data_, row_lengths, specialise_
from loram.training.methods.table import METHODS
from loram.training.methods.weights import extract, lisa_callback, unfreeze_, write_model
from loram.training.options import TrainOptions, build_configs, check_options

logger = logging.getLogger(__name__)

LOG_NAME = "training_log.jsonl"
_EVA_BATCHES = 16


def train(
    model: str | Path,
    out: str | Path,
    *,
    data: DataSpec | str | Path | Mapping[str, Any],
    method: str = "lora",
    lora: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    load_in_4bit: bool = False,
    offload_embedding: bool = False,
    lora_dtype: str = "float32",
    mask_update: bool = False,
    lisa: Mapping[str, Any] | None = None,
    lora_sp: Mapping[str, Any] | None = None,
    anchor_steps: int | None = None,
    anchor_gradients: bool = True,
    base: str | Path | None = None,
    seed: int = 42,
    device: str | None = None,
    fresh: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train an adapter on a pruned folder, or on any supported full model; or weights themselves (`lisa`, `full`).

    What those change in a pruned model is extracted as an adapter in the end; of a full one they make a full one.

    Checkpoints go to `OUT-checkpoints`. The same call after an interruption goes on from the newest whole one and ends
    with the same bytes as an undisturbed run on that machine. The folder is removed in the end, unless `trainer` sets
    `save_strategy`.

    Args:
        model: pruned folder, or hub id, folder or GGUF file of a full model.
        out: the adapter folder to make: PEFT's files, the tokenizer with its chat template, and the plan if any. With
            `lisa` or `full` on a full model, an ordinary model folder.
        data: the training rows (see `loram.data.tokens`).
        method: a key of `loram.training.methods.table.METHODS`: lora, rslora, dora, lora-fa, lora-sp, lisa or full.
        lora: options of PEFT's `LoraConfig` under their own names, over `LORA_DEFAULTS`; `lisa` and `full` use only
            r, the rank of what is extracted, and say so of the others.
        trainer: options of TRL's `SFTConfig` under their own names, over `TRAINER_DEFAULTS`.
        load_in_4bit: keep the frozen weights, lm_head and embedding among them, in NF4 with double quantisation
            (QLoRA, arXiv 2305.14314); so does a folder that `quantize` made, without being asked.
        offload_embedding: with that, leave the embedding in 16 bits in host memory.
        lora_dtype: `float32`, or `bfloat16`, which halves the adapter, its gradients and its optimiser's state.
        mask_update: on a sparse pruned model, keep the update zero wherever the model has no weight, as LoRAM does
            (arXiv 2502.13533, section 3.1); the adapter folder then has the masks, and is merged, not recovered.
        lisa: options of that method: `loram.training.methods.table.LisaOptions`.
        lora_sp: options of method lora-sp: `loram.training.methods.table.LoraSpOptions`.
        anchor_steps: every so many steps send the rows of the next ones through the full model, streamed from disk,
            and train on its course (see `loram.training.anchors`); for pruned folders. None or 0: never.
        anchor_gradients: with that, send them back through it, too, for what the pruned layers leave out of gradients.
        base: the full model for that, where it is not at the name that the plan has.
        seed: of initialisation, data order, dropout and LISA's draws.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.
        fresh: start over where `OUT-checkpoints` has an interrupted training.
        callbacks: transformers' own, called as the training goes.

    Returns:
        `out`.

    Raises:
        UserError: a model, data set or option cannot be used, `out` exists, or the interrupted training was one with
            other settings or data.
        FloatingPointError: a loss, gradient or weight is not finite; names the step and the tensor.
    """
    out = Path(out)
    check_output(out, model)
    checkpoint = open_model(model)
    spec = as_spec(data)
    options = TrainOptions(
        method=method,
        lora=lora or {},
        trainer={"seed": seed, **(trainer or {}), **({"max_length": spec.max_length} if spec.max_length else {})},
        load_in_4bit=load_in_4bit or checkpoint.quantized,
        offload_embedding=offload_embedding,
        lora_dtype=lora_dtype,
        lisa=lisa,
        lora_sp=lora_sp,
        anchor_steps=anchor_steps,
        anchor_gradients=anchor_gradients,
        mask_update=mask_update,
    )
    options = check_options(options, checkpoint.architecture)
    _check_sparse(checkpoint, options)
    if method == "lisa" and processes.count() > 1:
        raise UserError("method lisa: trains in one process; several would wait for gradients of the layers it freezes")
    if METHODS[method].weights and (unused := sorted((lora or {}).keys() - {"r"})):
        logger.warning("method %s has no use for lora.%s: it trains the weights themselves", method, unused[0])
    chosen = pick_device(device)
    processes.join(cpu=chosen.type == "cpu")
    course = _course(checkpoint, options, base, chosen, out.parent) if anchor_steps else None
    tokenizer = load_tokenizer(checkpoint)
    tokens = load_tokens(spec, tokenizer, options.trainer["max_length"], vocabulary=checkpoint.vocabulary)
    settings = {
        **dataclasses.asdict(options),
        "data": spec.model_dump(mode="json"),
        "rows": len(tokens.rows),
        "rows_truncated": tokens.truncated,
        "rows_skipped": tokens.skipped,
        "processes": processes.count(),
    }
    made_from = {**_inputs(checkpoint), "rows": _rows_digest(tokens.rows)}
    checkpoints = Checkpoints(
        out.with_name(f"{out.name}-checkpoints"),
        made_from=made_from,
        settings={**settings, "device": chosen.type},
        limit=options.trainer["save_total_limit"],
    )
    kind = "model" if METHODS[method].weights and find_plan(checkpoint.folder) is None else "adapter"
    with publish(out, kind=kind, made_from=made_from, settings=settings) as staging, checkpoints.open(fresh=fresh):
        trained = _fit(checkpoint, tokens.rows, tokenizer, options, chosen, checkpoints, callbacks, course)
        if processes.first():  # the manifest, with what is found here, is written when this block ends
            settings.update(_write(staging, kind, trained, checkpoint, tokenizer, options))
    if "save_strategy" not in (trainer or {}):
        checkpoints.remove()
    return out


def _course(
    checkpoint: Checkpoint, options: TrainOptions, base: str | Path | None, device: torch.device, scratch: Path
) -> Course:
    plan = find_plan(checkpoint.folder)
    if plan is None:
        raise UserError(f"{checkpoint.name}: a full model is on its own course; anchor_steps is for pruned ones")
    scratch.mkdir(parents=True, exist_ok=True)
    assert options.anchor_steps
    return Course(
        base=open_full(plan, base),
        plan=plan,
        steps=options.anchor_steps,
        gradients=options.anchor_gradients,
        device=device,
        dtype=compute_dtype(device),
        scratch=scratch,
    )


def _check_sparse(checkpoint: Checkpoint, options: TrainOptions) -> None:
    """Refuse what goes only with sparse models, or not with them."""
    if options.mask_update and not checkpoint.sparse:
        raise UserError(f"mask_update: {checkpoint.name} is not sparse: it has no weight that the mask would remove")
    if checkpoint.sparse and METHODS[options.method].weights:
        raise UserError(
            f"method {options.method}: {checkpoint.name} is sparse, and only the weights that it has left could train; "
            "take an adapter's method, or the full model"
        )


def _inputs(checkpoint: Checkpoint) -> dict[str, str]:
    plan = find_plan(checkpoint.folder)
    if plan is None:
        return {"base": checkpoint.fingerprint}
    return {"base": plan.base.fingerprint, "plan": plan.fingerprint, "pruned": checkpoint.fingerprint}


def _rows_digest(rows: Any) -> str:
    """SHA-256 of the rows' token ids and labels, in order."""
    digest = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(1000):
        for column in ("input_ids", "labels"):
            for row in batch[column]:
                digest.update(len(row).to_bytes(8, "little") + np.asarray(row, dtype="<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """What a training leaves.

    Args:
        folder: the trained adapter or model, as transformers and PEFT save it.
        log: the losses on the way.
        lengths: of DoRA: those of the rows of the frozen weights.
    """

    folder: Path
    log: list[dict[str, Any]]
    lengths: Mapping[str, Tensor] = field(default_factory=dict)


def _fit(
    checkpoint: Checkpoint,
    rows: Any,
    tokenizer: Any,
    options: TrainOptions,
    device: torch.device,
    checkpoints: Checkpoints,
    callbacks: Sequence[TrainerCallback],
    course: Course | None,
) -> _Trained:
    """Train, or go on with it."""
    from transformers import PrinterCallback, ProgressCallback, set_seed

    newest = checkpoints.newest()
    finished = None
    if newest is not None:
        logger.info("going on from %s in %s", newest.name, newest.parent)
        finished = _finished(newest)
        if finished is not None and options.method != "dora":
            return finished
    adapter, arguments = build_configs(options, device, checkpoints.staging)
    set_seed(arguments.seed)
    rows, collator = _batching(rows, arguments, tokenizer)
    if METHODS[options.method].weights:
        model, own = _thawed(checkpoint, options, arguments.seed)
    else:
        size = arguments.per_device_train_batch_size
        first = (rows.select(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size))
        model, own = _adapted(checkpoint, adapter, options, device, (collator(list(part)) for part in first)), []
    lengths = row_lengths(model) if options.method == "dora" else {}
    if finished is not None:
        return dataclasses.replace(finished, lengths=lengths)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    use_chunked_loss_(base)
    if arguments.use_liger_kernel:
        use_liger_(base, arguments.liger_kernel_config)
        arguments.use_liger_kernel = False  # transformers knows no pruned models, and would put Liger's loss over ours
    allocate_(device, lean=options.load_in_4bit or checkpoints_activations(arguments))
    kind = _Trainer if course is None else anchored(_Trainer, course)
    runner = guarded(kind, checkpoints)(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, data_collator=collator
    )
    for callback in (ProgressCallback, PrinterCallback):  # they print to stdout, which is for results
        runner.remove_callback(callback)
    for callback in (training_progress(), *own, *callbacks):
        runner.add_callback(callback)
    runner.train(resume_from_checkpoint=newest and str(newest))
    folder = checkpoints.staging / "trained"
    runner.save_model(str(folder))
    return _Trained(folder=folder, log=lasting(runner.state.log_history, "loss"), lengths=lengths)


def _adapted(
    checkpoint: Checkpoint, adapter: Any, options: TrainOptions, device: torch.device, batches: Iterator[Any]
) -> Any:
    """The model, frozen, with the adapter that will be trained on it; `batches` are for initialisations from data."""
    from peft import get_peft_model

    dtype = compute_dtype(device)
    if options.load_in_4bit:
        from loram.compute.nf4 import load_4bit

        model = load_4bit(checkpoint, device=device, dtype=dtype, offload_embedding=options.offload_embedding)
    else:
        model = load_model(checkpoint, dtype=dtype)
    from_data = options.lora.get("init_lora_weights") == "eva"
    try:
        adapted = get_peft_model(model, adapter, low_cpu_mem_usage=from_data)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise as_user_error(error) from error
    if from_data:
        draw_from_data_(adapted, list(itertools.islice(batches, _EVA_BATCHES)))
    specialise_(adapted, options.method, options.lora_sp)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, options.lora_dtype))
    if options.mask_update:
        mask_updates_(adapted)
    return adapted


def _thawed(checkpoint: Checkpoint, options: TrainOptions, seed: int) -> tuple[Any, list[TrainerCallback]]:
    """(the model in float32, which a GPU computes with in 16 bits, with what will be trained of it; callbacks)."""
    model = load_model(checkpoint, dtype=torch.float32)
    pruned = find_plan(checkpoint.folder) is not None
    layers = unfreeze_(model, pruned=pruned, around=not options.lisa or options.lisa["train_embeddings"])
    return model, [lisa_callback(layers, options.lisa, seed)] if options.lisa else []


def _write(
    out: Path, kind: str, trained: _Trained, checkpoint: Checkpoint, tokenizer: Any, options: TrainOptions
) -> dict[str, float]:
    """Write what was trained; returns what else is to be said of it."""
    found: dict[str, float] = {}
    if kind == "model":
        write_model(out, Checkpoint(trained.folder), checkpoint)
    else:
        found = _write_adapter(out, trained, checkpoint, options)
        tokenizer.save_pretrained(out)
    lines = [*trained.log, *([found] if found else [])]
    log = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in lines)
    (out / LOG_NAME).write_text(log, encoding="utf-8")
    return found


def _write_adapter(out: Path, trained: _Trained, checkpoint: Checkpoint, options: TrainOptions) -> dict[str, float]:
    """Write what was trained as a stock PEFT adapter, with the plan; returns what else is to be said of it."""
    found = {}
    if METHODS[options.method].weights:
        config, tensors, found["kept_share"] = extract(Checkpoint(trained.folder), checkpoint, options.lora["r"])
    else:
        adapter = Adapter.load(trained.folder)
        config, tensors = adapter.config, adapter.tensors
    save_adapter(out, {**config, "base_model_name_or_path": checkpoint.name}, tensors)
    if plan := find_plan(checkpoint.folder):
        plan.save(out)
        if options.mask_update:  # says that the update is masked, and by what
            shutil.copyfile(checkpoint.folder / MASKS_NAME, out / MASKS_NAME)
        if trained.lengths:
            save_file(dict(trained.lengths), out / ROW_LENGTHS_NAME, {"format": "pt"})
    return found


def _batching(rows: Any, arguments: Any, tokenizer: Any) -> tuple[Any, Any]:
    """(rows, packed where that is asked for; what makes batches of them)."""
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    if arguments.shuffle_dataset:
        rows = rows.shuffle(seed=arguments.seed)
    if arguments.packing:
        rows = pack_dataset(rows, arguments.max_length, arguments.packing_strategy)
    collator = DataCollatorForLanguageModeling(
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        padding_free=arguments.padding_free or (arguments.packing and arguments.packing_strategy != "wrapped"),
        pad_to_multiple_of=arguments.pad_to_multiple_of,
    )
    return rows, collator


class _Trainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, with TRL's offloading of activations to host memory, and exact dtypes on resuming."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offloading: Any = contextlib.nullcontext()
        if self.args.activation_offloading:
            from trl.models.activation_offloading import get_act_offloading_ctx_manager

            self._offloading = get_act_offloading_ctx_manager(self.model)

    def _load_from_checkpoint(self, *args: Any, **options: Any) -> None:
        """As transformers does, but an adapter in 16 bits stays so, and what is frozen of it.

        PEFT makes it 32 bits when it reads one, and lets all of it train.
        """
        before = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(*args, **options)
        for name, parameter in self.model.named_parameters():
            dtype, trained = before[name]
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(trained)

    def training_step(self, *args: Any, **options: Any) -> Any:
        with self._offloading:
            return super().training_step(*args, **options)


def _finished(checkpoint: Path) -> _Trained | None:
    """The outcome of a training that was stopped after its last step: transformers would take one step more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] < state["max_steps"]:
        return None
    return _Trained(folder=checkpoint, log=lasting(state["log_history"], "loss"))
