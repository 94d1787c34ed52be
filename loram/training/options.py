"""The options of training, their defaults, and the values that are refused because they would mislead."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt, create_model, field_validator

from loram.base.errors import UserError
from loram.base.options import Options, option, passed_on
from loram.base.size import parse_size
from loram.disk.lora_keys import ALL_LINEAR, INITIALISATIONS, TRAINED, is_all_linear, refused_key
from loram.model.architecture import Architecture
from loram.model.families import KNOWN_TARGETS, LINEARS
from loram.trainer.arguments import (
    TRAINER_NAMES,
    TrainerFlags,
    check_names,
    check_trainer,
    check_values,
    defaults_of,
    option_names,
)
from loram.training.engine import STREAMED, check_engine
from loram.training.experts import check_expert_targets, check_linear_targets, expert_targets
from loram.training.methods.table import METHODS, check_method, method_of, methods_with

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
    "truncation_mode",
    "trust_remote_code",
    "dataset_num_proc",
    "pad_token",
}
_ELSEWHERE = {
    "chat_template_path": "it is a key of the recipe, beside `train`; on the command line it is --chat-template"
}
_OTHER_LOSSES = ("loss_type", "label_smoothing_factor")


class LoraFlags(Options):
    """The options of PEFT's LoraConfig that have a default or a flag here; the defaults are the paper's (arXiv
    2502.13533, section 4)."""

    r: PositiveInt = option(
        8,
        "The rank of the adapter.",
        flag="lora-r",
        also="lora_r lora_rank lora_dim rank",
        common=True,
        planned=True,
    )
    lora_alpha: int | float = option(16, "The update is scaled by alpha / r.", also="alpha", common=True, gt=0)
    lora_dropout: float = option(
        0.05,
        "The dropout before lora_A (default: 0.05; with dora, lora-fa, dpo, orpo, kto, target_parameters and engine "
        "streamed 0).",
        also="dropout",
        planned=True,
        ge=0,
        lt=1,
    )
    target_modules: list[str] | str | None = option(
        None,
        "The linears that get an adapter; all-linear is all of a decoder layer (default: these, but in mixtures of "
        "experts those of attention; lm_head if named).",
        flag="lora-target-modules",
        also="lora_target_modules lora_target lora_target_linear",
        notes={"lora_target_linear": ": all-linear"},
        planned=True,
    )
    target_parameters: list[str] | str | None = option(
        None,
        "The tensors of experts that also get an adapter: mlp.experts.down_proj, ...; experts is all (default: none).",
        flag="lora-target-parameters",
        also="lora_target_parameters",
    )


class SftFlags(TrainerFlags):
    """The options of TRL's SFTConfig that have a default, a flag or another tool's name here."""

    learning_rate: float = option(2e-4, "The learning rate after warm-up.", also="lr", common=True, gt=0)
    save_total_limit: int | None = option(2, "The number of checkpoints to keep.", flag="")
    router_aux_loss_coef: float = option(
        0.0,
        "In mixtures of experts: add this many times the loss by which routers learn to use all experts alike.",
        ge=0,
    )
    packing: bool | None = option(None, "Put short rows together into one.", flag="", also="sample_packing")
    activation_offloading: bool | None = option(
        None,
        "Keep the activations for the backward pass in host memory (default: on a GPU with 4 bits).",
        flag="",
        planned=True,
    )


class StreamOptions(Options):
    """The options of what is streamed in training."""

    ram_budget: str | None = option(
        None,
        "Keep as much of the streamed model in RAM as fits into this, so that it is read once: 12GiB, 24GB "
        "(default: nothing).",
        planned=True,
    )

    @property
    def ram_bytes(self) -> int:
        """Return how many bytes of the streamed model may stay in RAM."""
        return 0 if self.ram_budget is None else parse_size(self.ram_budget, "ram_budget")

    @field_validator("ram_budget")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value, "ram_budget")
        return value


class PolishOptions(StreamOptions):
    """How to train a recovered adapter further on the streamed full model; see `loram.training.polish.polish`."""

    stage: ClassVar[str] = "polish"

    max_steps: PositiveInt = option(8, "Optimiser steps, each of which reads the full model twice.", common=True)
    per_device_train_batch_size: PositiveInt = option(16, "Rows per device and step.", common=True)
    learning_rate: PositiveFloat = option(
        5e-4, "The learning rate of the first step; it falls to 0 along a cosine.", common=True
    )
    max_length: PositiveInt = option(512, "Rows are cut to this many tokens.")
    max_grad_norm: PositiveFloat = option(1.0, "Gradients are clipped to this norm.", flag="")


class _TrainOptions(StreamOptions):
    """How to train an adapter, or weights themselves; see `loram.training.train.train`."""

    stage: ClassVar[str] = "train"

    engine: Literal["resident", "streamed"] = option(
        "resident",
        "How the model goes forward and backward: resident, in memory; or streamed, layer by layer from its files, "
        "which reads them twice per optimiser step.",
        hint="known are resident, streamed",
        common=True,
        planned=True,
    )

    method: str = option(
        "lora",
        f"What trains: {', '.join(METHODS)}.",
        also="finetuning_type adapter peft_method peft_type use_dora peft_use_dora peft_use_rslora",
        notes={"use_dora": ": dora", "peft_use_dora": ": dora", "peft_use_rslora": ": rslora"},
        common=True,
        planned=True,
    )
    load_in_4bit: bool = option(
        False,
        "Hold all frozen weights, lm_head and embedding too, in NF4 with double quantisation (QLoRAM).",
        also="quantization_bit",
        notes={"quantization_bit": ": true for 4 bits"},
        common=True,
        planned=True,
    )
    offload_embedding: bool = option(False, "With 4 bits: leave the embedding in 16 bits in host memory.", planned=True)
    mask_update: bool = option(
        False, "On a sparse model: no update where the model has no weight; the adapter is then merged, not recovered."
    )
    lora_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "The dtype of the adapter, its gradients and its optimiser's state.",
        hint="known are float32, bfloat16",
        planned=True,
    )
    anchor_steps: int = option(
        0, "Measure the full model every N steps and stay on its course; 0 is never.", planned=True, ge=0
    )
    anchor_gradients: bool = option(
        True, "With anchors: measure gradients too, which takes longer and keeps more.", planned=True
    )
    lora: dict[str, Any] = passed_on(
        LoraFlags,
        "PEFT's LoraConfig",
        "Any option of PEFT's LoraConfig, such as use_rslora=true.",
        others="use_rslora rank_pattern alpha_pattern init_lora_weights",
    )
    trainer: dict[str, Any] = passed_on(
        SftFlags, "TRL's SFTConfig", "Any option of TRL's SFTConfig, such as packing=true.", others=TRAINER_NAMES
    )


if TYPE_CHECKING:
    TrainOptions = _TrainOptions
else:  # with a section for each method that has options of its own
    TrainOptions = create_model(
        "TrainOptions",
        __base__=_TrainOptions,
        __module__=__name__,
        __doc__=_TrainOptions.__doc__,
        **{
            method.section: (method.options | None, option(None, f"The options of {methods_with(method.section)}."))
            for method in METHODS.values()
            if method.section is not None
        },
    )


def lora_defaults(architecture: Architecture | None = None) -> dict[str, Any]:
    """Return the options of LoraConfig that have a default here: name -> default.

    Args:
        architecture: the family whose linears are the default targets; None for those that most families have.
    """
    return {
        **defaults_of(LoraFlags),
        "target_modules": list(LINEARS if architecture is None else architecture.default_targets),
    }


def resolve(options: TrainOptions, architecture: Architecture | None = None) -> TrainOptions:
    """Fill in every default, and refuse options that would mislead.

    Args:
        options: the options.
        architecture: the family of the model, whose linears are the default targets; None where no model is known yet.

    Raises:
        UserError: the method is unknown, PEFT or TRL has no such option (names the nearest), or two options do not go
            together.
    """
    method = method_of(options.method)
    if options.offload_embedding and not options.load_in_4bit:
        raise UserError("offload_embedding: is for models in 4 bits; add load_in_4bit, or leave it out")
    if options.offload_embedding and options.engine == STREAMED:
        raise UserError("offload_embedding: with engine streamed it has no use; leave it out")
    if options.ram_budget is not None and options.engine != STREAMED and not options.anchor_steps:
        raise UserError("ram_budget: is for what is streamed; add engine streamed or anchor_steps, or leave it out")
    without = options.mask_update or options.lora.get("target_parameters") or options.engine == STREAMED
    undropped = {"lora_dropout": 0.0} if without else {}
    lora = {**lora_defaults(architecture), **method.defaults, **undropped, "task_type": "CAUSAL_LM", **options.lora}
    if is_all_linear(lora["target_modules"]):
        lora["target_modules"] = list(LINEARS if architecture is None else architecture.adapter_targets)
    if given := lora.get("target_parameters"):
        lora["target_parameters"] = expert_targets(given, architecture)
    trainer = {**defaults_of(SftFlags), **method.trainer, **options.trainer}
    if options.mask_update and lora["lora_dropout"]:
        raise UserError(
            "mask_update: needs lora_dropout 0: what is masked is the update itself, which no dropout comes before"
        )
    _check_names(lora, trainer)
    _check_lora(lora, KNOWN_TARGETS if architecture is None else (*architecture.adapter_targets, architecture.head))
    check_method(options, lora)
    if lora.get("target_parameters"):
        check_expert_targets(options, lora)
    if architecture is not None:
        check_linear_targets(lora["target_modules"], architecture)
    lora |= method.lora
    _check_trainer(trainer)
    check_engine(options, lora, trainer)
    if options.anchor_steps and (problem := why_not_anchored(options)):
        raise UserError(f"anchor_steps: {problem}")
    if architecture is not None:
        _check_together(trainer, architecture)
    own = {} if method.section is None else {method.section: method.own_options(options)}
    return options.model_copy(update={"lora": lora, "trainer": trainer, **own})


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse options of the Trainer that would be ignored, or that would change the loss."""
    if ours := sorted(_OURS & trainer.keys()):
        why = _ELSEWHERE.get(ours[0], "loram writes the output and prepares the rows itself")
        raise UserError(f"trainer: {ours[0]} cannot be set: {why}")
    if other := [key for key in _OTHER_LOSSES if trainer.get(key) not in (None, 0, "nll")]:
        raise UserError(
            f"trainer: {other[0]} cannot be set: the loss is cross entropy, worked out a chunk at a time; methods dpo "
            "and kto have preference.loss_type"
        )
    from trl import SFTConfig

    check_trainer(trainer, SftFlags, SFTConfig)
    if trainer.get("pad_to_multiple_of") == 0:
        raise UserError("trainer: pad_to_multiple_of should be at least 1; leave it out")


