"""Options of training: defaults, what PEFT and TRL take, and what would not mean what it says."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from loram.base.errors import UserError, first_problem
from loram.compute.device import compute_dtype
from loram.model.architecture import Architecture
from loram.model.families import KNOWN_TARGETS, LINEARS
from loram.trainer.arguments import as_user_error, check_names, checkpointing, option_names
from loram.training.methods.table import OPTIONS, Method, frozen_ranks, method_of

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
    "remove_unused_columns",
    "resume_from_checkpoint",
    "save_only_model",
    "truncation_mode",
    "dataset_num_proc",
    "eval_packing",
    "pad_token",
}
_OTHER_LOSSES = ("loss_type", "label_smoothing_factor", "router_aux_loss_coef")
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the model's weights as they are
LORA_DTYPES = ("float32", "bfloat16")
_BEYOND_LORA = ("modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train.

    Args:
        method: a key of `METHODS`.
        lora: options of PEFT's LoraConfig.
        trainer: options of TRL's SFTConfig.
        load_in_4bit: keep the frozen weights, lm_head and embedding among them, in NF4 (QLoRA, arXiv 2305.14314).
        offload_embedding: with that, leave the embedding in 16 bits in host memory.
        lora_dtype: of the adapter, its gradients and its optimiser's state: one of `LORA_DTYPES`.
        anchor_steps: train on the full model's course, measured every so many steps (see `loram.training.anchors`);
            None or 0 does not.
        anchor_gradients: with that, measure what is left out of gradients, too.
        lisa, lora_sp: options of the methods of these names; None with any other.
        mask_update: on a sparse model, keep the update zero where the model has no weight (arXiv 2502.13533, section
            3.1); it can then be merged, but not recovered.
    """

    method: str = "lora"
    lora: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    load_in_4bit: bool = False
    offload_embedding: bool = False
    lora_dtype: str = "float32"
    anchor_steps: int | None = None
    anchor_gradients: bool = True
    lisa: Mapping[str, Any] | None = None
    lora_sp: Mapping[str, Any] | None = None
    mask_update: bool = False


def check_options(given: TrainOptions, architecture: Architecture | None = None) -> TrainOptions:
    """Our defaults with the given options over them; options that would not mean what they say are refused.

    Raises:
        UserError: the method is unknown, PEFT or TRL has no such option (names the nearest), or two do not go together.
    """
    method = method_of(given.method)
    if given.lora_dtype not in LORA_DTYPES:
        raise UserError(f"lora_dtype {given.lora_dtype!r} is not known; known are {', '.join(LORA_DTYPES)}")
    if given.offload_embedding and not given.load_in_4bit:
        raise UserError("offload_embedding: is for models in 4 bits; add load_in_4bit, or leave it out")
    undropped = {"lora_dropout": 0.0} if given.mask_update else {}
    lora = {**LORA_DEFAULTS, **method.defaults, **undropped, "task_type": "CAUSAL_LM", **given.lora}
    if architecture is not None:
        lora["target_modules"] = given.lora.get("target_modules", list(architecture.adapter_targets))
    trainer = {**TRAINER_DEFAULTS, **method.trainer, **given.trainer}
    if given.mask_update:
        _check_masked(given, lora)
    _check_names(lora, trainer)
    _check_lora(lora, KNOWN_TARGETS if architecture is None else (*architecture.adapter_targets, architecture.head))
    _check_method(given, method)
    lora |= method.lora
    own = _own_options(given)
    if given.method == "lora-sp":
        _check_sparse(lora, own["lora_sp"]["share"])
    if ours := sorted(_OURS & trainer.keys()):
        raise UserError(f"trainer: {ours[0]} cannot be set: loram writes the output and prepares the rows itself")
    if other := [key for key in _OTHER_LOSSES if trainer.get(key) not in (None, 0, "nll")]:
        raise UserError(f"trainer: {other[0]} cannot be set: the loss is cross entropy, worked out a chunk at a time")
    if trainer["max_length"] is None:
        raise UserError("trainer: max_length should be a number of tokens")
    if given.anchor_steps:
        trainer = _anchored(given, trainer)
    return dataclasses.replace(given, lora=lora, trainer=trainer, **own)


def _check_masked(given: TrainOptions, lora: Mapping[str, Any]) -> None:
    """Refuse what does not go together with a masked update."""
    if lora["lora_dropout"]:
        raise UserError(
            "mask_update: needs lora_dropout 0: what is masked is the update itself, which no dropout comes before"
        )
    if given.method not in ("lora", "rslora"):
        raise UserError(f"mask_update: is for methods lora and rslora, and the method is {given.method}")


def _check_method(given: TrainOptions, method: Method) -> None:
    """Refuse options that contradict the method, or that it would ignore."""
    for key, value in method.lora.items():
        if given.lora.get(key, value) != value:
            raise UserError(f"lora: {key} is {value} with method {given.method}; leave it out")
    if given.lora.get("use_dora") and given.method != "dora":
        raise UserError(f"lora: use_dora cannot be used with method {given.method}; take method dora")
    if given.method == "dora" and given.lora_dtype != "float32":
        raise UserError("lora_dtype: DoRA's magnitudes need float32; leave it out")
    if not method.weights:
        return
    if given.lora_dtype != "float32":
        raise UserError(f"lora_dtype: method {given.method} trains the weights themselves, in float32; leave it out")
    if given.load_in_4bit:
        raise UserError(
            f"load_in_4bit: method {given.method} trains the weights themselves, and weights in 4 bits cannot be "
            "trained; take lora, rslora, dora, lora-fa or lora-sp, or the model in 16 or 32 bits"
        )


