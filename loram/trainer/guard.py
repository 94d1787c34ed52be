"""The part that stands in front of every Trainer: it stops a training that goes wrong, and saves one that goes well."""

import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from loram.base import processes
from loram.base.progress import without_library_bars
from loram.base.stopping import Stop, stop_by
from loram.trainer.checkpoints import Checkpoints
from loram.trainer.sharding import check_sharded, own_shard, sharding, trained_state, whole

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
Trained = Callable[[], Mapping[str, nn.Parameter]]

CHECKPOINT_SECONDS = 300  # beside every `save_steps`, a checkpoint is written when the last one is older than this
_ADVICE = "try a lower learning_rate, or look at the rows of this step"


class MissingGradientError(RuntimeError):
    """A parameter that should train got no gradient, so it would stay as it is. The message names it."""


class _Guard(TrainerCallback):
    """Refuses weights that are not finite, says when to save, and hands each saved checkpoint to `Checkpoints`."""

    def __init__(self, checkpoints: Checkpoints, stop: Stop, trained: Trained) -> None:
        self.checkpoints, self.stop, self.trained = checkpoints, stop, trained
        self.saved_at = time.monotonic()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **rest: Any,
    ) -> None:
        assert model is not None
        check_sharded(model, sharding(vars(args)))
        state.compute_steps(args, state.max_steps)  # a checkpoint has the save_steps and logging_steps of its time
        self.saved_at = time.monotonic()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.stop.stepping = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        values = {name: parameter.detach() for name, parameter in self.trained().items()}
        _check_finite(values, "value", state.global_step)
        control.should_log |= state.global_step >= state.max_steps
        if args.save_strategy != SaveStrategy.NO:
            control.should_save |= self._should_save()

    def _should_save(self) -> bool:
        """Return whether a signal or the clock asks for a checkpoint; all processes agree on it."""
        late = time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
        wishes = processes.gather((self.stop.signal, late))
        self.stop.signal = next((number for number, _ in wishes if number is not None), None)
        return self.stop.signal is not None or wishes[0][1]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.checkpoints.adopt(state.global_step)
        self.saved_at = time.monotonic()
        if self.stop.signal is not None:
            stop_by(self.stop.signal)


class _GuardedTrainer(Trainer):
    """The part that `guard_trainer` puts in front of a Trainer class."""

    checkpoints: Checkpoints
    stop: Stop

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_callback(_Guard(self.checkpoints, self.stop, self._trained_now))

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> torch.Tensor:
        loss, step = super().training_step(model, *args, **options), self.state.global_step + 1
        if not loss.isfinite():
            raise FloatingPointError(f"step {step}: the loss is {loss.item()}; {_find_culprit(model)}")
        if self.accelerator.sync_gradients:
            gradients = check_gradients(self._trained_now(), step)
            # The check is here because clipping by a norm that is not finite makes all gradients useless. With fp16
            # such gradients are normal: the loss scaler then skips the step and lowers its scale.
            if not self.args.fp16:
                _check_finite(gradients, "gradient", step)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a sharded model whole, whatever the form of its checkpoints; the first process writes."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        assert self.model is not None
        state = trained_state(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    @functools.cached_property
    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters by name, listed once: a walk through a deep model takes tens of milliseconds."""
        model: Any = self.model  # Any: transformers declares that it may be None
        return list(model.named_parameters())

    def _trained_now(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train in this step; some methods change which ones these are."""
        return {name: parameter for name, parameter in self._parameters if parameter.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the weights alone: no tokenizer, no pickled arguments, and for an adapter no lm_head of the base."""
        model: Any = self.model  # Any: a PreTrainedModel or PeftModel, which both have save_pretrained
        options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        with without_library_bars():
            model.save_pretrained(output_dir, state_dict=state_dict, **options)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save with each process's random state also the sum of its losses since the last log.

        The Trainer logs the mean of the losses since the last log. So the log is the same wherever the training stops.
        """
        super()._save_rng_state(output_dir)
        losses = {"sum": self._tr_loss.item(), "logged": self._globalstep_last_logged}
        _losses_file(output_dir).write_text(json.dumps(losses), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        assert checkpoint is not None
        path = _losses_file(checkpoint)
        if not path.is_file():  # a checkpoint of version 0.1, which logged at each save
            return
        losses = json.loads(path.read_text(encoding="utf-8"))
        self._tr_loss.fill_(losses["sum"])
        self._globalstep_last_logged = losses["logged"]


def _losses_file(checkpoint: str) -> Path:
    return Path(checkpoint) / f"losses_{processes.number()}.json"


def guard_trainer(trainer_class: type[AnyTrainer], checkpoints: Checkpoints, stop: Stop) -> type[AnyTrainer]:
    """Derive a Trainer class that stops if a training goes wrong, and that saves by `checkpoints`.

    The derived class raises FloatingPointError if a loss, gradient or weight is not finite, with the step and the name
    of the tensor, and MissingGradientError if a parameter that should train gets no gradient. It saves when the
    arguments say so, when the last checkpoint is older than `CHECKPOINT_SECONDS`, and before it stops by `stop`.
    """
    return type("GuardedTrainer", (_GuardedTrainer, trainer_class), {"checkpoints": checkpoints, "stop": stop})


def check_gradients(trained: Mapping[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """Return the gradients of the parameters that train in a step, after the backward pass.

    Args:
        trained: the parameters by name. What a method does not train in this step is not among them.
        step: the number of the step, counted from 1.

    Raises:
        MissingGradientError: a parameter has no gradient, or in the first step every gradient is zero. Single gradients
            may be zero: that of lora_A is, as long as lora_B is.
    """
    gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    if missing := [name for name in trained if name not in gradients]:
        others = f", and so did {len(missing) - 1} others" if len(missing) > 1 else ""
        raise MissingGradientError(
            f"step {step}: {_plain_name(missing[0])} should train but got no gradient{others}: the loss does not "
            "depend on it, or something on the way from the loss has no backward pass"
        )
    if step == 1 and gradients and not any(whole(gradient.any()) for gradient in gradients.values()):
        raise MissingGradientError(
            "step 1: the gradient of every parameter is zero, so nothing would train; look at the options that scale "
            "the adapter, and at the rows"
        )
    return gradients


def _check_finite(tensors: Mapping[str, torch.Tensor], what: str, step: int) -> None:
    """Raise FloatingPointError if a value is not finite.

    Only the norm of all tensors together is computed, which waits for the device once, unless it is not finite.
    """
    if tensors and not whole(nn.utils.get_total_norm(list(tensors.values()))).isfinite():
        bad = [name for name, tensor in tensors.items() if not whole(tensor.isfinite().all())]
        where = f"of {_plain_name(bad[0])} is not finite" if bad else "norm overflows"
        raise FloatingPointError(f"step {step}: the {what} {where}; {_ADVICE}")


def _find_culprit(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not own_shard(parameter).isfinite().all():
            return f"{_plain_name(name)} has values that are not finite"
    return f"all weights are finite; {_ADVICE}"


def _plain_name(name: str) -> str:
    """Return a parameter's name as it is in files, without the parts that PEFT and data parallelism add."""
    return (
        name.removeprefix("module.")
        .removeprefix("base_model.model.")
        .replace(".default.", ".")
        .replace(".base_layer.", ".")
    )
