"""Options that go on to a library's own class of options, under their names there. It imports nothing heavy."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import PositiveInt, ValidationError

from loram.base import processes
from loram.base.errors import UserError
from loram.base.names import in_recipe
from loram.base.options import Options, explain, library_defaults, option, suggestion

# Further names of transformers' and TRL's options, which are recognised where they stand on another level of a recipe.
TRAINER_NAMES = (
    "max_grad_norm weight_decay adam_beta1 adam_beta2 adam_epsilon activation_checkpointing bf16 fp16 run_name "
    "neftune_noise_alpha"
)


_NO_ROWS = "no rows are evaluated while a model trains; evaluate the result with `loram eval`, or in a recipe"
_NO_UPLOAD = "a finished folder is uploaded as a whole: loram push OUT REPO"
_CHECKPOINTS = "loram writes, checks and resumes checkpoints itself"
_PROCESSES = "several GPUs train by `accelerate launch`"
# What cannot work in any training here, or does nothing, unless it is off; and what to do.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps"),
                *("eval_do_concat_batches", "eval_use_gather_object", "eval_packing", "per_device_eval_batch_size"),
                *("do_eval", "do_predict", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
                *("bf16_full_eval", "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model"),
                *("greater_is_better", "label_names"),
            ),
            _NO_ROWS,
        ),
        **dict.fromkeys(
            (
                *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
                "hub_revision",
            ),
            _NO_UPLOAD,
        ),
        **dict.fromkeys(("resume_from_checkpoint", "save_only_model", "save_on_each_node"), _CHECKPOINTS),
        **dict.fromkeys(("deepspeed", "parallelism_config", "local_rank"), _PROCESSES),
    }
)


class TrainerFlags(Options):
    """The options of transformers' TrainingArguments that have a default, a flag or another tool's name here.

    None stands for the library's own default.
    """

    max_steps: int | None = option(None, "Stop after this many optimiser steps.", common=True)
    num_train_epochs: float = option(
        1, "How often all rows are used, if max_steps is not given.", also="num_epochs epochs", common=True, gt=0
    )
    learning_rate: float = option(1e-4, "The learning rate after warm-up.", also="lr", common=True, gt=0)
    warmup_steps: float | None = option(
        None,
        "Warm-up steps, or a share of all steps if below 1 (default: 0).",
        also="warmup_ratio",
        notes={"warmup_ratio": "; a value below 1 is a share of all steps"},
        ge=0,
    )
    per_device_train_batch_size: PositiveInt = option(
        4,
        "Rows per device and micro-batch.",
        also="micro_batch_size batch_size train_batch_size",
        common=True,
        planned=True,
    )
    gradient_accumulation_steps: PositiveInt | None = option(
        None, "Micro-batches per optimiser step (default: 1).", planned=True
    )
    max_length: PositiveInt = option(
        512,
        "Rows are cut to this many tokens.",
        also="sequence_len cutoff_len max_seq_length max_seq_len model_max_length",
        common=True,
        planned=True,
    )
    report_to: str | list[str] = option("none", "Where the log goes: none, tensorboard, wandb or trackio.")
    lr_scheduler_type: str = option("cosine", "How the learning rate changes.", flag="", also="lr_scheduler")
    logging_steps: int | float = option(10, "The number of steps from one log line to the next.", flag="", gt=0)
    save_strategy: str = option("steps", "When checkpoints are written.", flag="")
    save_steps: int | float = option(50, "The number of steps from one checkpoint to the next.", flag="", gt=0)
    save_total_limit: int | None = option(1, "The number of checkpoints to keep.", flag="")
    optim: str | None = option(
        None,
        "The optimiser, by its name in transformers (default: adamw_torch_fused; on a GPU with 4 bits "
        "paged_adamw_8bit).",
        flag="",
        also="optimizer",
        planned=True,
    )
    gradient_checkpointing: bool | None = option(
        None,
        "Keep only each layer's input for the backward pass (default: on a GPU).",
        flag="",
        also="use_gradient_checkpointing",
        planned=True,
    )


def defaults_of(named: type[Options]) -> dict[str, Any]:
    """Return the options of a library that have a default here: name -> default."""
    return {name: field.default for name, field in named.model_fields.items() if field.default is not None}


def check_names(names: Iterable[str], known: Sequence[str], section: str, library: str, stage: type[Options]) -> None:
    """Refuse options that a library does not have.

    Args:
        names: the names to check.
        known: the names that the library knows.
        section: the section of the stage that the options stand in: `lora` or `trainer`.
        library: what the message calls the class that would take them.
        stage: the options of the stage.

    Raises:
        UserError: names the first unknown option, and what it is called here or what is nearest.
    """
    for key in names:
        if key not in known:
            hint = suggestion(key, known)
            hint = f"; {hint}" if hint.startswith("did") else ""
            if ours := in_recipe(key, f"{stage.stage}.{section}", known, root=stage, at=stage.stage):
                hint = f"; here it is called {ours}"
            raise UserError(f"{section}: {library} of this version has no option {key!r}{hint}")


def check_values(values: Mapping[str, Any], named: type[Options], section: str) -> None:
    """Refuse values of a library's options that are not of the type, or within the bounds, of their declaration here.

    Args:
        values: the options of the section, those without a declaration too.
        named: the class of those that have one.
        section: the section that they stand in: `lora` or `trainer`.

    Raises:
        UserError: names the first such option.
    """
    try:
        named.model_validate({name: values[name] for name in named.model_fields if name in values})
    except ValidationError as error:
        raise UserError(f"{section}: {explain(error, named)}") from error


def check_trainer(trainer: Mapping[str, Any], named: type[Options], library: Any) -> None:
    """Refuse options of the Trainer that cannot work in any training here, that train nothing, or of a wrong type.

    Args:
        trainer: the options.
        named: the class of those that have a declaration here.
        library: the class that will take them all.

    Raises:
        UserError: names the first such option, and what to do instead.
    """
    _check_steps(trainer)
    check_values(trainer, named, "trainer")
    defaults = library_defaults(library)
    for key, value in trainer.items():
        default = defaults.get(key)
        if key in _REFUSED and value != default and (value or default):
            raise UserError(f"trainer: {key} cannot be set: {_REFUSED[key]}")
        if isinstance(value, int | float) and value < 0 and value != default:
            raise UserError(f"trainer: {key} is {value}, and should not be below 0")
    if trainer.get("save_strategy") == "best":
        raise UserError(f"trainer: save_strategy cannot be best: {_NO_ROWS}")


def _check_steps(trainer: Mapping[str, Any]) -> None:
    """Refuse options with which a training takes no step.

    Raises:
        UserError: names the option.
    """
    steps, epochs = trainer.get("max_steps"), trainer["num_train_epochs"]
    if isinstance(steps, int | float) and steps != -1:  # -1 is transformers' way to say that epochs count
        if steps < 1:
            raise UserError(f"trainer: max_steps {steps} trains nothing; it should be at least 1, or be left out")
    elif isinstance(epochs, int | float) and epochs <= 0:
        raise UserError(f"trainer: num_train_epochs {epochs} trains nothing; it should be above 0")


def check_batches(rows: int, arguments: Any) -> None:
    """Refuse rows that are all dropped, because they are fewer than one batch.

    Args:
        rows: the number of rows, after they are packed.
        arguments: the Trainer's arguments.

    Raises:
        UserError: says how many rows a batch has.
    """
    batch = arguments.train_batch_size * processes.count()
    if arguments.dataloader_drop_last and rows < batch:
        each = f" in {processes.count()} processes" if processes.count() > 1 else ""
        raise UserError(
            f"trainer: dataloader_drop_last drops all {rows} rows, since a batch has {batch}{each}; give more rows, "
            "a smaller per_device_train_batch_size, or leave dataloader_drop_last out"
        )


def as_user_error(error: Exception, stage: str = "train") -> UserError:
    """Return a library's message about a bad value as one line."""
    return UserError(f"{stage}: {str(error).splitlines()[0]}")


