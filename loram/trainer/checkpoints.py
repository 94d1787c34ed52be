"""Checkpoints from which a training continues exactly after an interruption.

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
from typing import Any

from loram.base import processes
from loram.base.errors import UserError
from loram.disk.artifacts import discard, put_in_place, verify
from loram.trainer.resume import find_change

logger = logging.getLogger(__name__)

# Parts of the keys in a log entry whose values are timings, or count from the last start and not from the first.
_SESSION_KEYS = ("runtime", "per_second", "total_flos", "num_tokens")


class Checkpoints:
    """The checkpoints of one training, in a folder beside its output.

    Args:
        folder: the folder of the checkpoints; it need not exist.
        events: the folder for what a tracker writes beside the output; it stays when the checkpoints go.
        made_from: name of an input -> its fingerprint.
        settings: everything else that influences the result of the training.
        names: name of an input -> what the user calls it.
        limit: how many checkpoints to keep; None keeps all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        events: Path,
        made_from: Mapping[str, str],
        settings: Mapping[str, Any],
        names: Mapping[str, str],
        limit: int | None,
    ) -> None:
        self.folder, self.events, self.names, self.limit = folder, events, names, limit
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
            UserError: the checkpoint belongs to a training whose settings or data have another result; the message has
                the first difference.
        """
        return processes.broadcast(self._newest)

    def _newest(self) -> Path | None:
        for path in self._paths():
            try:
                manifest = verify(path)[str(path)]
            except UserError as error:
                logger.warning("%s is not whole, so it is not used: %s", path.name, error)
                continue
            if changed := find_change(manifest, self.settings, self.made_from, self.names):
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
        except UserError:
            raise
        except BaseException as error:
            if kept := self._paths():
                error.add_note(f"the same command continues from {kept[0].name}")
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
