"""The page of a run, or of several: one HTML file that needs no other file, no script and no network."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from loram.disk.artifacts import replace_text
from loram.disk.card import shown, steps_of
from loram.run.figures import curves, kept
from loram.run.overview import columns, overview
from loram.run.report import summary, task_lines
from loram.run.results import RunResults, pruning_of

PAGE_NAME = "report.html"
_TEMPLATE = "page.html.jinja"


def write_page(results: Sequence[RunResults], path: Path) -> None:
    """Write the page of some runs; it replaces what is at `path` only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page(results))


def page(results: Sequence[RunResults]) -> str:
    """Return the page as HTML. Everything that comes from the runs is escaped."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lines = overview(results)
    return templates.get_template(_TEMPLATE).render(
        runs=[_shown(one) for one in results],
        overview=columns(lines),
    )


def _shown(one: RunResults) -> dict[str, Any]:
    """Return what the template shows of a run."""
    report = one.report
    base = report.rows[0].perplexity if report.rows and report.rows[0].name == "base" else {}
    return {
        "name": one.folder.name,
        "model": shown(str(report.recipe["model_name_or_path"])),
        "report": report,
        "summary": summary(report).splitlines(),
        "pruning": pruning_of(one.plan),
        "method": one.recipe("train.method") if report.final else None,
        "tasks": task_lines(report),
        "datasets": list(report.rows[0].perplexity) if report.rows else [],
        "base": base,
        "steps": [re.sub(r"\*\*|`", "", step) for step in steps_of(one.folder / _last_folder(one))],
        "recipe": yaml.safe_dump(_chosen(report.recipe), sort_keys=False, allow_unicode=True),
        "curves": curves(one.logs),
        "kept": kept(one.plan),
    }


def _last_folder(one: RunResults) -> str:
    """Return the folder of the last stage; the final row is called as its folder is."""
    return one.report.final or next(
        name for name in ("aligned", "pruned") if name in {row.name for row in one.report.rows}
    )


def _chosen(value: Any) -> Any:
    """Return a recipe without what is empty or None."""
    if not isinstance(value, dict):
        return value
    chosen = {key: _chosen(inner) for key, inner in value.items()}
    return {key: inner for key, inner in chosen.items() if inner is not None and inner != {}}
