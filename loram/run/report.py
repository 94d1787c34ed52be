"""The report of a run: one row per model, as a table for people and as JSON for programs."""

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from loram.evaluation.preferences import Preferences
from loram.evaluation.tasks import TaskResult, shown

REPORT_NAME = "report.json"
NOT_EVALUATED = "Nothing is evaluated: the recipe has neither eval_dataset nor evaluate.tasks, or evaluate is false."


class Cost(BaseModel):
    """The cost of a stage: wall-clock seconds, and the peak resident memory of the process in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    peak_rss: int


def together(costs: Sequence[Cost | None]) -> Cost | None:
    """Return what several stages cost one after the other, as far as it is known; None if nothing is known."""
    known = [cost for cost in costs if cost is not None]
    if not known:
        return None
    return Cost(seconds=sum(cost.seconds for cost in known), peak_rss=max(cost.peak_rss for cost in known))


class RowCounts(BaseModel):
    """What became of a data set's rows, or of the pieces of a text.

    Args:
        used: the number of rows that were trained on or scored.
        truncated: the number of rows that `max_length` cut; some of them may be among the skipped ones.
        skipped: the number of rows that were left out because none of their tokens is in the loss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    used: int
    truncated: int
    skipped: int


class Row(BaseModel):
    """One model of the report.

    Args:
        name: base, full LoRA, pruned, aligned, pruned (or aligned) + adapter, recovered (or merged), or polished.
        parameters: the number of parameters of the model, its adapter included.
        perplexity: the perplexity on each evaluation data set; empty in a recipe that evaluates nothing.
        tokens: the number of tokens that each perplexity is the mean of.
        evaluated_on: the counts of each evaluation data set's rows.
        trained_on: the counts of the training data's rows; None if nothing was trained.
        tasks: the results of tasks by their names; empty where the model was given none.
        made: the cost of making the model from the row that it was made from; None for the base.
        evaluated: the cost of evaluating it; None in a recipe that evaluates nothing.
        preferences: on each evaluation data set of chosen and rejected answers, which of them the model prefers; its
            perplexity is that of the chosen ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parameters: int
    perplexity: dict[str, float]
    tokens: dict[str, int]
    evaluated_on: dict[str, RowCounts]
    trained_on: RowCounts | None
    tasks: dict[str, TaskResult] = {}
    made: Cost | None
    evaluated: Cost | None
    preferences: dict[str, Preferences] = {}


class Example(BaseModel):
    """One held-out row, and how the full model answers it.

    Args:
        dataset: the name of the evaluation data set.
        prompt: the last message before the answer.
        expected: the answer in the data set.
        answers: the name of the row of the report -> the answer of its model: the base, and the final row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    prompt: str
    expected: str
    answers: dict[str, str]


class RunReport(BaseModel):
    """The report of a run.

    Args:
        recipe: the recipe.
        versions: the versions of the libraries.
        rows: one row per model that was evaluated, or that was made where the recipe evaluates nothing.
        final: the name of the row that the run is about: the full model with the trained adapter; None if the run
            trains nothing.
        kept_gain: for each data set, the share of full LoRA's gain that the final row keeps; see `kept_gain`.
        examples: how the full model answers some held-out rows before and after; empty where the recipe shows none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: dict[str, object]
    versions: dict[str, str]
    rows: tuple[Row, ...]
    final: str | None = None
    kept_gain: dict[str, float] | None
    examples: tuple[Example, ...] = ()

    def row(self, name: str) -> Row:
        """Return the row with this name."""
        return next(row for row in self.rows if row.name == name)

    def data(self) -> list[tuple[str, RowCounts]]:
        """Return what became of the rows of every data set: the training data, then the evaluation's sets by name."""
        trained = [("training", row.trained_on) for row in self.rows if row.trained_on is not None]
        return [*trained[:1], *self.rows[0].evaluated_on.items()]


def kept_gain(rows: Mapping[str, Row], final: str | None) -> dict[str, float] | None:
    """Return (ln base - ln final) / (ln base - ln full LoRA), computed from the perplexities on each data set.

    1 means that the final row is as good as LoRA on the full model, and 0 that it is no better than the base. The
    result is None if the run has no full LoRA. A data set that full LoRA does not improve is left out.
    """
    if final is None or "full LoRA" not in rows:
        return None
    base, full, tuned = (rows[name].perplexity for name in ("base", "full LoRA", final))
    return {
        name: math.log(base[name] / tuned[name]) / math.log(base[name] / full[name])
        for name in base
        if full[name] < base[name]
    }


