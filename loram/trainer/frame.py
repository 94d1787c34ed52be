"""The frame around everything that trains and can be interrupted: train and align are jobs in it.

A job says what it is made from, how it trains and what it writes. The frame publishes the output, keeps the
checkpoints, goes on from the newest one, writes the log, and removes the checkpoints at the end.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from loram.base import processes
from loram.disk.artifacts import publish
from loram.trainer.checkpoints import Checkpoints
from loram.trainer.resume import STARTED, checkpoints_of, events_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a training; each job adds its weights.

    Args:
        log: the losses, one entry per line of the log file.
    """

    log: Sequence[Mapping[str, Any]]


Result = TypeVar("Result", bound=Outcome)


@dataclass(frozen=True, kw_only=True)
class Job(ABC, Generic[Result]):
    """A training whose result is a folder.

    Args:
        kind: the kind of folder that it makes, as manifests name it.
        made_from: the fingerprints of everything that goes in: name -> fingerprint.
        settings: everything else that decides the result, as the manifest has it.
        names: name of an input -> what the user calls it, for messages.
        started: when the training began; the rows were read with this time.
        device: the device to train on.
        checkpoint_limit: how many checkpoints to keep meanwhile; None keeps all.
        keep_checkpoints: whether the checkpoints stay when the output is in place.
    """

    log_name: ClassVar[str]

    kind: str
    made_from: Mapping[str, str]
    settings: Mapping[str, Any]
    names: Mapping[str, str]
    started: datetime
    device: torch.device
    checkpoint_limit: int | None = 1
    keep_checkpoints: bool = False

    @abstractmethod
    def fit(self, checkpoints: Checkpoints, newest: Path | None) -> Result:
        """Train, or go on from a checkpoint.

        Args:
            checkpoints: the place of the training's checkpoints.
            newest: the checkpoint to go on from; None to begin.
        """

    @abstractmethod
    def write(self, out: Path, outcome: Result) -> Mapping[str, float]:
        """Write the result into an empty folder; only the first of several processes does.

        Returns:
            Figures that are known only now, for the manifest and the last line of the log; often none.
        """


def run_job(job: Job[Result], out: Path, *, fresh: bool) -> Path:
    """Train, write the result to `out`, and remove the checkpoints, which lie in `OUT-checkpoints` until then.

    After an interruption the same job goes on from the newest whole checkpoint and ends with the same bytes.

    Args:
        job: what to do.
        out: the folder to make.
        fresh: remove the checkpoints of an interrupted run and begin anew.

    Returns:
        `out`.

    Raises:
        UserError: `out` exists, or the interrupted run had settings or data with another result.
    """
    checkpoints = Checkpoints(
        checkpoints_of(out),
        events=events_of(out, job.started),
        made_from=job.made_from,
        settings={**job.settings, "device": job.device.type, STARTED: job.started.isoformat()},
        names=job.names,
        limit=job.checkpoint_limit,
    )
    settings = dict(job.settings)
    with (
        publish(out, kind=job.kind, made_from=job.made_from, settings=settings) as staging,
        checkpoints.open(fresh=fresh),
    ):
        newest = checkpoints.newest()
        if newest is not None:
            logger.info("going on from %s in %s", newest.name, newest.parent)
        outcome = job.fit(checkpoints, newest)
        if processes.first():
            figures = job.write(staging, outcome)
            settings.update(figures)  # `publish` writes the manifest when this block ends
            lines = [*outcome.log, *([figures] if figures else [])]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (staging / job.log_name).write_text(text, encoding="utf-8")
    if not job.keep_checkpoints:
        checkpoints.remove()
    return out
