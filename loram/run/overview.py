"""Several runs in one table."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from loram.run.results import RunResults, pruning_of


class Line(BaseModel):
    """One run among several.

    Args:
        run: the folder of the run.
        model: the model that it began with.
        pruning: how that was pruned, in a few words.
        method: the method of the training; empty where nothing was trained.
        final: the row that the run is about; None where nothing was trained.
        base: the perplexity of the full model, by data set.
        perplexity: the perplexity of the final row, by data set.
        kept_gain: the share of full LoRA's gain that it keeps, by data set; empty where that is not known.
        parameters: the parameters of the small model that was trained on; None where no row is about it.
        seconds: the duration of all that made the final row.
        peak_rss: the largest resident memory of it in bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    model: str
    pruning: str
    method: str
    final: str | None
    base: dict[str, float]
    perplexity: dict[str, float]
    kept_gain: dict[str, float]
    parameters: int | None
    seconds: float
    peak_rss: int


def overview(results: Sequence[RunResults]) -> list[Line]:
    """Return one line per run."""
    return [_line(one) for one in results]


def _line(one: RunResults) -> Line:
    report = one.report
    rows = {row.name: row for row in report.rows}
    small = rows.get("aligned", rows.get("pruned"))
    seconds, peak = one.final_cost()
    return Line(
        run=str(one.folder),
        model=str(report.recipe["model_name_or_path"]),
        pruning=pruning_of(one.plan),
        method="" if report.final is None else str(one.recipe("train.method")),
        final=report.final,
        base=rows["base"].perplexity if "base" in rows else {},
        perplexity=rows[report.final].perplexity if report.final in rows else {},
        kept_gain=report.kept_gain or {},
        parameters=None if small is None else small.parameters,
        seconds=seconds,
        peak_rss=peak,
    )


def headings(lines: Sequence[Line]) -> list[str]:
    """Return the headings of the table, in the order of `cells`."""
    datasets = _datasets(lines)
    gains = [f"kept gain {name}" for name in datasets if any(name in line.kept_gain for line in lines)]
    perplexities = [f"perplexity {name}" for name in datasets]
    return ["run", "model", "pruned", "small model", "trained by", *perplexities, *gains, "made in", "peak RSS"]


def cells(line: Line, lines: Sequence[Line]) -> list[str]:
    """Return a line of the table."""
    datasets = _datasets(lines)
    gains = [name for name in datasets if any(name in other.kept_gain for other in lines)]
    return [
        *(line.run.rpartition("/")[2], line.model.rpartition("/")[2], line.pruning),
        *("" if line.parameters is None else f"{line.parameters:,}", line.method),
        *(_change(line.base.get(name), line.perplexity.get(name)) for name in datasets),
        *(f"{100 * line.kept_gain[name]:.0f}%" if name in line.kept_gain else "" for name in gains),
        *(f"{line.seconds:.1f} s", f"{line.peak_rss / 1e9:.2f} GB"),
    ]


def table(results: Sequence[RunResults]) -> Table:
    """Return the runs as a table for a terminal; costs are in seconds and GB (10^9 bytes)."""
    lines = overview(results)
    result = Table()
    for number, heading in enumerate(headings(lines)):
        result.add_column(heading, justify="left" if number < 3 else "right", no_wrap=number == 0)
    for line in lines:
        result.add_row(*cells(line, lines))
    return result


def _datasets(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in (*line.base, *line.perplexity)))


def _change(base: float | None, final: float | None) -> str:
    known = [f"{value:.3f}" for value in (base, final) if value is not None]
    return " → ".join(known)