def _own_options(given: TrainOptions) -> dict[str, Any]:
    """The options that only the method has, with their defaults."""
    for method, (section, _) in OPTIONS.items():
        if getattr(given, section) is not None and given.method != method:
            raise UserError(f"{section}: these are options of method {method}, and the method is {given.method}")
    if given.method not in OPTIONS:
        return {}
    section, kind = OPTIONS[given.method]
    try:
        return {section: kind.model_validate(getattr(given, section) or {}).model_dump()}
    except ValidationError as error:
        raise UserError(f"{section}: {first_problem(error)}") from error


def _check_sparse(lora: Mapping[str, Any], share: float) -> None:
    """Refuse what LoRA-SP, which draws the factors itself, could not do exactly."""
    for key in ("rank_pattern", "init_lora_weights"):
        if lora.get(key, True) not in (True, None, {}):
            raise UserError(f"lora: {key} cannot be used with method lora-sp, which splits and draws all ranks alike")
    frozen_ranks(lora["r"], share)


def why_not_anchored(given: TrainOptions) -> str | None:
    """What keeps a training of a pruned model from staying on the full model's course, if anything does."""
    if given.method == "dora" or method_of(given.method).weights:
        return f"measures with the adapter recovered, which method {given.method} cannot be meanwhile"
    if given.mask_update:
        return "measures with the adapter recovered, which a masked update cannot be; drop mask_update"
    for key in ("packing", "padding_free"):
        if given.trainer.get(key):
            return f"measures each row by itself, and {key} puts rows together; drop one"
    return None


def _anchored(given: TrainOptions, trainer: dict[str, Any]) -> dict[str, Any]:
    """Options of a training that is measured every so many steps: a checkpoint is where the next measurement is."""
    steps = given.anchor_steps
    assert steps is not None
    if steps < 0:
        raise UserError(f"anchor_steps {steps}: should be at least 1, or 0 for none")
    if problem := why_not_anchored(given):
        raise UserError(f"anchor_steps: {problem}")
    if isinstance(saved := trainer["save_steps"], int) and saved % steps:
        trainer = {**trainer, "save_steps": -(-saved // steps) * steps}
    return trainer


def _check_names(lora: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Refuse options that PEFT or TRL does not have."""
    from peft import LoraConfig
    from trl import SFTConfig

    for section, given, known in (("lora", lora, LoraConfig), ("trainer", trainer, SFTConfig)):
        check_names(given, option_names(known), section, known.__name__, f"train.{section}")


def _check_lora(lora: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse adapters that could not be recovered."""
    if beyond := sorted(key for key in _BEYOND_LORA if lora.get(key)):
        raise UserError(f"lora: {beyond[0]} cannot be used: what it trains could not be recovered for the full model")
    if lora.get("bias", "none") != "none":
        raise UserError("lora: bias should be none: trained biases could not be recovered for the full model")
    if (initial := lora.get("init_lora_weights", True)) not in INITIALISATIONS:
        raise UserError(
            f"lora: init_lora_weights {initial!r} changes the model's own weights, which the full model has not; "
            f"take one of {', '.join(map(str, INITIALISATIONS))}"
        )
    targets = lora["target_modules"]
    if not isinstance(targets, Sequence) or isinstance(targets, str) or not targets:
        raise UserError(f"lora: target_modules should be a list of module names, but is {targets!r}")
    if unknown := sorted(set(targets) - set(known)):
        raise UserError(f"lora: target_modules has {unknown[0]!r}; known are {', '.join(known)}")


def build_configs(chosen: TrainOptions, device: torch.device, output_dir: Path | None = None) -> tuple[Any, Any]:
    """PEFT's LoraConfig and TRL's SFTConfig of options that `check_options` gave; no weight is read for them.

    What is best depends on the device: on a GPU activations are checkpointed, and with 4-bit weights, which are for
    where memory is short, checkpoints wait in host memory and AdamW keeps its state in pageable 8 bits.

    Raises:
        UserError: what PEFT or TRL say of the first bad value.
    """
    from peft import LoraConfig
    from trl import SFTConfig

    on_gpu = device.type == "cuda"
    frugal = {"activation_offloading": True, "optim": "paged_adamw_8bit"} if on_gpu and chosen.load_in_4bit else {}
    options = {
        **frugal,
        "bf16": on_gpu and compute_dtype(device) == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": on_gpu,
        **chosen.trainer,
        **checkpointing(chosen.trainer, default=on_gpu, known=option_names(SFTConfig)),
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,  # it would drop the lengths of the rows that packing put together
        "output_dir": str(output_dir or "unused"),
    }
    if options.get("use_liger_kernel") and not on_gpu:
        raise UserError("trainer: use_liger_kernel needs a GPU")
    if options.get("activation_offloading") and not on_gpu:
        raise UserError("trainer: activation_offloading moves activations from a GPU to host memory; there is no GPU")
    if str(options.get("optim", "")).endswith("8bit") and not on_gpu and "paged" in options["optim"]:
        raise UserError(f"trainer: optim {options['optim']!r} pages a GPU's memory; without one take adamw_8bit")
    try:
        return LoraConfig(**_from_data(chosen.lora)), SFTConfig(**options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise as_user_error(error) from error


def _from_data(lora: Mapping[str, Any]) -> dict[str, Any]:
    """LoraConfig's options, with EVA's own where it is asked for: PEFT warns where they are left to it."""
    from peft import EvaConfig

    eva = lora.get("init_lora_weights") == "eva" and "eva_config" not in lora
    return {**lora, **({"eva_config": EvaConfig()} if eva else {})}
