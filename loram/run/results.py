"""The results of a finished run, read from its folder: report, losses and plan."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loram.base.errors import UserError, first_problem
from loram.base.paths import local
from loram.model.plan import PruningPlan, find_plan
from loram.model.sparsity import UNSTRUCTURED
from loram.run.report import REPORT_NAME, RunReport

_LOGGED = ("aligned", "adapter", "polished", "full_lora")  # the folders that have a log, in the order of a run
_PLANNED = ("pruned", "aligned", "adapter", "recovered")  # those that have the plan


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """The results of a run.

    Args:
        folder: the folder of the run.
        report: its report.
        logs: the folder of a training -> the entries of its log.
        plan: the plan of the small model; None where no folder with one is left.
    """

    folder: Path
    report: RunReport
    logs: Mapping[str, Sequence[Mapping[str, Any]]]
    plan: PruningPlan | None

    @classmethod
    def load(cls, folder: str | Path) -> "RunResults":
        """Read the results of a run.

        Raises:
            UserError: there is no report in the folder, or a file in it cannot be read.
        """
        folder = local(folder)
        path = folder / REPORT_NAME
        if not path.is_file():
            raise UserError(f"{folder}: no {REPORT_NAME} here; name the output_dir of a run that has ended")
        try:
            report = RunReport.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a valid report: {first_problem(error)}") from error
        logs = {name: _entries(log) for name in _LOGGED for log in sorted((folder / name).glob("*_log.jsonl"))}
        plans = (find_plan(folder / name) for name in _PLANNED)
        return cls(folder=folder, report=report, logs=logs, plan=next(filter(None, plans), None))

    def recipe(self, place: str) -> Any:
        """Return a value of the recipe by its place, such as `train.method`; None where it is not there."""
        value: Any = self.report.recipe
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def final_cost(self) -> tuple[float, int]:
        """Return (seconds, peak resident bytes) of all that made the final row, as far as they are known."""
        names = [row.name for row in self.report.rows]
        stop = names.index(self.report.final) + 1 if self.report.final in names else len(names)
        costs = [row.made for row in self.report.rows[:stop] if row.made is not None and row.name != "full LoRA"]
        return sum(cost.seconds for cost in costs), max((cost.peak_rss for cost in costs), default=0)


def _entries(log: Path) -> list[dict[str, Any]]:
    """Return the entries of a log.

    Raises:
        UserError: a line is not a JSON object.
    """
    try:
        entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{log}: not valid JSON: {error}") from error
    if not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{log}: a line is not a JSON object")
    return entries


def pruning_of(plan: PruningPlan | None) -> str:
    """Return how a model was pruned, in a few words: `0.5 by taylor`, `4:8 by sparsegpt`, `2 layers dropped`."""
    if plan is None:
        return ""
    ratios = [f"{ratio:g}" for ratio in (plan.ratio, *plan.ratios.values()) if ratio is not None]
    if plan.sparse:
        ratios = [plan.pattern, *(ratios if plan.pattern == UNSTRUCTURED else [])]
    how = [f"{', '.join(ratios)} by {plan.criterion}"] if ratios else []
    return ", ".join([*how, *([f"{len(plan.dropped)} layers dropped"] if plan.dropped else [])])
