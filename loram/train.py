"""The train stage: a LoRA adapter on a pruned (or plain) model, through TRL's SFTTrainer and PEFT."""

import dataclasses
import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loram.artifacts import check_output, publish
from loram.checkpoints import Checkpoints, guarded
from loram.data import load_tokens
from loram.data_spec import DataSpec, as_spec
from loram.errors import UserError
from loram.loss import ChunkedLossTrainer
from loram.model.adapter import Adapter, save_adapter
from loram.model.checkpoint import Checkpoint, open_model
from loram.model.device import compute_dtype, keep_freed_memory_, pick_device
from loram.model.plan import find_plan
from loram.model.pruned import load_model, load_tokenizer
from loram.names import in_recipe
from loram.progress import training_progress

logger = logging.getLogger(__name__)

METHODS = ("lora",)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The paper's LoRA settings (arXiv 2502.13533, section 4); lm_head on request.
LORA_DEFAULTS: Mapping[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": list(LINEARS)}
TRAINER_DEFAULTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_length": 512,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
}
# Options that would be ignored in silence, since rows come to the trainer as token ids and labels.
_OURS = {
    "output_dir",
    "assistant_only_loss",
    "chat_template_path",
    "completion_only_loss",
    "dataset_kwargs",
    "dataset_text_field",
    "eos_token",
    "logging_nan_inf_filter",
    "model_init_kwargs",
    "resume_from_checkpoint",
    "save_only_model",
    "truncation_mode",
}
_BEYOND_LORA = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters")
LOG_NAME = "training_log.jsonl"
# What a log entry has of timings, or counts from the last start only and not from the first.
_OF_THE_SESSION = ("runtime", "per_second", "total_flos", "num_tokens")


def train(
    model: str | Path,
    out: str | Path,
    *,
    data: DataSpec | str | Path | Mapping[str, Any],
    method: str = "lora",
    lora: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed: int = 42,
    device: str | None = None,
    fresh: bool = False,
) -> Path:
    """Train a LoRA adapter on a pruned folder, or on any supported full model.

    Checkpoints go to `OUT-checkpoints`. The same call after an interruption goes on from the newest whole one and ends
    with the same bytes as an undisturbed run on that machine. The folder is removed in the end, unless `trainer` sets
    `save_strategy`.

    Args:
        model: pruned folder, or hub id, folder or GGUF file of a full model.
        out: the adapter folder to make: PEFT's files, the tokenizer with its chat template, and the plan if any.
        data: the training rows (see `loram.data`).
        method: `lora`.
        lora: options of PEFT's `LoraConfig` under their own names, over `LORA_DEFAULTS`.
        trainer: options of TRL's `SFTConfig` under their own names, over `TRAINER_DEFAULTS`.
        seed: of initialisation, data order and dropout.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.
        fresh: start over where `OUT-checkpoints` has an interrupted training.

    Returns:
        `out`.

    Raises:
        UserError: a model, data set or option cannot be used, `out` exists, or the interrupted training was one with
            other settings or data.
        FloatingPointError: a loss, gradient or weight is not finite; names the step and the tensor.
    """
    out = Path(out)
    check_output(out, model)
    lora_options, trainer_options = check_options(method, lora or {}, {"seed": seed, **(trainer or {})})
    checkpoint = open_model(model)
    chosen = pick_device(device)
    spec = as_spec(data)
    tokenizer = load_tokenizer(checkpoint)
    trainer_options["max_length"] = spec.max_length or trainer_options["max_length"]
    tokens = load_tokens(spec, tokenizer, trainer_options["max_length"], vocabulary=checkpoint.vocabulary)
    settings = {
        "method": method,
        "lora": lora_options,
        "trainer": trainer_options,
        "data": spec.model_dump(mode="json"),
        "rows": len(tokens.rows),
        "rows_truncated": tokens.truncated,
        "rows_skipped": tokens.skipped,
    }
    made_from = {**_inputs(checkpoint), "rows": _rows_digest(tokens.rows)}
    checkpoints = Checkpoints(
        out.with_name(f"{out.name}-checkpoints"),
        made_from=made_from,
        settings={**settings, "device": chosen.type},
        limit=trainer_options["save_total_limit"],
    )
    with publish(out, kind="adapter", made_from=made_from, settings=settings) as staging:
        with checkpoints.open(fresh=fresh):
            history, adapter = _fit(
                checkpoint, tokens.rows, tokenizer, lora_options, trainer_options, chosen, checkpoints
            )
        save_adapter(staging, {**adapter.config, "base_model_name_or_path": checkpoint.name}, adapter.tensors)
        tokenizer.save_pretrained(staging)
        log = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history)
        (staging / LOG_NAME).write_text(log, encoding="utf-8")
        if plan := find_plan(checkpoint.folder):
            plan.save(staging)
    if "save_strategy" not in (trainer or {}):
        checkpoints.remove()
    return out


