"""Training that can be trusted overnight: it stops at the first value that is not finite, and goes on where it was.

transformers writes a checkpoint in place and takes the one with the highest number for the last, whole or not. Here a
checkpoint is written aside, given a manifest and moved into place, and only one that its manifest vouches for is used.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from loram.base import processes
from loram.base.errors import UserError
from loram.base.progress import without_library_bars
from loram.disk.artifacts import difference, discard, put_in_place, verify

logger = logging.getLogger(__name__)

# What a log entry has of timings, or counts from the last start only and not from the first.
_OF_THE_SESSION = ("runtime", "per_second", "total_flos", "num_tokens")
_ADVICE = "try a lower learning_rate, or look at the rows of this step"


class Checkpoints:
    """The checkpoints of one training, in a folder beside its output.

    Args:
        folder: where; it need not exist.
        made_from: the fingerprints of the base and of the data.
        settings: everything else that decides what is trained.
        limit: how many to keep; None for all.
    """

    def __init__(
        self, folder: Path, *, made_from: Mapping[str, str], settings: Mapping[str, Any], limit: int | None
    ) -> None:
        self.folder, self.limit = folder, limit
        self.best: int | None = None  # the step of a checkpoint that stays beyond the limit
        self.made_from, self.settings = dict(made_from), json.loads(json.dumps(settings))  # as they are read back

    @property
    def staging(self) -> Path:
        """Where the Trainer writes; nothing in here is ever read."""
        return self.folder / ".partial"

    def path(self, step: int | None) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"checkpoint-{step}"

    def _found(self) -> list[Path]:
        """The checkpoints in place, the newest first."""
        return sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, or None where there is none.

        Raises:
            UserError: it is of a training with other settings or data; the first difference is shown.
        """
        return processes.broadcast(self._newest)

    def _newest(self) -> Path | None:
        for path in self._found():
            try:
                manifest = verify(path)[str(path)]
            except UserError as error:
                logger.warning("%s is not whole and passed over: %s", path.name, error)
                continue
            begun = {**manifest.settings, "made_from": manifest.made_from}
            if changed := difference(begun, {**self.settings, "made_from": self.made_from}):
                raise UserError(
                    f"{self.folder}: this training was begun with other settings or data ({changed}); "
                    "give --fresh to start over, or choose another output"
                )
            return path
        return None

    def adopt(self, step: int) -> None:
        """Move the checkpoint that the Trainer has just written into place, and drop those beyond the limit."""
        processes.wait()  # each writes the state of its random numbers
        if processes.first():
            self._adopt(step)
        processes.wait()

    def _adopt(self, step: int) -> None:
        path = self.path(step)
        if path.exists():  # one that was not whole, else training would have gone on from it
            discard(path)
        put_in_place(
            self.staging / path.name,
            path,
            kind="checkpoint",
            made_from=self.made_from,
            settings=self.settings,
        )
        if self.limit is not None:
            for path in self._found()[max(self.limit, 1) :]:
                if path != self.path(self.best):
                    discard(path)

    @contextlib.contextmanager
    def open(self, *, fresh: bool) -> Iterator[None]:
        """Room for a training's checkpoints, begun anew if `fresh`; in the end only whole ones stay."""
        if processes.first():
            for path in self.folder.glob("*" if fresh else ".*"):
                shutil.rmtree(path)
        processes.wait()
        try:
            yield
        except BaseException:
            if kept := self._found():
                logger.warning("stopped; the same command goes on from %s", kept[0].name)
            raise
        finally:
            if processes.first():
                shutil.rmtree(self.staging, ignore_errors=True)
                if not self._found():
                    self.remove()

    def remove(self) -> None:
        """Remove all checkpoints and their folder."""
        if processes.first():
            shutil.rmtree(self.folder, ignore_errors=True)


def lasting(log: Sequence[Mapping[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """The entries of a training's log that hold one of `kinds` (`loss`), without what changes with interruptions."""
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in _OF_THE_SESSION)}
        for entry in log
        if any(kind in entry for kind in kinds)
    ]


class _Guard(TrainerCallback):  # type: ignore[misc]
    """Refuses weights that are not finite, before they are saved, and hands what is saved to `Checkpoints`."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        _check(trained, "value", state.global_step)
        # A loss is logged as the mean since the last log, and what is summed up meanwhile is in no checkpoint.
        control.should_log |= control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        control.should_log |= control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.checkpoints.adopt(state.global_step)


def guarded(kind: type, checkpoints: Checkpoints) -> type:
    """A Trainer class that stops at a loss, gradient or weight that is not finite, and saves through `checkpoints`."""

    class Guarded(kind):  # type: ignore[misc]
        """`kind`, guarded."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.add_callback(_Guard(checkpoints))

        def training_step(self, model: Any, *args: Any, **options: Any) -> Any:
            loss, step = super().training_step(model, *args, **options), self.state.global_step + 1
            if not loss.isfinite():
                raise FloatingPointError(f"step {step}: the loss is {loss.item()}; {_culprit(model)}")
            # Here, since clipping by a norm that is not finite spoils all gradients. With fp16 the scaler meets such
            # gradients now and then, skips the step and lowers its scale: they are its own affair.
            if self.accelerator.sync_gradients and not self.args.fp16:
                gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                _check(gradients, "gradient", step)
            return loss

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            # without the tokenizer, the pickled arguments and, where lm_head is adapted, the base's lm_head
            options = {"save_embedding_layers": False} if isinstance(self.model, PeftModel) else {}
            with without_library_bars():
                self.model.save_pretrained(output_dir, state_dict=state_dict, **options)

    return Guarded


def _check(tensors: Mapping[str, torch.Tensor], what: str, step: int) -> None:
    """One look at the norm of everything, which is one wait for the device; at each tensor only if that is bad."""
    if tensors and not nn.utils.get_total_norm(list(tensors.values())).isfinite():
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        where = f"of {_plain(bad[0])} is not finite" if bad else "norm overflows"
        raise FloatingPointError(f"step {step}: the {what} {where}; {_ADVICE}")


def _culprit(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            return f"{_plain(name)} has values that are not finite"
    return f"all weights are finite; {_ADVICE}"


def _plain(name: str) -> str:
    """A parameter's name as files have it, without what PEFT puts around it."""
    return (
        name.removeprefix("module.")
        .removeprefix("base_model.model.")
        .replace(".default.", ".")
        .replace(".base_layer.", ".")
    )
