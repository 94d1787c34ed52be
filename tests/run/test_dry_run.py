"""A dry run: what it says agrees with the run itself, and it reads no weight and leaves nothing."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILIES, make_model
from rich.console import Console
from safetensors.torch import load_file

import loram
from loram import cli
from loram.data import stream
from loram.data.spec import as_specs
from loram.disk.tensorfile import TensorFile
from loram.planner.memory import TrainingMemory
from loram.run.dry_run import DataCounts, DryRun, dry_run
from loram.run.recipe import Recipe
from loram.run.show import show

PROMPT = "<|im_start|>user\nWhat is 0 plus 0?<|im_end|>\n<|im_start|>assistant\n"


def recipe(model: Path, rows: Path, out: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model_name_or_path": str(model),
        "output_dir": out,
        "dataset": str(rows),
        "eval_dataset": {"task": {"path": str(rows), "max_samples": 5}},
        "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
        "train": {"lora": {"r": 4}, "trainer": {"max_steps": 1}},
    }
    return Recipe.model_validate({**values, **changes})


def shown(found: DryRun, **options: Any) -> str:
    printed = io.StringIO()
    show(found, Console(file=printed, width=120, **options))
    return printed.getvalue()


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any weight fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorFile, "read", refuse)
    monkeypatch.setattr(TensorFile, "blocks", refuse)


@pytest.mark.parametrize("bias_compensation", [False, True])
def test_it_counts_what_the_stages_make(
    bias_compensation: bool, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    base = tiny_models["qwen3"]
    cut = {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1}
    cut["bias_compensation"] = bias_compensation
    train = {"lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]}, "trainer": {"max_steps": 1}}
    found = dry_run(
        recipe(base, rows_file, tmp_path / "out", prune=cut, train=train, evaluate={"full_lora": True}, device="cpu")
    )
    plan = loram.prune(base, tmp_path / "pruned", **cut)
    assert (found.parameters, found.pruned_parameters) == plan.parameters()
    loram.train(tmp_path / "pruned", tmp_path / "adapter", data=rows_file, **train)
    adapter = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
    training = found.training["pruned"]
    assert (training.parameters, training.adapter_parameters) == (found.pruned_parameters, adapter)
    planned = loram.estimate(
        base,
        ratio=0.5,
        keep_first=1,
        keep_last=1,
        lora_r=4,
        lora_target_modules=["q_proj", "down_proj"],
        max_length=counts_of(found).longest,
        device="cpu",
    )
    if not bias_compensation:  # of which the estimate knows nothing
        assert training.memory == planned.training
    assert found.training["full"].parameters == found.parameters
    settings = json.loads((tmp_path / "adapter" / "loram_manifest.json").read_text())["settings"]
    counts = counts_of(found)
    assert [counts.rows, counts.rows_truncated, counts.rows_skipped] == [
        settings[key] for key in ("rows", "rows_truncated", "rows_skipped")
    ]
    report = loram.evaluate(base, data=rows_file, max_samples=5)
    assert (found.eval_dataset["task"].rows, found.eval_dataset["task"].tokens_in_loss) == (5, report.tokens)
    assert (found.calibration is not None) == bias_compensation


def counts_of(found: DryRun) -> DataCounts:
    [counts] = found.dataset.values()
    return counts


def test_memory_follows_the_recipe(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    def memory(**train: Any) -> TrainingMemory | None:
        return (
            dry_run(recipe(tiny_llama, rows_file, tmp_path / "out", train=train, device="cpu"))
            .training["pruned"]
            .memory
        )

    anchored = memory(anchor_steps=100)
    assert anchored is not None
    assert anchored.moment == "measuring the full model's course"
    plain, packed = memory(), memory(load_in_4bit=True, trainer={"optim": "adamw_8bit"})
    assert plain is not None
    assert packed is not None
    assert packed.weights < plain.weights / 2
    assert packed.constants > 0 == plain.constants
    longer = memory(trainer={"per_device_train_batch_size": 8})
    assert longer is not None
    assert longer.activations > 1.5 * plain.activations
    assert memory(trainer={"optim": "adafactor"}) is None
    found = dry_run(recipe(tiny_llama, rows_file, tmp_path / "out", train={"trainer": {"optim": "adafactor"}}))
    assert "cannot be estimated: optim" in shown(found)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_as_the_estimate_does(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    found = dry_run(recipe(tiny_models[family], rows_file, tmp_path / "out"))
    expected = loram.estimate(tiny_models[family], ratio=0.5, keep_first=1, keep_last=1)
    assert (found.parameters, found.pruned_parameters) == (expected.parameters, expected.pruned_parameters)
    assert found.training["pruned"].parameters == expected.pruned_parameters  # of the model as transformers builds it


@pytest.mark.usefixtures("no_weights")
def test_it_reads_no_weight_and_leaves_nothing(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    taylor = {"ratio": 0.5, "criterion": "taylor", "keep_first": 1, "keep_last": 1, "calibration": str(rows_file)}
    for refit, rows in ((True, 20), (False, 10)):  # the refit reads all, and scoring the first of them
        counts = dry_run(recipe(tiny_llama, rows_file, tmp_path / "out", prune={**taylor, "refit": refit}))
        assert counts.calibration is not None
        assert counts.calibration.rows == rows
        assert counts.refit is None
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("change", [{"calibration": "rows"}, {"refit": False}, {"criterion": "magnitude"}, {}], ids=str)
def test_a_refit_reads_the_training_rows_where_no_text_is_named(
    change: dict[str, Any], tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    named = {**change, "calibration": str(rows_file)} if "calibration" in change else change
    prune = {"ratio": 0.5, "criterion": "taylor", "keep_first": 1, "keep_last": 1, **named}
    chosen = recipe(tiny_llama, rows_file, tmp_path / "out", prune=prune)
    counts = dry_run(chosen)
    assert (counts.refit is None) == bool(change)
    if counts.refit is not None and counts.calibration is not None:
        assert (counts.refit.rows, counts.calibration.rows) == (20, 10)  # of ours, and built-in passages
        assert "refit" in shown(counts)
    own = recipe(tiny_llama, rows_file, tmp_path / "out", prune={**prune, "refit_dataset": "other.jsonl"})
    if named.get("refit") is not False and prune["criterion"] != "magnitude":
        assert own.pruning is not None
        assert own.pruning.refit_dataset is not None
        assert own.pruning.refit_dataset.path.endswith("other.jsonl")


def test_the_loss_mask_is_visible_without_colour(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    found = dry_run(recipe(tiny_llama, rows_file, tmp_path / "out"))
    assert [(span.text, span.in_loss) for span in found.examples[0]] == [
        (PROMPT, False),
        ("0 plus 0 is 0.<|im_end|>\n", True),
    ]
    text = shown(found)
    assert f"{PROMPT}⟦0 plus 0 is 0.<|im_end|>\n⟧" in text
    assert "\x1b" not in text
    assert "kept from forward for backward" in text
    assert "Nothing was written" in text
    assert "\x1b[1;32m⟦0 plus" in shown(found, force_terminal=True, color_system="standard")


def test_any_row_is_shown_with_the_columns_that_are_used(
    tiny_llama: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"ask": "a", "answer": "b", "id": 1}, {"ask": "a", "answer": ""}, {"ask": "three?", "answer": "3"}]
    data = {"path": str(jsonl(*rows)), "columns": {"question": "ask"}}
    values = recipe(tiny_llama, jsonl({"text": "one plus"}, name="text.jsonl"), tmp_path / "out", dataset=data)
    found = dry_run(values, show_row=3)
    assert found.example_rows == (3,)
    assert [span.text for span in found.examples[0] if span.in_loss] == ["3<|im_end|>\n"]
    text = shown(found)
    assert "--- row 3" in text
    assert "training: ask as question, answer, written through the chat template; not used: id (1 rows)" in text
    assert "evaluation: task: text, written as plain text" in text
    assert (counts_of(found).rows, counts_of(found).rows_skipped) == (2, 1)
    for row in (2, 4):
        with pytest.raises(loram.UserError, match=f"row {row} is not used"):
            dry_run(values, show_row=row)


def test_data_sets_are_counted_one_by_one_and_streams_by_their_first_rows(
    tiny_llama: Path, rows_file: Path, jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FIRST_ROWS", 7)
    other = jsonl(*({"text": f"number {n}"} for n in range(9)))
    data = [{"path": str(rows_file), "weight": 1}, {"path": str(other), "weight": 3}]
    values = recipe(tiny_llama, rows_file, tmp_path / "out", dataset=data)
    found = dry_run(values)
    assert [counts.rows for counts in found.dataset.values()] == [20, 9]
    assert f"training: {rows_file}" in "".join(name for name, _ in found.data_sets())
    streamed = dry_run(values.model_copy(update={"dataset": as_specs([{**one, "streaming": True} for one in data])}))
    assert [(counts.rows, counts.streamed) for counts in streamed.dataset.values()] == [(7, True)] * 2
    assert "streamed, so only the first rows are counted" in shown(streamed)
    memory = [each.training["pruned"].memory for each in (found, streamed)]
    assert all(memory)
    assert memory[0] != memory[1]  # how long the longest row of a stream is, nobody knows
    assert not (tmp_path / "out").exists()


def test_a_text_begins_with_a_token_that_is_not_predicted(
    tiny_llama: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = jsonl({"text": "one plus two"})
    found = dry_run(recipe(tiny_llama, path, tmp_path / "out", eval_dataset=str(path)))
    first, rest = found.examples[0]
    assert (first.in_loss, rest.in_loss) == (False, True)
    assert first.text + rest.text == "one plus two<|im_end|>"
    assert counts_of(found).tokens_in_loss == counts_of(found).tokens - 1


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"lora": {"r": 0}}}, "r"),
        ({"train": {"trainer": {"lr_scheduler_type": "cosinus"}}}, "cosinus"),
        ({"train": {"trainer": {"max_length": 2}}}, "no token of any row is in the loss"),
        ({"evaluate": {"max_length": 2}}, "no token of any row is in the loss"),
        ({"prune": {"ratio": 0.5, "keep_first": 1, "keep_last": 1, "calibration": "none.jsonl"}}, "no such file"),
        ({"device": "cuda:99"}, "cannot be used"),
        ({"train": {"lora": {"arrow_config": {}}}}, "arrow_config cannot be used"),
        ({"train": {"lora": {"rank_pattern": {"q_prj": 4}}}}, "rank_pattern keys did not match any targeted module"),
        ({"train": {"trainer": {"eval_strategy": "steps"}}}, "eval_strategy cannot be set"),
        ({"train": {"trainer": {"optim_args": "foo"}}}, "unpack"),
        ({"align": {"trainer": {"adam_beta1": 2}}}, "Invalid beta parameter"),
    ],
    ids=[
        *("rank", "schedule", "length", "evaluation", "calibration", "device"),
        *("lora", "pattern", "trainer", "optimiser", "alignment"),
    ],
)
def test_problems_are_found_before_a_weight_is_read(
    changes: dict[str, Any], message: str, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match=message):
        dry_run(recipe(tiny_llama, rows_file, tmp_path / "out", **changes))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_does_not_fit_is_found(tokenizer: Any, rows_file: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", tokenizer, vocab_size=tokenizer.vocab_size - 1)
    with pytest.raises(loram.UserError, match="it does not fit the model"):
        dry_run(recipe(model, rows_file, tmp_path / "out"))


def test_the_command_prints_one_json_object_or_text(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(tiny_llama, rows_file, tmp_path / "out").model_dump_json())
    assert cli._main(["run", str(path), "--dry-run", "--json"]) == 0
    assert DryRun.model_validate_json(capfd.readouterr().out).model == str(tiny_llama)
    assert cli._main(["run", str(path), "--dry-run"]) == 0
    assert "⟦0 plus 0 is 0." in capfd.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_parts_of_a_run(tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    """A publisher's recipe trains no adapter; a user's begins with a pruned folder."""
    align = {"dataset": [str(rows_file)], "trainer": {"max_length": 25}}
    found = dry_run(recipe(tiny_llama, rows_file, tmp_path / "out", align=align))
    counts = found.align[str(rows_file)]
    assert found.dataset.keys() == {str(rows_file)}
    assert (counts.longest, counts.rows_truncated) == (25, 20)
    assert f"alignment: {rows_file.name}" in shown(found).replace(str(rows_file.parent) + "/", "")
    values = {"output_dir": tmp_path / "out", "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1}}
    publisher = Recipe.model_validate({**values, "model_name_or_path": str(tiny_llama), "align": {}})
    found = dry_run(publisher)
    assert (found.training, found.dataset, found.examples) == ({}, {}, ())
    assert "Nothing was written" in shown(found)
    small = pruned_models["llama"]
    rows = {"dataset": str(rows_file), "eval_dataset": str(rows_file)}
    found = dry_run(Recipe.model_validate({"output_dir": tmp_path, "model_name_or_path": str(small), **rows}))
    assert found.training["pruned"].parameters == found.pruned_parameters
    assert (found.parameters, found.pruned_parameters) == loram.PruningPlan.load(small).parameters()