def check_options(
    method: str, lora: Mapping[str, Any], trainer: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our defaults with the given options over them; options that would not mean what they say are refused.

    Raises:
        UserError: the method is unknown, PEFT or TRL has no such option (names the nearest), or two do not go together.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is not known; known are {', '.join(METHODS)}")
    lora = {**LORA_DEFAULTS, "task_type": "CAUSAL_LM", **lora}
    trainer = {**TRAINER_DEFAULTS, **trainer}

    from peft import LoraConfig
    from trl import SFTConfig

    for section, given, known in (("lora", lora, LoraConfig), ("trainer", trainer, SFTConfig)):
        names = _option_names(known)
        for key in given:
            if key not in names:
                hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(key, names, n=1))
                if place := in_recipe(key, f"train.{section}", names):
                    hint = f"; here it is called {place}"
                raise UserError(f"{section}: {known.__name__} of this version has no option {key!r}{hint}")
    if ours := sorted(_OURS & trainer.keys()):
        raise UserError(f"trainer: {ours[0]} cannot be set: loram writes the output and prepares the rows itself")
    if beyond := sorted(key for key in _BEYOND_LORA if lora.get(key)):
        raise UserError(f"lora: {beyond[0]} cannot be used: what it trains could not be recovered for the full model")
    if lora.get("bias", "none") != "none":
        raise UserError("lora: bias should be none: trained biases could not be recovered for the full model")
    targets = lora["target_modules"]
    if not isinstance(targets, Sequence) or isinstance(targets, str) or not targets:
        raise UserError(f"lora: target_modules should be a list of module names, but is {targets!r}")
    if unknown := sorted(set(targets) - {*LINEARS, "lm_head"}):
        raise UserError(f"lora: target_modules has {unknown[0]!r}; known are {', '.join((*LINEARS, 'lm_head'))}")
    if "lm_head" in targets and trainer.get("packing"):
        raise UserError("trainer: packing cannot be combined with an adapter on lm_head yet; drop one of them")
    if trainer["max_length"] is None:
        raise UserError("trainer: max_length should be a number of tokens")
    return lora, trainer


def build_configs(
    lora: Mapping[str, Any], trainer: Mapping[str, Any], device: torch.device, output_dir: Path | None = None
) -> tuple[Any, Any]:
    """PEFT's LoraConfig and TRL's SFTConfig of options that `check_options` gave; no weight is read for them.

    Raises:
        UserError: what PEFT or TRL say of the first bad value.
    """
    from peft import LoraConfig
    from trl import SFTConfig

    on_gpu = device.type == "cuda"
    options = {
        "bf16": on_gpu and compute_dtype(device) == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": on_gpu,
        **trainer,
        **_checkpointing(trainer, default=on_gpu, known=_option_names(SFTConfig)),
        "logging_nan_inf_filter": False,
        "output_dir": str(output_dir or "unused"),
    }
    try:
        return LoraConfig(**lora), SFTConfig(**options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise _as_user_error(error) from error


def _as_user_error(error: Exception) -> UserError:
    return UserError(f"train: {str(error).splitlines()[0]}")


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


def _fit(
    checkpoint: Checkpoint,
    rows: Any,
    tokenizer: Any,
    lora: Mapping[str, Any],
    trainer: Mapping[str, Any],
    device: torch.device,
    checkpoints: Checkpoints,
) -> tuple[list[dict[str, Any]], Adapter]:
    """Train; returns the log history and the adapter."""
    from peft import get_peft_model
    from transformers import PrinterCallback, ProgressCallback, set_seed
    from trl import SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    newest = checkpoints.newest()
    if newest is not None:
        logger.info("going on from %s in %s", newest.name, newest.parent)
        if (finished := _finished(newest)) is not None:
            return finished
    adapter, arguments = build_configs(lora, trainer, device, checkpoints.staging)
    model = load_model(checkpoint, dtype=compute_dtype(device))
    set_seed(arguments.seed)
    try:
        model = get_peft_model(model, adapter)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise _as_user_error(error) from error
    if device.type == "cpu":
        keep_freed_memory_()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = (
        None if arguments.packing or arguments.padding_free else DataCollatorForLanguageModeling(pad_token_id=pad)
    )
    kind = SFTTrainer
    if "lm_head" in lora["target_modules"]:
        # TRL's fused loss reads lm_head.weight and would never train an adapter on it (TRL refuses).
        kind = ChunkedLossTrainer
        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()
    runner = guarded(kind, checkpoints)(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, data_collator=collator
    )
    for callback in (ProgressCallback, PrinterCallback):  # they print to stdout, which is for results
        runner.remove_callback(callback)
    runner.add_callback(training_progress())
    runner.train(resume_from_checkpoint=newest and str(newest))
    trained = checkpoints.staging / "adapter"
    model.save_pretrained(trained, save_embedding_layers=False)
    return _history(runner.state.log_history), Adapter.load(trained)


def _finished(checkpoint: Path) -> tuple[list[dict[str, Any]], Adapter] | None:
    """The outcome of a training that was stopped after its last step: transformers would take one step more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] < state["max_steps"]:
        return None
    return _history(state["log_history"]), Adapter.load(checkpoint)


def _checkpointing(trainer: Mapping[str, Any], *, default: bool, known: Sequence[str]) -> dict[str, bool | None]:
    """Activation checkpointing under the name this version of transformers has; newer ones deprecate the older name."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    value = trainer.get(new, trainer.get(old, default))
    return {new: value, old: None} if new in known else {old: value}


def _option_names(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if field.init]


def _history(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The logged losses, with what is the same however often training was interrupted: it ends with the same bytes."""
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in _OF_THE_SESSION)}
        for entry in log
        if "loss" in entry
    ]