def task_lines(report: RunReport) -> tuple[list[str], list[list[str]]]:
    """Return the results of tasks as (headings, lines): one line per metric, and a column per model."""
    answering = [row for row in report.rows if row.tasks]
    lines = []
    for name, task in answering[0].tasks.items() if answering else ():
        for number, (label, _, _) in enumerate(task.labelled()):
            cells = [list(row.tasks[name].labelled())[number][1:] for row in answering]
            texts = [shown(value) + ("" if error is None else f" ± {shown(error)}") for value, error in cells]
            lines.append([name, label, *texts])
    return ["task", "metric", *(row.name for row in answering)], lines


def task_table(report: RunReport) -> Table:
    """Return the results of tasks as a table for a terminal, with standard errors."""
    headings, lines = task_lines(report)
    result = Table()
    for number, heading in enumerate(headings):
        result.add_column(heading, justify="left" if number < 2 else "right")
    for line in lines:
        result.add_row(*line)
    return result


def table(report: RunReport) -> Table:
    """Return the rows as a table; the costs are in seconds and GB (10^9 bytes)."""
    datasets = list(report.rows[0].perplexity)
    result = Table(title=f"{report.recipe['model_name_or_path']}")
    result.add_column("model", no_wrap=True)
    result.add_column("parameters", justify="right")
    for name in datasets:
        result.add_column("perplexity" if len(datasets) == 1 else f"perplexity\n{name}", justify="right")
    costs = ("made", "evaluated") if any(row.evaluated for row in report.rows) else ("made",)
    for what in costs:
        result.add_column(f"{what} in", justify="right")
        result.add_column("peak RSS", justify="right")
    for row in report.rows:
        perplexities = (f"{row.perplexity[name]:.3f}" for name in datasets)
        cells = (cell for what in costs for cell in _cells(getattr(row, what)))
        result.add_row(row.name, f"{row.parameters:,}", *perplexities, *cells)
    return result


def _cells(cost: Cost | None) -> tuple[str, str]:
    return ("", "") if cost is None else (f"{cost.seconds:.1f} s", f"{cost.peak_rss / 1e9:.2f} GB")


def summary(report: RunReport) -> str:
    """Return what the run shows, one sentence per data set. It also says when nothing was gained or rows were cut."""
    lines: list[str] = []
    if (final := report.final) is None:
        small = next(row.name for row in reversed(report.rows) if row.name in ("aligned", "pruned"))
        return f"Nothing was trained: the recipe has no dataset. Train on {report.recipe['output_dir']}/{small}."
    if not (report.rows[-1].perplexity or report.rows[-1].tasks):
        return f"{NOT_EVALUATED} What was trained is in {report.recipe['output_dir']}/{final}."
    base, recovered = report.row("base").perplexity, report.row(final).perplexity
    preferred = report.row(final).preferences
    lines += [_preferences(name, final, report.row("base").preferences[name], preferred[name]) for name in preferred]
    for name in (name for name in base if name not in preferred):
        change = 100 * (1 - recovered[name] / base[name])
        verb = "lowers" if change > 0 else "does not lower"
        line = (
            f"{name}: the {final} adapter {verb} the full model's perplexity, "
            f"{base[name]:.3f} -> {recovered[name]:.3f} ({-change:+.1f}%)"
        )
        if report.kept_gain and name in report.kept_gain:
            line += f"; {100 * report.kept_gain[name]:.0f}% of what LoRA on the full model gains"
        lines.append(line)
    lost = [
        f"{name} {counts.truncated} cut to max_length, {counts.skipped} skipped, of {counts.used + counts.skipped}"
        for name, counts in report.data()
        if counts.truncated or counts.skipped
    ]
    return "\n".join([*lines, *(["rows: " + "; ".join(lost)] if lost else [])])


def _preferences(name: str, final: str, before: Preferences, after: Preferences) -> str:
    return (
        f"{name}: the full model finds the chosen answer likelier in {100 * before.accuracy:.0f}% of pairs, and with "
        f"the {final} adapter in {100 * after.accuracy:.0f}%; the margin goes from {before.margin:.2f} to "
        f"{after.margin:.2f} nats"
    )
