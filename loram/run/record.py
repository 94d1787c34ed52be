"""What a run has done so far, on disk: finished stages are skipped, stale ones refused."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loram.base.errors import UserError, first_problem
from loram.compute.device import peak_rss, reset_peak_rss
from loram.disk.artifacts import difference, find_manifest, library_versions, replace_text
from loram.evaluation.evaluate import Report
from loram.evaluation.tasks import TaskReport
from loram.run.page import PAGE_NAME, write_page
from loram.run.recipe import Recipe
from loram.run.report import REPORT_NAME, Cost, Example, Row, RunReport, kept_gain
from loram.run.results import RunResults
from loram.trainer.resume import HARMLESS

logger = logging.getLogger(__name__)

Outcome = Report | TaskReport | tuple[Example, ...] | None

STATE_NAME = "stages.json"


class Done(BaseModel):
    """A finished stage.

    Args:
        settings: all that decided its outcome.
        cost: what it took; None where the process was stopped before it was written down.
        report: the result of an evaluation; None for other stages.
        tasks: the results of tasks; None for other stages.
        examples: the answers to held-out rows; None for other stages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    cost: Cost | None
    report: Report | None = None
    tasks: TaskReport | None = None
    examples: tuple[Example, ...] | None = None

    @property
    def has_outcome(self) -> bool:
        """Return whether it has a result other than a folder."""
        return any(outcome is not None for outcome in (self.report, self.tasks, self.examples))


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid")

    stages: dict[str, Done] = {}
    begun: dict[str, dict[str, Any]] = {}  # the name of a stage that was not finished -> its settings


class Record:
    """The output folder of a run, and what has been done in it.

    Args:
        recipe: the recipe of the run.

    Raises:
        UserError: the record in the folder is not a valid one.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.out = recipe, recipe.output_dir
        self.path = self.out / STATE_NAME
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else "{}"
            self.state = _State.model_validate_json(text)
        except (ValidationError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: not a valid record of stages: {first_problem(error)}") from error

    def stage(self, name: str, settings: Mapping[str, Any], action: Callable[[], Outcome]) -> Done:
        """Do a stage, or skip it where it was done with the same settings.

        Args:
            name: the name of its folder, or of an evaluation.
            settings: all that decides its outcome.
            action: does it; an evaluation returns its report, and what answers held-out rows returns the answers.

        Raises:
            UserError: it was done or begun with settings that have another outcome; the message shows the first
                difference.
        """
        wanted: dict[str, Any] = json.loads(json.dumps(settings))  # as they are read back
        done, folder = self.state.stages.get(name), self.out / name
        whole = folder.exists() and find_manifest(folder, edits=False) is not None
        kept = done is not None and (whole or done.has_outcome)
        before = done.settings if kept and done is not None else self.state.begun.get(name)
        if before is not None and (changed := difference(before, wanted, ignored=_ignored(before))):
            raise UserError(
                f"{self.out}: {name} was made with other settings ({changed}); "
                "choose another output_dir, or give --fresh to start over"
            )
        if kept and done is not None:
            logger.info("%s: done already", name)
            return done
        if whole:
            if before is None:
                raise UserError(f"{folder}: exists already, but {STATE_NAME} knows nothing of it; move it away")
            logger.info("%s: done already, just before the process was stopped", name)
            return self._record(name, Done(settings=wanted, cost=None))
        logger.info("%s ...", name)
        self.state.begun[name] = wanted
        self._save(self.path, self.state)
        reset_peak_rss()
        started = time.monotonic()
        try:
            outcome = action()
        except (KeyboardInterrupt, SystemExit) as stop:
            if not hasattr(stop, "__notes__"):
                stop.add_note(f"the same command goes on with {name}")
            raise
        cost = Cost(seconds=time.monotonic() - started, peak_rss=peak_rss())
        logger.info("%s: %.1f s, peak RSS %.2f GB", name, cost.seconds, cost.peak_rss / 1e9)
        report = outcome if isinstance(outcome, Report) else None
        tasks = outcome if isinstance(outcome, TaskReport) else None
        examples = outcome if isinstance(outcome, tuple) else None
        done = Done(settings=wanted, cost=cost, report=report, tasks=tasks, examples=examples)
        return self._record(name, done)

    def _record(self, name: str, done: Done) -> Done:
        self.state.stages[name] = done
        self.state.begun.pop(name, None)
        self._save(self.path, self.state)
        return done

    def _save(self, path: Path, value: BaseModel) -> None:
        replace_text(path, value.model_dump_json(indent=2) + "\n")

    def finish(self, rows: Sequence[Row], final: str | None, examples: Sequence[Example] = ()) -> RunReport:
        """Write report.json, and the same for people as report.html.

        Args:
            rows: the rows of the report.
            final: the row that the run is about; None where nothing was trained.
            examples: the answers to held-out rows.
        """
        report = RunReport(
            recipe=self.recipe.model_dump(mode="json"),
            versions=library_versions(),
            rows=tuple(rows),
            final=final,
            kept_gain=kept_gain({row.name: row for row in rows}, final),
            examples=tuple(examples),
        )
        self._save(self.out / REPORT_NAME, report)
        write_page([RunResults.load(self.out)], self.out / PAGE_NAME)
        return report


def start_over(out: Path, folders: Sequence[str]) -> None:
    """Remove what a run has left in its output folder, and nothing else.

    Args:
        out: the output folder.
        folders: the names of the folders that stages make; `[0-9]*` in them stands for a number.
    """
    for pattern in folders:
        names = [path.name for path in out.glob(pattern)] if "*" in pattern else [pattern]
        for name in names:
            for path in (out / name, out / f"{name}-checkpoints", out / f"{name}-parts"):
                shutil.rmtree(path, ignore_errors=True)
    for name in (STATE_NAME, REPORT_NAME, PAGE_NAME):
        (out / name).unlink(missing_ok=True)


def _ignored(before: Mapping[str, Any]) -> set[str]:
    """Return the settings that may differ from those of a stage that was done before."""
    of_0_1 = '"sha256"' in json.dumps(before)  # there, the digest of a data file covers its name too
    return {*HARMLESS, "path", *(("sha256", "content") if of_0_1 else ())}
