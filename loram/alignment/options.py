"""The options of alignment, their defaults, and the values that are refused because they would mislead."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, PositiveInt, field_validator, model_validator

from loram.base.errors import UserError
from loram.base.options import Options, option, passed_on
from loram.data.spec import CacheSpec, WeightedSpec, several, why_not_weighted
from loram.trainer.arguments import (
    TRAINER_NAMES,
    TrainerFlags,
    check_names,
    check_trainer,
    defaults_of,
    option_names,
)

# Options that loram decides itself, or that would be ignored in silence.
_OURS = {"output_dir", "eval_steps", "label_smoothing_factor", "logging_nan_inf_filter", "remove_unused_columns"}

RATE, ADAPTER_RATE = 1e-4, 1e-3  # the default learning rates of weights, and of an adapter in their place


class AlignTrainerFlags(TrainerFlags):
    """The options of transformers' TrainingArguments that have a default, a flag or another tool's name here."""

    learning_rate: float | None = option(  # type: ignore[assignment]
        None,
        f"The learning rate after warm-up (default: {RATE}, and {ADAPTER_RATE} with lora_r).",
        also="lr",
        common=True,
        gt=0,
    )
    warmup_steps: float = option(
        0.05,
        "Warm-up steps, or a share of all steps if below 1.",
        also="warmup_ratio",
        notes={"warmup_ratio": "; a value below 1 is a share of all steps"},
        ge=0,
    )


class AlignOptions(Options):
    """How to align a pruned model with the full one; see `loram.alignment.align.align`."""

    stage: ClassVar[str] = "align"

    dataset: tuple[WeightedSpec, ...] = option(
        (),
        "The data sets to align on, each with an optional weight (default: text that the full model writes).",
        validation_alias=AliasChoices("dataset", "data"),
        common=True,
    )
    teacher: tuple[CacheSpec, ...] = option(
        (), "Folders that teach wrote, in place of data sets (default: the full model is loaded).", common=True
    )
    objective: Literal["distill", "clm", "mix"] = option(
        "distill", "What is learnt: the full model's predictions, the text itself, or both."
    )
    clm_weight: float | None = option(
        None, "The share of the text's own loss with the objective mix (default: 0.5).", gt=0, lt=1
    )
    lora_r: PositiveInt | None = option(
        None, "Train a LoRA of this rank in place of the weights, and add it to them at the end.", common=True
    )
    lora_alpha: PositiveInt | None = option(None, "The scale of that LoRA is alpha / r (default: twice lora_r).")
    load_in_4bit: bool = option(False, "Hold the pruned model in 4 bits (NF4) while a LoRA trains.")
    train_embeddings: bool = option(False, "Train the embedding and lm_head too.")
    probe: bool = option(True, "Keep the weights whose probe, recovered on the full model, is best.")
    probe_dataset: WeightedSpec | None = option(
        None,
        "The rows of the probe (default: some rows of the data are held out for it).",
        validation_alias=AliasChoices("probe_dataset", "probe_data"),
    )
    probe_steps: PositiveInt = option(16, "The steps of the probe's LoRA training.")
    eval_steps: PositiveInt = option(50, "The alignment steps from one probe to the next.")
    patience: PositiveInt = option(3, "Stop after this many probes without a new best one.")
    stream: bool = option(False, "Read the full model from disk layer by layer in probes, even if it fits in memory.")
    trainer: dict[str, Any] = passed_on(
        AlignTrainerFlags,
        "transformers' TrainingArguments",
        "Any option of transformers' TrainingArguments, such as weight_decay=0.1.",
        others=TRAINER_NAMES,
    )

    @field_validator("dataset", "teacher", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return several(value)

    @model_validator(mode="after")
    def _go_together(self) -> "AlignOptions":
        if self.teacher and self.dataset:
            raise ValueError("teacher and dataset: the rows come from the teacher's folder; drop one of them")
        if self.teacher and self.objective == "clm":
            raise ValueError("teacher: clm learns from the text alone and asks no teacher; drop one of them")
        if self.clm_weight is not None and self.objective != "mix":
            raise ValueError(f"clm_weight: is of the objective mix, and this is {self.objective}; drop one of them")
        if self.probe_dataset is not None and not self.probe:
            raise ValueError("probe_dataset: given, but there is to be no probe; drop one of them")
        if "max_length" in self.trainer and self.teacher and self.probe_dataset is None:
            raise ValueError("trainer: max_length is that of the teacher's rows; leave it out")
        if self.lora_r is None and (self.load_in_4bit or self.lora_alpha is not None):
            name = "load_in_4bit" if self.load_in_4bit else "lora_alpha"
            raise ValueError(f"{name}: is for a LoRA in place of the weights; give lora_r too, or drop it")
        if self.lora_r is not None and self.train_embeddings:
            raise ValueError("train_embeddings: a LoRA trains linears only; drop it, or lora_r")
        for name in ("dataset", "teacher"):
            if problem := why_not_weighted(getattr(self, name)):
                raise ValueError(f"{name}: {problem}")
        return self

    @property
    def text_share(self) -> float:
        """The share of the text's cross entropy in the loss; the teacher has the rest."""
        shares = {"distill": 0.0, "clm": 1.0, "mix": 0.5 if self.clm_weight is None else self.clm_weight}
        return shares[self.objective]

    @property
    def live(self) -> bool:
        """Return whether the full model predicts while the student learns."""
        return not self.teacher and self.objective != "clm"

    @property
    def sampled(self) -> bool:
        """Return whether the full model writes all of the text."""
        return not self.teacher and not self.dataset


class TeachOptions(Options):
    """How to cache what the full model predicts; see `loram.alignment.teach.teach`."""

    stage: ClassVar[str] = "teach"

    top_k: int = option(  # from 1 to the size of the vocabulary, which only the stage knows
        64, "The number of likeliest next tokens to store for each position.", common=True
    )
    max_length: PositiveInt = option(
        512, "Rows are cut to this many tokens, and long texts into pieces of this length."
    )
    part_tokens: int = option(
        1 << 18, "Tokens per pass over the model; a stopped run goes on after the last finished pass."
    )

    @model_validator(mode="after")
    def _parts_hold_something(self) -> "TeachOptions":
        if self.part_tokens < 1:
            raise ValueError(f"part_tokens {self.part_tokens}: must be at least 1")
        return self


def resolve_trainer(trainer: Mapping[str, Any], seed: int = 42, *, adapter: bool = False) -> dict[str, Any]:
    """Fill in our defaults of the Trainer's options, and refuse options that would mislead.

    Args:
        trainer: the options that were given.
        seed: the seed of everything that is drawn.
        adapter: whether a LoRA trains in place of the weights.

    Raises:
        UserError: transformers has no such option (names the nearest), or it is not for the user to set.
    """
    from transformers import TrainingArguments

    if ours := [key for key in trainer if key in _OURS]:
        raise UserError(f"trainer: {ours[0]} cannot be set: loram writes the output and judges the weights itself")
    known = ["max_length", *option_names(TrainingArguments)]
    check_names(trainer, known, "trainer", "TrainingArguments", AlignOptions)
    rate = ADAPTER_RATE if adapter else RATE
    options = {**defaults_of(AlignTrainerFlags), "learning_rate": rate, "seed": seed, **trainer}
    check_trainer(options, AlignTrainerFlags, TrainingArguments)
    if not isinstance(options["max_length"], int) or options["max_length"] < 2:
        raise UserError(f"trainer: max_length should be a number of tokens, but is {options['max_length']!r}")
    return options
