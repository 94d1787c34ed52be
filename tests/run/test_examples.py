"""A run can end with held-out rows that the full model answers before and after."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS

import loram
from loram import cli
from loram.run.pipeline import check, run
from loram.run.recipe import Recipe


def values(model: Path, rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model),
        "output_dir": str(out),
        "dataset": str(rows),
        "eval_dataset": {"task": str(rows)},
        "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
        "train": {"anchor_steps": 0, "trainer": {"max_steps": 2, "learning_rate": 1e-1}},
        "evaluate": {"examples": 2, "max_samples": 4},
        **changes,
    }


@pytest.fixture(scope="module")
def done(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(Recipe.model_validate(values(tiny_llama, rows_file, out)))
    return out


def test_the_report_has_answers_of_the_base_and_of_the_recovered_adapter(done: Path, tiny_llama: Path) -> None:
    examples = json.loads((done / "report.json").read_text())["examples"]
    assert [(e["dataset"], e["prompt"], e["expected"]) for e in examples] == [
        ("task", row["question"], row["answer"]) for row in ROWS[:2]
    ]
    prompts = [row["question"] for row in ROWS[:2]]
    for name, adapter in (("base", None), ("recovered", done / "recovered")):
        expected = loram.generate(tiny_llama, prompts, adapter=adapter, max_new_tokens=100)
        assert [example["answers"][name] for example in examples] == [result.text for result in expected]
    assert any(example["answers"]["base"] != example["answers"]["recovered"] for example in examples)


def test_they_are_not_answered_again_and_the_command_shows_them_side_by_side(
    done: Path,
    tiny_llama: Path,
    rows_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("loram.run.examples.generate")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values(tiny_llama, rows_file, done)))
    capfd.readouterr()
    assert cli._main(["run", str(path)]) == 0
    out = capfd.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    assert lines[lines.index(f"task: {ROWS[1]['question']}") + 1] == f"expected: {ROWS[1]['answer']}"
    headings = [line.split() for line in lines if line.startswith("┃ base")]
    assert headings == [["┃", "base", "┃", "recovered", "┃"]] * 2


def test_rows_without_a_prompt_are_refused_before_the_run(
    tiny_llama: Path, rows_file: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    text = jsonl({"text": "one plus two is three"})
    with pytest.raises(loram.UserError, match=r"^evaluate\.examples: .*data.jsonl has no row with a prompt"):
        check(Recipe.model_validate(values(tiny_llama, rows_file, tmp_path / "out", eval_dataset=str(text))))
    untrained = values(tiny_llama, rows_file, tmp_path / "out")
    del untrained["dataset"], untrained["train"]
    with pytest.raises(ValueError, match=r"evaluate\.examples: shows what a training changes"):
        Recipe.model_validate(untrained)