def checkpointing(trainer: Mapping[str, Any], *, default: bool, known: Sequence[str]) -> dict[str, bool | None]:
    """Return activation checkpointing under this version's name for it; newer versions deprecate the older name."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    value = trainer.get(new, trainer.get(old, default))
    return {new: value, old: None} if new in known else {old: value}


def checkpoints_activations(arguments: Any) -> bool:
    """Return whether a Trainer's arguments ask for activation checkpointing, by the name this version has for it."""
    return bool(getattr(arguments, "activation_checkpointing", arguments.gradient_checkpointing))


def option_names(config: Any) -> list[str]:
    """Return the names that a dataclass of options takes."""
    return [field.name for field in dataclasses.fields(config) if field.init]


def duration(trainer: Mapping[str, Any]) -> str:
    """Return in words how long a training with these options goes on, and how: for a model card.

    Example: `40 steps, batch size 16, learning rate 0.001 (cosine), rows of up to 512 tokens, seed 42`.
    """
    steps = trainer.get("max_steps") or -1
    length = f"{steps:,} step{'s' if steps > 1 else ''}" if steps > 0 else f"{trainer['num_train_epochs']:g} epochs"
    size = trainer["per_device_train_batch_size"] * (trainer.get("gradient_accumulation_steps") or 1)
    return (
        f"{length}, batch size {size}, learning rate {trainer['learning_rate']:g} ({trainer['lr_scheduler_type']}), "
        f"rows of up to {trainer['max_length']:,} tokens, seed {trainer['seed']}"
    )
