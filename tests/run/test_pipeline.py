"""A recipe run end to end on a tiny model: folders, report, skipping, refusing what is stale."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loram
from loram.model.plan import PruningPlan
from loram.run.pipeline import check, run
from loram.run.recipe import Recipe
from loram.run.report import summary


def recipe(model: Path, rows: Path, out: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model_name_or_path": str(model),
        "output_dir": out,
        "dataset": str(rows),
        "eval_dataset": {"task": str(rows), "short": {"path": str(rows), "max_samples": 3}},
        "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
        "train": {"trainer": {"max_steps": 2, "learning_rate": 1e-2}},
        "evaluate": {"full_lora": True},
    }
    return Recipe.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def done(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(recipe(tiny_llama, rows_file, out))
    return out


def test_one_folder_a_stage_and_a_report(done: Path, tiny_llama: Path) -> None:
    assert {path.name for path in done.iterdir() if path.is_dir()} == {"pruned", "adapter", "recovered", "full_lora"}
    report = json.loads((done / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["base", "full LoRA", "pruned", "pruned + adapter", "recovered"]
    for row in report["rows"]:
        assert row["perplexity"].keys() == {"task", "short"}
        assert row["evaluated"]["seconds"] > 0
        assert row["evaluated"]["peak_rss"] > 1e8
    rows = {row["name"]: row for row in report["rows"]}
    full, pruned = PruningPlan.load(done / "pruned").parameters()
    assert (rows["base"]["parameters"], rows["pruned"]["parameters"]) == (full, pruned)
    assert rows["recovered"]["parameters"] == rows["full LoRA"]["parameters"] > full
    found = loram.evaluate(tiny_llama, adapter=done / "recovered", data=report["recipe"]["dataset"][0]["path"])
    assert rows["recovered"]["perplexity"]["task"] == found.perplexity


def test_rows_cut_and_skipped_are_in_the_report(
    tiny_llama: Path, jsonl: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    short, long = {"prompt": "a", "completion": " b"}, "one plus two is three " * 20
    train = jsonl(short, {"prompt": "a", "completion": long}, {"prompt": long, "completion": " b"})
    plain = {"path": str(train), "apply_chat_template": False}
    changes = {"train": {"trainer": {"max_steps": 1, "max_length": 20}}, "evaluate": {"max_length": 60}}
    eval_dataset = {"task": str(rows_file), "cut": {**plain, "max_length": 30}}
    report = run(recipe(tiny_llama, train, tmp_path / "out", dataset=plain, eval_dataset=eval_dataset, **changes))
    written = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    lost, whole = {"used": 2, "truncated": 2, "skipped": 1}, {"used": 20, "truncated": 0, "skipped": 0}
    assert [row["evaluated_on"] for row in written] == [{"task": whole, "cut": lost}] * 4
    assert [row["trained_on"] for row in written] == [None, None, lost, None]
    last = summary(report).splitlines()[-1]
    assert last == ("rows: training 2 cut to max_length, 1 skipped, of 3; cut 2 cut to max_length, 1 skipped, of 3")


def test_a_second_run_does_nothing_again(done: Path, tiny_llama: Path, rows_file: Path) -> None:
    def stamps() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in done.rglob("*") if path.stem != "report"}

    before, report = stamps(), (done / "report.json").read_text()
    run(recipe(tiny_llama, rows_file, done))
    assert stamps() == before
    assert (done / "report.json").read_text() == report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "seed: 42 -> 7"),
        ({"prune": {"ratio": 0.25, "criterion": "magnitude", "keep_first": 1, "keep_last": 1}}, "ratio: 0.5 -> 0.25"),
        ({"train": {"trainer": {"max_steps": 3, "learning_rate": 1e-2}}}, "trainer.max_steps: 2 -> 3"),
    ],
    ids=["seed", "ratio", "steps"],
)
def test_what_was_made_with_other_settings_is_refused(
    changes: dict[str, Any], message: str, done: Path, tiny_llama: Path, rows_file: Path
) -> None:
    with pytest.raises(loram.UserError, match=message):
        run(recipe(tiny_llama, rows_file, done, **changes))


def test_what_cannot_change_a_result_may_change(done: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    copy, moved = shutil.copytree(done, tmp_path / "out"), shutil.copy(rows_file, tmp_path / "moved.jsonl")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    train = {"trainer": {"max_steps": 2, "learning_rate": 1e-2, "save_steps": 1, "logging_steps": 1}}
    run(recipe(tiny_llama, Path(moved), copy, train=train))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")} == before


def test_a_run_folder_of_version_0_1_is_gone_on_with(
    done: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Its record has another digest of each data file, which covers the file's name too."""
    copy = shutil.copytree(done, tmp_path / "out")
    text = (copy / "stages.json").read_text()
    old = re.sub(r'"content": "[0-9a-f]{64}"', f'"sha256": "{"0" * 64}"', text)
    assert old != text
    (copy / "stages.json").write_text(old)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    run(recipe(tiny_llama, rows_file, copy))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")} == before