def _check_together(trainer: Mapping[str, Any], architecture: Architecture) -> None:
    """Refuse what a family cannot do.

    That is a loss of routers that it does not have, and rows of text that are put together into one where layers would
    carry one row's text into the next.
    """
    experts = architecture.experts
    if trainer["router_aux_loss_coef"] and not (experts is not None and experts.balanced_by_loss):
        why = "has no experts" if experts is None else "steers its router by a bias, and not by a loss"
        raise UserError(f"trainer: router_aux_loss_coef: {architecture.model_type} {why}; leave it out")
    for key in ("packing", "padding_free"):
        if architecture.recurrent and trainer.get(key):
            raise UserError(
                f"trainer: {key} puts rows together, and some layers of {architecture.model_type} would carry one "
                "row's text into the next; leave it out"
            )


def why_not_sharded(options: TrainOptions) -> str | None:
    """Return what keeps the weights of a training from being sharded over processes, if anything does."""
    if not method_of(options.method).sharded:
        names = ", ".join(row.name for row in METHODS.values() if row.sharded)
        return f"does not go with method {options.method}; take one of {names}"
    if options.load_in_4bit:
        return "leaves weights in 4 bits whole in each process; drop load_in_4bit"
    if options.engine == STREAMED:
        return "shards a model in memory, and engine streamed has none there; drop one"
    if options.anchor_steps:
        return "shards the blocks that anchors are measured at; drop anchor_steps"
    if options.mask_update:
        return "shards the weights that a masked update reads; drop mask_update"
    return None


