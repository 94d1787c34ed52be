"""Recipes that train and evaluate nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

import loram
from loram.run.compare import compare
from loram.run.dry_run import dry_run
from loram.run.pipeline import run
from loram.run.recipe import Recipe
from loram.run.report import summary, table
from loram.run.show import show


def recipe(model: Path, rows: Path, out: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model_name_or_path": str(model),
        "output_dir": out,
        "dataset": str(rows),
        "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
        "train": {"trainer": {"max_steps": 1}},
    }
    return Recipe.model_validate({**values, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"eval_dataset": None}, {"eval_dataset": "ROWS", "evaluate": False}], ids=["none", "null", "false"]
)
def test_a_recipe_prunes_trains_and_recovers_without_evaluation(
    changes: dict[str, Any], tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    changes = {key: str(rows_file) if value == "ROWS" else value for key, value in changes.items()}
    asked = recipe(tiny_llama, rows_file, tmp_path / "out", **changes)
    planned = dry_run(asked)
    assert planned.eval_dataset == {}
    with (console := Console(width=120)).capture() as capture:
        show(planned, console)
    assert "Nothing is evaluated" in capture.get()
    report = run(asked)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"pruned", "adapter", "recovered"}
    assert [row.name for row in report.rows] == ["pruned", "pruned + adapter", "recovered"]
    assert report.final == "recovered"
    assert all(row.perplexity == {} and row.evaluated is None and row.made is not None for row in report.rows)
    counts = [row.trained_on and row.trained_on.used for row in report.rows]
    assert counts == [None, 20, None]
    assert summary(report).startswith("Nothing is evaluated")
    assert summary(report).endswith("out/recovered.")
    assert table(report).row_count == 3
    assert json.loads((tmp_path / "out" / "report.json").read_text())["final"] == "recovered"
    rows = {row.name: row.parameters for row in report.rows}
    for name, (model, adapter) in {
        "pruned": (tmp_path / "out" / "pruned", None),
        "pruned + adapter": (tmp_path / "out" / "pruned", tmp_path / "out" / "adapter"),
        "recovered": (tiny_llama, tmp_path / "out" / "recovered"),
    }.items():
        assert rows[name] == loram.evaluate(model, adapter=adapter, data=rows_file).parameters


@pytest.mark.parametrize("section", [{"full_lora": True}, {"max_samples": 4}], ids=["full-lora", "samples"])
def test_options_of_an_evaluation_without_rows_are_refused(section: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="evaluate: needs an `eval_dataset`"):
        recipe(tmp_path, tmp_path / "rows.jsonl", tmp_path / "out", evaluate=section)


def test_a_comparison_needs_held_out_rows(tmp_path: Path) -> None:
    asked = recipe(tmp_path, tmp_path / "rows.jsonl", tmp_path / "out", compare={"a": {}})
    with pytest.raises(loram.UserError, match="compare: needs `eval_dataset`"):
        compare(asked)