def test_changed_data_is_refused(done: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done, tmp_path / "out")
    changed = tmp_path / "rows.jsonl"
    changed.write_text(rows_file.read_text() + '{"question": "a", "answer": "b"}\n')
    with pytest.raises(
        loram.UserError, match=r"adapter was made .* \(dataset\.content: the content of .*rows\.jsonl is"
    ):
        run(recipe(tiny_llama, changed, copy))


def test_a_missing_stage_is_made_again_and_the_rest_kept(
    done: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(done, tmp_path / "out")
    shutil.rmtree(copy / "recovered")
    before = (copy / "adapter" / "loram_manifest.json").stat().st_mtime_ns
    run(recipe(tiny_llama, rows_file, copy))
    assert (copy / "adapter" / "loram_manifest.json").stat().st_mtime_ns == before
    weights = Path("recovered") / "adapter_model.safetensors"
    assert (copy / weights).read_bytes() == (done / weights).read_bytes()


def test_a_broken_stage_folder_is_refused(done: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done, tmp_path / "out")
    with (copy / "pruned" / "model.safetensors").open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(loram.UserError, match=r"model\.safetensors: .* the manifest says"):
        run(recipe(tiny_llama, rows_file, copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "/nowhere/model"}, "no such file or folder"),
        ({"dataset": "/nowhere/rows.jsonl"}, "no such file"),
        ({"train": {"trainer": {"max_stepz": 2}}}, "did you mean max_steps"),
        ({"train": {"trainer": {"seed": 2}}}, "recipe's own seed"),
        ({"prune": {"ratio": 0.5, "criterion": "tailor"}}, "known are taylor"),
        ({"prune": {"ratio": 0.5}}, "leave no layer of 5"),
    ],
    ids=["model", "data", "option", "seed", "criterion", "layers"],
)
def test_problems_are_found_before_anything_is_made(
    changes: dict[str, Any], message: str, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match=message):
        check(recipe(tiny_llama, rows_file, tmp_path / "out", **changes))
    with pytest.raises(loram.UserError, match=message):
        run(recipe(tiny_llama, rows_file, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_summary_says_when_nothing_was_gained(done: Path) -> None:
    from loram.run.report import RunReport

    report = RunReport.model_validate_json((done / "report.json").read_text())
    worse = report.row("base").model_copy(update={"name": "recovered", "perplexity": {"task": 1e9, "short": 1e9}})
    rows = tuple(worse if row.name == "recovered" else row for row in report.rows)
    assert "rows:" not in summary(report)  # none was cut
    assert "does not lower" in summary(report.model_copy(update={"rows": rows}))
    better = worse.model_copy(update={"perplexity": {"task": 1.0, "short": 1.0}})
    rows = tuple(better if row.name == "recovered" else row for row in report.rows)
    assert "does not" not in summary(report.model_copy(update={"rows": rows}))


def test_a_stage_finished_just_before_a_kill_is_kept(
    done: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The adapter is in place, but its cost was not written down yet: a night of training is not thrown away."""
    copy = shutil.copytree(done, tmp_path / "out")
    state = json.loads((copy / "stages.json").read_text())
    state["begun"]["adapter"] = state["stages"].pop("adapter")["settings"]
    (copy / "stages.json").write_text(json.dumps(state))
    before = (copy / "adapter" / "loram_manifest.json").stat().st_mtime_ns
    report = run(recipe(tiny_llama, rows_file, copy))
    assert (copy / "adapter" / "loram_manifest.json").stat().st_mtime_ns == before
    assert report.row("pruned + adapter").made is None
    assert json.loads((copy / "stages.json").read_text())["begun"] == {}


def test_a_folder_that_no_run_made_is_not_touched(
    done: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(done, tmp_path / "out")
    (copy / "stages.json").unlink()
    with pytest.raises(loram.UserError, match=r"pruned: exists already, but stages\.json knows nothing of it"):
        run(recipe(tiny_llama, rows_file, copy))
    assert (copy / "pruned" / "model.safetensors").is_file()


def test_fresh_starts_over_and_removes_only_what_runs_make(
    done: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(done, tmp_path / "out")
    (copy / "notes.txt").write_text("mine")
    (copy / "adapter-checkpoints").mkdir()
    run(recipe(tiny_llama, rows_file, copy, seed=7, eval_dataset=str(rows_file)), fresh=True)
    assert (copy / "notes.txt").read_text() == "mine"
    assert not (copy / "adapter-checkpoints").exists()
    assert json.loads((copy / "report.json").read_text())["recipe"]["seed"] == 7


ALIGN: dict[str, Any] = {
    "probe_steps": 1,
    "eval_steps": 2,
    "trainer": {"max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "max_length": 64},
}
PRUNE: dict[str, Any] = {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1}


def partial(out: Path, **values: Any) -> Recipe:
    return Recipe.model_validate({"output_dir": out, **values})


def test_alignment_comes_between_pruning_and_training(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    asked = recipe(tiny_llama, rows_file, tmp_path / "out", align={**ALIGN, "dataset": str(rows_file)})
    report = run(asked)
    names = ["base", "full LoRA", "pruned", "aligned", "aligned + adapter", "recovered"]
    assert [row.name for row in report.rows] == names
    assert report.row("aligned").made is not None
    assert report.row("aligned").parameters == report.row("pruned").parameters
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "aligned")
    written = (tmp_path / "out" / "report.json").read_text()
    assert run(asked).model_dump_json(indent=2) + "\n" == written  # nothing is made again
    changed = {**ALIGN, "dataset": str(rows_file), "objective": "clm"}
    with pytest.raises(loram.UserError, match=r"aligned was made with other settings .*objective: 'distill' -> 'clm'"):
        run(recipe(tiny_llama, rows_file, tmp_path / "out", align=changed))
    run(recipe(tiny_llama, rows_file, tmp_path / "out"), fresh=True)
    assert not (tmp_path / "out" / "aligned").exists()


def test_a_publisher_and_a_user(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    """Two recipes on two machines; the user's opens the full model only when everything is trained."""
    home, away = tmp_path / "publisher", tmp_path / "user"
    full = shutil.copytree(tiny_llama, home / "full")
    data = [{"path": str(rows_file), "weight": 0.5}, {"path": str(rows_file), "weight": 0.5}]
    made = run(
        partial(
            home / "out",
            model_name_or_path=str(full),
            prune=PRUNE,
            teach={"top_k": 8},
            align={**ALIGN, "dataset": data},
        )
    )
    assert [(row.name, row.perplexity, row.evaluated) for row in made.rows] == [
        ("pruned", {}, None),
        ("aligned", {}, None),
    ]
    aligned = made.row("aligned").made
    stages = json.loads((home / "out" / "stages.json").read_text())["stages"]
    assert aligned is not None
    taught = [stages[name]["cost"]["seconds"] for name in ("teacher-1", "teacher-2")]
    assert aligned.seconds == pytest.approx(stages["aligned"]["cost"]["seconds"] + sum(taught))
    assert "Nothing was trained: the recipe has no dataset. Train on" in summary(made)
    published = shutil.copytree(home / "out" / "aligned", away / "small")
    shutil.rmtree(home)

    values = {
        "model_name_or_path": str(published),
        "base_model_name_or_path": str(away / "full"),
        "dataset": str(rows_file),
        "eval_dataset": str(rows_file),
        "train": {"trainer": {"max_steps": 2, "learning_rate": 1e-2}},
    }
    with pytest.raises(loram.UserError, match="full: no such file or folder"):
        run(partial(away / "out", **values))
    assert {path.name for path in (away / "out").iterdir() if path.is_dir()} == {"adapter"}
    shutil.copytree(tiny_llama, away / "full")
    report = run(partial(away / "out", **values))
    assert [row.name for row in report.rows] == ["base", "pruned", "pruned + adapter", "recovered"]
    assert report.row("pruned").made is None
    assert report.row("recovered").perplexity != report.row("base").perplexity


def test_a_full_model_without_a_prune_section(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    values = {"dataset": str(rows_file), "eval_dataset": str(rows_file)}
    with pytest.raises(loram.UserError, match=r"prune: missing, and .* is a full model; add the section"):
        run(partial(tmp_path / "out", model_name_or_path=str(tiny_llama), **values))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("align", "message"),
    [
        ({"dataset": "/nowhere.jsonl"}, "no such file"),
        ({"teacher": "/nowhere"}, r"no teacher\.json here"),
        ({"trainer": {"learning_rte": 1}}, "did you mean learning_rate"),
        ({"trainer": {"seed": 1}}, r"align\.trainer\.seed: set the recipe's own seed"),
    ],
    ids=str,
)
def test_problems_of_alignment_are_found_before_anything_is_made(
    align: dict[str, Any], message: str, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match=message):
        run(recipe(tiny_llama, rows_file, tmp_path / "out", align=align))
    assert not (tmp_path / "out").exists()
