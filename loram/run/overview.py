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


def columns(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Return the columns of the table: heading -> one cell per line. What no line has gets no column."""
    sets = dict.fromkeys(name for line in lines for name in (*line.base, *line.perplexity))
    table = {
        "run": [line.run.rpartition("/")[2] for line in lines],
        "model": [line.model.rpartition("/")[2] for line in lines],
        "pruned": [line.pruning for line in lines],
        "small model": ["" if line.parameters is None else f"{line.parameters:,}" for line in lines],
        "method": [line.method for line in lines],
        **{
            f"perplexity {name}": [_change(line.base.get(name), line.perplexity.get(name)) for line in lines]
            for name in sets
        },
        **{f"kept gain {name}": [_share(line.kept_gain.get(name)) for line in lines] for name in sets},
        "made in": [f"{line.seconds:.1f} s" for line in lines],
        "peak RSS": [f"{line.peak_rss / 1e9:.2f} GB" for line in lines],
    }
    return {heading: cells for heading, cells in table.items() if any(cells)}


def table(results: Sequence[RunResults]) -> Table:
    """Return the runs as a table for a terminal; costs are in seconds and GB (10^9 bytes)."""
    shown = columns(overview(results))
    result = Table()
    for number, heading in enumerate(shown):
        result.add_column(heading, justify="left" if number < 3 else "right", overflow="fold")
    for cells in zip(*shown.values(), strict=True):
        result.add_row(*cells)
    return result


def _change(base: float | None, final: float | None) -> str:
    return " → ".join(f"{value:.3f}" for value in (base, final) if value is not None)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"
