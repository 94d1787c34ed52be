"""Recipes run tasks of lm-evaluation-harness on the full model, before and after, or refuse them before work."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROWS
from rich.console import Console

import loram
from loram.run.compare import compare
from loram.run.dry_run import dry_run
from loram.run.pipeline import run
from loram.run.recipe import Recipe
from loram.run.report import summary, task_lines, task_table
from loram.run.show import show

pytest.importorskip("lm_eval", reason="lm_eval is not installed")
TASK = {
    "task": "sums",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task with its data, as files."""
    data, path = tmp_path / "sums.jsonl", tmp_path / "sums.yaml"
    questions = [{"question": row["question"], "choices": [row["answer"], "none"], "gold": 0} for row in ROWS[:4]]
    data.write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    path.write_text(yaml.safe_dump({**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}))
    return path


def recipe(model: Path, rows: Path, out: Path, task: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model_name_or_path": str(model),
        "output_dir": out,
        "dataset": str(rows),
        "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
        "train": {"trainer": {"max_steps": 1}},
        "evaluate": {"tasks": [str(task)], "limit": 3},
    }
    return Recipe.model_validate({**values, **changes})


def test_a_run_ends_with_tasks_on_the_full_model(tiny_llama: Path, rows_file: Path, task: Path, tmp_path: Path) -> None:
    planned_run = recipe(tiny_llama, rows_file, tmp_path / "out", task)
    planned = dry_run(planned_run)
    with (console := Console(width=300)).capture() as capture:
        show(planned, console)
    assert f"Tasks of lm-evaluation-harness that are run: {task}" in capture.get()
    assert "Nothing is evaluated" not in capture.get()
    assert not (tmp_path / "out").exists()
    report = run(planned_run)
    assert [(row.name, bool(row.tasks)) for row in report.rows] == [
        ("base", True),
        ("pruned", False),
        ("pruned + adapter", False),
        ("recovered", True),
    ]
    for name, adapter in (("base", None), ("recovered", tmp_path / "out" / "recovered")):
        alone = loram.evaluate_tasks(tiny_llama, adapter=adapter, tasks=[str(task)], limit=3)
        assert report.row(name).tasks == alone.tasks
        assert alone.tasks["sums"].examples == 3
        assert report.row(name).evaluated is not None
    headings, [line] = task_lines(report)
    assert headings == ["task", "metric", "base", "recovered"]
    assert line[:2] == ["sums", "acc"]
    assert task_table(report).row_count == 1
    assert "Nothing is evaluated" not in summary(report)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h3>Tasks</h3>" in page
    assert f"<td>{line[3]}</td>" in page
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"][0]["tasks"]["sums"]["examples"] == 3
    assert run(Recipe.model_validate(json.loads(planned_run.model_dump_json()))) == report  # nothing is done again
    task.write_text(task.read_text().replace("{{question}}", "{{question}} yes"))
    with pytest.raises(loram.UserError, match=r"run tasks on base was made with other settings \(descriptions"):
        run(planned_run)


def test_tasks_and_perplexity_stand_side_by_side(tiny_llama: Path, rows_file: Path, task: Path, tmp_path: Path) -> None:
    align = {"dataset": str(rows_file), "trainer": {"max_steps": 1}, "probe": False}
    values = recipe(tiny_llama, rows_file, tmp_path / "out", task).model_dump(exclude_unset=True)
    del values["train"], values["dataset"]
    report = run(Recipe.model_validate({**values, "align": align, "eval_dataset": str(rows_file)}))
    assert [row.name for row in report.rows] == ["base", "pruned", "aligned"]
    assert all(row.tasks and row.perplexity for row in report.rows)


@pytest.mark.parametrize("name", ["unknown", "broken", "missing"])
def test_what_cannot_be_run_is_refused_before_work(
    name: str, tiny_llama: Path, rows_file: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "no such file"
    if name == "broken":
        task.write_text(task.read_text().replace("multiple_choice", "guess"))
        message = "cannot make a task of it"
    if name == "missing":
        monkeypatch.delitem(sys.modules, "loram.evaluation.harness", raising=False)
        monkeypatch.delattr("loram.evaluation.harness", raising=False)
        monkeypatch.setitem(sys.modules, "lm_eval.defaults", None)
        message = r"pip install 'loram\[tasks\]'"
    path = tmp_path / "none.yaml" if name == "unknown" else task
    planned_run = recipe(tiny_llama, rows_file, tmp_path / "out", path)
    for begin in (dry_run, run):
        with pytest.raises(loram.UserError, match=message):
            begin(planned_run)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together_is_refused(tiny_llama: Path, rows_file: Path, task: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit is an option of tasks"):
        recipe(tiny_llama, rows_file, tmp_path / "out", task, eval_dataset="a", evaluate={"limit": 3})
    with pytest.raises(ValueError, match="needs an `eval_dataset`; without held-out rows, only `tasks` can be run"):
        recipe(tiny_llama, rows_file, tmp_path / "out", task, evaluate={"tasks": str(task), "examples": 1})
    both = {"eval_dataset": str(rows_file), "compare": {"lora": {}}}
    with pytest.raises(loram.UserError, match=r"leave evaluate\.tasks out"):
        compare(recipe(tiny_llama, rows_file, tmp_path / "out", task, **both))