def why_not_anchored(options: TrainOptions) -> str | None:
    """Return what keeps a training of a pruned model from staying on the full model's course, if anything does."""
    if method_of(options.method).learns != "text":
        return f"measures gradients of the cross entropy, and method {options.method} has another loss; drop one"
    if not method_of(options.method).anchored:
        return f"measures with the adapter recovered, which method {options.method} cannot be meanwhile"
    if options.engine == STREAMED:
        return "adds to the blocks of a model in memory, and engine streamed has none there; drop one"
    if options.mask_update:
        return "measures with the adapter recovered, which a masked update cannot be; drop mask_update"
    if options.lora.get("target_parameters"):
        return "measures with the adapter recovered, which one on experts cannot be meanwhile; drop target_parameters"
    for key in ("packing", "padding_free"):
        if options.trainer.get(key):
            return f"measures each row by itself, and {key} puts rows together; drop one"
    return None


def _check_names(lora: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Refuse options that PEFT or TRL does not have."""
    from peft import LoraConfig
    from trl import SFTConfig

    for section, names, known in (("lora", lora, LoraConfig), ("trainer", trainer, SFTConfig)):
        check_names(names, option_names(known), section, known.__name__, TrainOptions)


def _check_lora(lora: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse adapters that could not be recovered, and keys of PEFT that nobody has looked at."""
    check_values(lora, LoraFlags, "lora")
    if (key := refused_key({**lora, "task_type": None}, TRAINED)) is not None:
        raise UserError(
            f"lora: {key} cannot be used: with it nothing would train, or what trains could not be recovered or "
            "merged; leave it out"
        )
    if lora["task_type"] != "CAUSAL_LM":
        raise UserError(f"lora: task_type should be CAUSAL_LM, but is {lora['task_type']!r}; leave it out")
    initial = lora.get("init_lora_weights", True)
    if initial not in INITIALISATIONS:
        raise UserError(
            f"lora: init_lora_weights {initial!r} changes the model's own weights, which the full model has not; "
            f"take one of {', '.join(map(str, INITIALISATIONS))}"
        )
    if lora.get("eva_config") is not None and initial != "eva":
        raise UserError("lora: eva_config is for init_lora_weights eva; add that, or leave it out")
    targets = lora["target_modules"]
    if not isinstance(targets, Sequence) or isinstance(targets, str) or not (targets or lora.get("target_parameters")):
        raise UserError(
            f"lora: target_modules should be {ALL_LINEAR} or a list of module names, but is {targets!r}; "
            f"known are {', '.join(known)}"
        )
    if unknown := sorted(set(targets) - set(known)):
        raise UserError(f"lora: target_modules has {unknown[0]!r}; known are {ALL_LINEAR}, {', '.join(known)}")
