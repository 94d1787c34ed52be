"""What a run adds to the model cards of its folders: the perplexities of its report."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult

from loram.base.paths import is_on_hub
from loram.data.spec import DataSpec
from loram.disk.card import add_evaluation, shown
from loram.run.report import Row, RunReport


def complete_cards(report: RunReport, folders: Mapping[str, Path], held_out: Mapping[str, DataSpec]) -> None:
    """Put the evaluations of a run into the cards of its folders.

    Args:
        report: the report of the run.
        folders: name of a row -> the folder that the run made for it.
        held_out: the evaluation data sets by name.
    """
    short = shown(str(report.recipe["model_name_or_path"])).rpartition("/")[2]
    for row in report.rows:
        if row.name in folders and row.perplexity:
            text, results = evaluation_table(report, row.name, held_out), _results(row, held_out)
            add_evaluation(folders[row.name], text, results, f"{short}, {row.name}")


def evaluation_table(report: RunReport, name: str, held_out: Mapping[str, DataSpec]) -> str:
    """Return the perplexities of all rows as a table in Markdown, in which one row is in bold."""
    datasets = list(report.rows[0].perplexity)
    heads = [f"{dataset} (`{shown(held_out[dataset].path)}`)" for dataset in datasets]
    lines = [f"| model | parameters | {' | '.join(heads)} |", "|---|---:" + "|---:" * len(heads) + "|"]
    for row in report.rows:
        cells = [row.name, f"{row.parameters:,}", *(f"{row.perplexity[dataset]:.3f}" for dataset in datasets)]
        lines.append(f"| {' | '.join(f'**{cell}**' if row.name == name else cell for cell in cells)} |")
    gains = report.kept_gain if name == report.final else None
    kept = [
        f"On {dataset}, it keeps {100 * share:.0f}% of what LoRA on the full model gains."
        for dataset, share in (gains or {}).items()
    ]
    return "\n".join(["Perplexity on held-out rows; lower is better.\n", *lines, *([""] if kept else []), *kept])


def _results(row: Row, held_out: Mapping[str, DataSpec]) -> list[EvalResult]:
    """Return the perplexities of a row as the hub has them.

    The hub takes results of one dataset type, configuration and split for results on one data set, whatever its name.
    So the type is the recipe's name of the data set, unless that is the only one of its name on the hub.
    """
    paths = [spec.path for spec in held_out.values()]
    results = []
    for name, spec in held_out.items():
        by_id = is_on_hub(spec.path) and paths.count(spec.path) == 1
        result = EvalResult(
            task_type="text-generation",
            dataset_type=spec.path if by_id else name,
            dataset_name=name,
            dataset_config=spec.config if by_id else None,
            dataset_split=spec.split if by_id else None,
            metric_type="perplexity",
            metric_name="perplexity",
            metric_value=round(row.perplexity[name], 4),
        )
        results.append(result)
    return results
