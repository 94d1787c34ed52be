"""Trainings that stop at the first value that is not finite, and that continue exactly after an interruption.

transformers writes a checkpoint in place, and it resumes from the checkpoint with the highest number even if that one
is not complete. Here a checkpoint is written to another folder, gets a manifest and is then renamed. A training resumes
only from a checkpoint whose files agree with its manifest.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loram.base import processes
from loram.base.errors import UserError
from loram.base.progress import without_library_bars
from loram.disk.artifacts import difference, discard, put_in_place, verify

logger = logging.getLogger(__name__)

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

# Parts of the keys in a log entry whose values are timings, or count from the last start and not from the first.
_SESSION_KEYS = ("runtime", "per_second", "total_flos", "num_tokens")
_ADVICE = "try a lower learning_rate, or look at the rows of this step"


class Checkpoints:
    """The checkpoints of one training, in a folder beside its output.

    Args:
        folder: the folder of the checkpoints; it need not exist.
        made_from: name of an input -> its fingerprint.
        settings: everything else that influences the result of the training.
        limit: how many checkpoints to keep; None keeps all.
    """

    def __init__(
        self, folder: Path, *, made_from: Mapping[str, str], settings: Mapping[str, Any], limit: int | None
    ) -> None:
        self.folder, self.limit = folder, limit
        self.best: int | None = None  # the step of a checkpoint that is kept beyond the limit
        self.made_from, self.settings = (
            dict(made_from),
            json.loads(json.dumps(settings)),
        )  # in the form that reading them back gives

    @property
    def staging(self) -> Path:
        """Return the folder that the Trainer writes to; nothing in it is ever read."""
        return self.folder / ".partial"

    def path(self, step: int | None) -> Path:
        """Return the folder of the checkpoint of a step, whether or not it exists."""
        return self.folder / f"checkpoint-{step}"

    def _paths(self) -> list[Path]:
        """List the folders of the existing checkpoints, the newest first."""
        return sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole, or None if there is none.

        Raises:
            UserError: the checkpoint belongs to a training with other settings or data; the message has the first
                difference.
        """
        return processes.broadcast(self._newest)

    def _newest(self) -> Path | None:
        for path in self._paths():
            try:
                manifest = verify(path)[str(path)]
            except UserError as error:
                logger.warning("%s is not whole, so it is not used: %s", path.name, error)
                continue
            before = {**manifest.settings, "made_from": manifest.made_from}
            if changed := difference(before, {**self.settings, "made_from": self.made_from}):
                raise UserError(
                    f"{self.folder}: this training was begun with other settings or data ({changed}); "
                    "give --fresh to start over, or choose another output"
                )
            return path
        return None

    def adopt(self, step: int) -> None:
        """Move the checkpoint that the Trainer has just written into place, and delete those beyond the limit."""
        processes.wait()  # until each process has written the state of its random numbers
        if processes.first():
            self._adopt(step)
        processes.wait()

    def _adopt(self, step: int) -> None:
        path = self.path(step)
        if path.exists():  # it is not whole, or else the training would have resumed from it
            discard(path)
        put_in_place(
            self.staging / path.name,
            path,
            kind="checkpoint",
            made_from=self.made_from,
            settings=self.settings,
        )
        if self.limit is not None:
            for path in self._paths()[max(self.limit, 1) :]:
                if path != self.path(self.best):
                    discard(path)

    @contextlib.contextmanager
    def open(self, *, fresh: bool) -> Iterator[None]:
        """Prepare the folder for a training, and clean it up afterwards; `fresh` deletes the checkpoints that exist."""
        if processes.first():
            for path in self.folder.glob("*" if fresh else ".*"):
                shutil.rmtree(path)
        processes.wait()
        try:
            yield
        except BaseException:
            if kept := self._paths():
                logger.warning("stopped; the same command continues from %s", kept[0].name)
            raise
        finally:
            if processes.first():
                shutil.rmtree(self.staging, ignore_errors=True)
                if not self._paths():
                    self.remove()

    def remove(self) -> None:
        """Delete all checkpoints and their folder."""
        if processes.first():
            shutil.rmtree(self.folder, ignore_errors=True)


def reproducible_entries(log: Sequence[Mapping[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """Select the entries of a training's log with one of the keys `kinds` (`loss`), without timings.

    The result is the same whether or not the training was interrupted.
    """
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in _SESSION_KEYS)}
        for entry in log
        if any(kind in entry for kind in kinds)
    ]


class _Guard(TrainerCallback):
    """Refuses weights that are not finite before they are saved, and hands each saved checkpoint to `Checkpoints`."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **rest: Any,
    ) -> None:
        assert model is not None
        trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        _check_finite(trainable, "value", state.global_step)
        # The Trainer logs the mean loss since the last log, and its running sum is in no checkpoint.
        control.should_log |= control.should_save

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        control.should_log |= control.should_save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.checkpoints.adopt(state.global_step)


class _GuardedTrainer(Trainer):
    """The part that `guard_trainer` puts in front of a Trainer class."""

    checkpoints: Checkpoints

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_callback(_Guard(self.checkpoints))

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> torch.Tensor:
        loss, step = super().training_step(model, *args, **options), self.state.global_step + 1
        if not loss.isfinite():
            raise FloatingPointError(f"step {step}: the loss is {loss.item()}; {_find_culprit(model)}")
        # The check is here because clipping by a norm that is not finite makes all gradients useless. With fp16 such
        # gradients are normal: the loss scaler then skips the step and lowers its scale.
        if self.accelerator.sync_gradients and not self.args.fp16:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            _check_finite(gradients, "gradient", step)
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the weights alone: no tokenizer, no pickled arguments, and for an adapter no lm_head of the base."""
        model: Any = self.model  # Any: a PreTrainedModel or PeftModel, which both have save_pretrained
        options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        with without_library_bars():
            model.save_pretrained(output_dir, state_dict=state_dict, **options)


def guard_trainer(trainer_class: type[AnyTrainer], checkpoints: Checkpoints) -> type[AnyTrainer]:
    """Derive a Trainer class that stops if a loss, gradient or weight is not finite, and that saves by `checkpoints`.

    The derived class raises FloatingPointError with the step and the name of the tensor.
    """
    return type("GuardedTrainer", (_GuardedTrainer, trainer_class), {"checkpoints": checkpoints})


def _check_finite(tensors: Mapping[str, torch.Tensor], what: str, step: int) -> None:
    """Raise FloatingPointError if a value is not finite.

    Only the norm of all tensors together is computed, which waits for the device once, unless it is not finite.
    """
    if tensors and not nn.utils.get_total_norm(list(tensors.values())).isfinite():
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        where = f"of {_plain_name(bad[0])} is not finite" if bad else "norm overflows"
        raise FloatingPointError(f"step {step}: the {what} {where}; {_ADVICE}")


def _find_culprit(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
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
