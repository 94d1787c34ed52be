"""The train stage: a LoRA adapter on a pruned (or plain) model, through TRL's SFTTrainer and PEFT."""

import dataclasses
import difflib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loram.artifacts import check_output, publish
from loram.data import load_tokens
from loram.data_spec import DataSpec, as_spec
from loram.errors import UserError
from loram.model.adapter import Adapter, save_adapter
from loram.model.checkpoint import EMBEDDING, Checkpoint, open_model
from loram.model.device import compute_dtype, keep_freed_memory_, pick_device
from loram.model.plan import find_plan
from loram.model.pruned import load_model, load_tokenizer
from loram.names import in_recipe
from loram.progress import training_progress

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
    "save_strategy": "no",
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
    "model_init_kwargs",
    "truncation_mode",
}
_BEYOND_LORA = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters")
LOG_NAME = "training_log.jsonl"
_TIMINGS = ("runtime", "per_second", "total_flos")


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
) -> Path:
    """Train a LoRA adapter on a pruned folder, or on any supported full model.

    Args:
        model: pruned folder, or hub id, folder or GGUF file of a full model.
        out: the adapter folder to make: PEFT's files, the tokenizer with its chat template, and the plan if any.
        data: the training rows (see `loram.data`).
        method: `lora`.
        lora: options of PEFT's `LoraConfig` under their own names, over `LORA_DEFAULTS`.
        trainer: options of TRL's `SFTConfig` under their own names, over `TRAINER_DEFAULTS`.
        seed: of initialisation, data order and dropout.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.

    Returns:
        `out`.

    Raises:
        UserError: a model, data set or option cannot be used, or `out` exists.
        FloatingPointError: the loss or the adapter is not finite.
    """
    out = Path(out)
    check_output(out)
    lora_options, trainer_options = check_options(method, lora or {}, {"seed": seed, **(trainer or {})})
    checkpoint = open_model(model)
    chosen = pick_device(device)
    spec = as_spec(data)
    tokenizer = load_tokenizer(checkpoint)
    trainer_options["max_length"] = spec.max_length or trainer_options["max_length"]
    known = checkpoint.shape(EMBEDDING)[0]
    tokens = load_tokens(spec, tokenizer, trainer_options["max_length"], vocabulary=known)
    settings = {
        "method": method,
        "lora": lora_options,
        "trainer": trainer_options,
        "data": spec.model_dump(),
        "rows": len(tokens.rows),
        "rows_truncated": tokens.truncated,
        "rows_skipped": tokens.skipped,
    }
    with publish(out, kind="adapter", made_from=_inputs(checkpoint), settings=settings) as staging:
        with _work_folder(out, trainer_options) as work:
            history, adapter = _fit(checkpoint, tokens.rows, tokenizer, lora_options, trainer_options, chosen, work)
        save_adapter(staging, {**adapter.config, "base_model_name_or_path": checkpoint.name}, adapter.tensors)
        tokenizer.save_pretrained(staging)
        log = "".join(json.dumps(entry) + "\n" for entry in history)
        (staging / LOG_NAME).write_text(log, encoding="utf-8")
        if plan := find_plan(checkpoint.folder):
            plan.save(staging)
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


def check_values(lora: Mapping[str, Any], trainer: Mapping[str, Any], device: torch.device) -> None:
    """Let PEFT and TRL judge the values of options that `check_options` gave, before any weight is read.

    Raises:
        UserError: what they say of the first bad one.
    """
    from peft import LoraConfig
    from trl import SFTConfig

    on_gpu = device.type == "cuda"
    checkpointing = _checkpointing(trainer, default=on_gpu, known=_option_names(SFTConfig))
    ours = {"use_cpu": device.type == "cpu", "bf16": on_gpu and compute_dtype(device) == torch.bfloat16}
    try:
        LoraConfig(**lora)
        SFTConfig(**{**ours, **trainer, **checkpointing, "output_dir": "unused"})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"train: {str(error).splitlines()[0]}") from error


def _inputs(checkpoint: Checkpoint) -> dict[str, str]:
    plan = find_plan(checkpoint.folder)
    if plan is None:
        return {"base": checkpoint.fingerprint}
    return {"base": plan.base.fingerprint, "plan": plan.fingerprint, "pruned": checkpoint.fingerprint}


class _work_folder:
    """Where the trainer keeps its checkpoints: beside the output if it saves any, else a temporary folder."""

    def __init__(self, out: Path, trainer: Mapping[str, Any]) -> None:
        self.kept = trainer["save_strategy"] != "no"
        self.path = out.with_name(f"{out.name}-checkpoints") if self.kept else Path(tempfile.mkdtemp(prefix="loram-"))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exception: object) -> None:
        if not self.kept:
            shutil.rmtree(self.path, ignore_errors=True)


def _fit(
    checkpoint: Checkpoint,
    rows: Any,
    tokenizer: Any,
    lora: Mapping[str, Any],
    trainer: Mapping[str, Any],
    device: torch.device,
    work: Path,
) -> tuple[list[dict[str, Any]], Adapter]:
    """Train; returns the log history and the adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, ProgressCallback, Trainer, set_seed
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    dtype = compute_dtype(device)
    on_gpu = device.type == "cuda"
    options = {
        "bf16": on_gpu and dtype == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": on_gpu,
        **trainer,
        **_checkpointing(trainer, default=on_gpu, known=_option_names(SFTConfig)),
        "output_dir": str(work),
    }
    model = load_model(checkpoint, dtype=dtype)
    try:
        arguments = SFTConfig(**options)
        set_seed(arguments.seed)
        model = get_peft_model(model, LoraConfig(**lora))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"train: {str(error).splitlines()[0]}") from error
    if not on_gpu:
        keep_freed_memory_()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = (
        None if arguments.packing or arguments.padding_free else DataCollatorForLanguageModeling(pad_token_id=pad)
    )
    kind = SFTTrainer
    if "lm_head" in lora["target_modules"]:
        # TRL's fused loss reads lm_head.weight and would never train an adapter on it (TRL refuses), so that case
        # goes through the plain loss of transformers' Trainer, with the same collator and labels.
        kind = Trainer
        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()
    runner = kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, data_collator=collator)
    for callback in (ProgressCallback, PrinterCallback):  # they print to stdout, which is for results
        runner.remove_callback(callback)
    runner.add_callback(training_progress())
    runner.train()
    history = [_without_timings(entry) for entry in runner.state.log_history]
    for entry in history:
        if not math.isfinite(entry.get("loss", 0.0)):
            raise FloatingPointError(f"step {entry['step']}: the loss is {entry['loss']}; try a lower learning_rate")
    model.save_pretrained(work / "adapter", save_embedding_layers=False)
    return history, Adapter.load(work / "adapter")


def _checkpointing(trainer: Mapping[str, Any], *, default: bool, known: Sequence[str]) -> dict[str, bool | None]:
    """Activation checkpointing under the name this version of transformers has; newer ones deprecate the older name."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    value = trainer.get(new, trainer.get(old, default))
    return {new: value, old: None} if new in known else {old: value}


def _option_names(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if field.init]


def _without_timings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A log entry without what varies from run to run, so that the same training gives the same bytes."""
    return {key: value for key, value in entry.items() if not any(part in key for part in _TIMINGS)}
