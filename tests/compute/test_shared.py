"""Two processes, started by torchrun, prune, teach and evaluate as one process does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model
from helpers import launch
from shared import PRUNED, work

import loram
from loram.alignment.teacher import TeacherCache
from loram.base.errors import UserError
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan

pytest.importorskip("lm_eval")

TASK = {
    "task": "tiny",
    "output_type": "multiple_choice",
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["one", "two plus two", "three"],
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
QUESTIONS = [{"question": "one plus two" * number, "gold": number % 3} for number in range(1, 6)]


@pytest.fixture(scope="module")
def made(
    tiny_models: dict[str, Path], tokenizer: Any, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """Return (the folder that two processes made, the folder of one process, what the two printed)."""
    out = tmp_path_factory.mktemp("shared")
    dense = make_model(out / "dense", "llama", tokenizer, num_hidden_layers=4)
    questions, task = out / "questions.jsonl", out / "tiny.yaml"
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
    task.write_text(yaml.safe_dump({**TASK, "dataset_kwargs": {"data_files": {"test": str(questions)}}}))
    arguments = [dense, tiny_models["qwen3_moe"], rows_file, task]
    for name in ("one", "two"):
        (out / name).mkdir()
    ended = launch(Path(__file__).with_name("shared.py"), *arguments, out / "two")
    work(*arguments, out / "one")
    return out / "two", out / "one", ended.stdout


def test_one_process_writes_and_prints(made: tuple[Path, Path, str]) -> None:
    two, one, printed = made
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    lines = printed.splitlines()
    assert [sum(f"{two / name}:" in line for line in lines) for name in (*PRUNED, "teacher")] == [1] * (len(PRUNED) + 1)
    for name in PRUNED:
        loram.disk.artifacts.verify(two / name)


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_models_are_those_of_one_process(name: str, made: tuple[Path, Path, str]) -> None:
    plans = [PruningPlan.load(folder / name) for folder in made[:2]]
    ours, theirs = (plan.model_copy(update={"masks": None}) for plan in plans)
    assert ours == theirs
    two, one = (Checkpoint(folder / name) for folder in made[:2])
    for tensor in one.names():
        expected = one.tensor(tensor).double()
        assert (two.tensor(tensor).double() - expected).norm() <= 1e-4 * expected.norm(), tensor


def test_a_teachers_cache_is_that_of_one_process(made: tuple[Path, Path, str]) -> None:
    two, one = (TeacherCache(folder / "teacher") for folder in made[:2])
    assert two.info == one.info
    assert len(one.info.part_rows) > 1
    for number in range(len(one)):
        assert torch.equal(two[number].input_ids, one[number].input_ids)
        assert torch.equal(two[number].ids, one[number].ids)
        assert torch.allclose(two[number].log_probs, one[number].log_probs, atol=2e-3)  # stored in 16 bits


def test_evaluations_are_those_of_one_process(made: tuple[Path, Path, str]) -> None:
    two, one = (json.loads((folder / "results.json").read_text()) for folder in made[:2])
    for name in ("resident", "streamed", "one row"):
        assert two[name] == {**one[name], **{key: pytest.approx(one[name][key]) for key in ("loss", "perplexity")}}
    for name in ("tasks", "streamed tasks"):
        assert two[name] == one[name]
        assert one[name]["tasks"]["tiny"]["examples"] == len(QUESTIONS)


def test_too_few_rows_for_the_processes_are_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("loram.base.processes.gather", lambda value: [value, False])  # the other one has no row
    monkeypatch.setattr("loram.base.processes.count", lambda: 2)
    from loram.pruning.score import calibration_stream

    with pytest.raises(UserError, match="1 rows do not give each of 2 processes a text of at least two tokens"):
        calibration_stream(Checkpoint(tiny_llama), [[1, 2, 3]])
