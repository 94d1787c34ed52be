"""A training that is stopped at any moment resumes from its newest whole checkpoint and ends with the same bytes."""

import itertools
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopped, contents, stop
from transformers import Trainer

import loram
from loram.disk.artifacts import put_in_place
from loram.trainer import checkpoints

OPTIONS: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,  # 20 rows: steps of 2, 2 and 1 batches, so an epoch is 3 steps
    "learning_rate": 5e-3,
    "logging_steps": 4,
    "save_steps": 1,
}


def train(model: Path, out: Path, rows: Path | dict[str, Any], **options: Any) -> Path:
    changed = {**OPTIONS, **options.pop("trainer", {})}
    return loram.train(model, out, data=rows, lora={"r": 2, "lora_dropout": 0.2}, trainer=changed, **options)


@pytest.fixture(scope="module")
def model(pruned_models: dict[str, Path]) -> Path:
    return pruned_models["mistral"]


@pytest.fixture(scope="module")
def undisturbed(model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = train(model, tmp_path_factory.mktemp("undisturbed") / "adapter", rows_file)
    assert [path.name for path in out.parent.iterdir()] == ["adapter"]  # the checkpoints were deleted
    return contents(out)


@pytest.fixture
def stop_in_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`stop_in_batch(n)` makes the next training stop in its n-th batch."""
    return lambda number: stop(monkeypatch, number, Stopped())


@pytest.mark.parametrize(
    ("batch", "step"),
    [(3, 1), (4, 1), (6, 3), (9, 4)],
    ids=["mid-epoch", "mid-accumulation", "at an epoch's end", "in the second epoch"],
)
def test_resumed_is_the_same_as_undisturbed(
    batch: int,
    step: int,
    model: Path,
    rows_file: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    stop_in_batch: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Adapter, logged losses and manifest are the same, even with dropout and a log that spans a checkpoint."""
    stop_in_batch(batch)
    with pytest.raises(Stopped):
        train(model, tmp_path / "adapter", rows_file)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter-checkpoints"]
    assert (tmp_path / "adapter-checkpoints" / f"checkpoint-{step}" / "loram_manifest.json").is_file()
    monkeypatch.undo()
    with caplog.at_level(logging.INFO, "loram"):
        train(model, tmp_path / "adapter", rows_file)
    assert f"going on from checkpoint-{step}" in caplog.text
    assert contents(tmp_path / "adapter") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_newest_whole_checkpoint_is_used(
    model: Path,
    rows_file: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    stop_in_batch: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop_in_batch(8)
    with pytest.raises(Stopped):
        train(model, tmp_path / "adapter", rows_file)
    folder = tmp_path / "adapter-checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-4"]  # save_total_limit
    shutil.copytree(folder / "checkpoint-4", folder / ".partial" / "checkpoint-5")
    optimizer = folder / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-9] + b"\0" * 9)
    monkeypatch.undo()
    with caplog.at_level(logging.INFO, "loram"):
        train(model, tmp_path / "adapter", rows_file)
    assert "checkpoint-4 is not whole" in caplog.text
    assert "going on from checkpoint-3" in caplog.text
    assert contents(tmp_path / "adapter") == undisturbed


@pytest.fixture(scope="module")
def stopped(model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of a training that a full disk has stopped."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, 4, OSError(28, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            train(model, root / "adapter", rows_file)
    return root


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {"learning_rate": 1e-3}}, r"trainer\.learning_rate: 0\.005 -> 0\.001"),
        ({"seed": 7}, r"trainer\.seed: 42 -> 7"),
    ],
    ids=["learning rate", "seed"],
)
def test_other_settings_are_refused_with_the_difference(
    options: dict[str, Any], message: str, model: Path, rows_file: Path, stopped: Path
) -> None:
    before = contents(stopped)
    with pytest.raises(loram.UserError, match=rf"{message}.*--fresh"):
        train(model, stopped / "adapter", rows_file, **options)
    assert contents(stopped) == before


def test_other_rows_are_refused_and_fresh_starts_over(
    model: Path, rows_file: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)
    changed = rows_file.with_name("changed.jsonl")
    changed.write_text(rows_file.read_text().replace("What is 1 plus 1?", "What is 1 plus 2?"))
    original, text = rows_file.read_text(), changed.read_text()
    try:
        rows_file.write_text(text)  # the same name with other content
        with pytest.raises(loram.UserError, match=r"the rows of .*rows\.jsonl are not those that it began with"):
            train(model, copy / "adapter", rows_file)
        with caplog.at_level(logging.INFO, "loram"):
            train(model, copy / "adapter", rows_file, fresh=True)
    finally:
        rows_file.write_text(original)
    assert "going on" not in caplog.text
    assert [path.name for path in copy.iterdir()] == ["adapter"]


def test_what_cannot_change_the_result_may_change(
    model: Path, rows_file: Path, stopped: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    copy, moved = tmp_path / "copy", tmp_path / "moved.jsonl"
    shutil.copytree(stopped, copy)
    shutil.copy(rows_file, moved)
    other = {"save_steps": 3, "save_total_limit": 1, "logging_steps": 1, "dataloader_num_workers": 1, "run_name": "b"}
    train(model, copy / "adapter", moved, trainer=other)
    found = contents(copy / "adapter")
    assert found["adapter_model.safetensors"] == undisturbed["adapter_model.safetensors"]
    settings = json.loads(found["loram_manifest.json"])["settings"]
    assert settings["data"]["path"] == str(moved)
    assert settings["trainer"].items() >= other.items()
    assert [json.loads(line)["step"] for line in found["training_log.jsonl"].splitlines()] == [2, 3, 4, 5, 6]


def test_rows_that_are_read_in_another_way_are_refused_with_the_setting(
    model: Path, rows_file: Path, stopped: Path
) -> None:
    with pytest.raises(loram.UserError, match=r"rows\.jsonl are not those that .* \(data\.max_samples: None -> 9\)"):
        train(model, stopped / "adapter", {"path": str(rows_file), "max_samples": 9})


def test_the_date_in_a_chat_template_is_that_of_the_first_start(
    model: Path, rows_file: Path, tmp_path: Path, stop_in_batch: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = tmp_path / "model"
    shutil.copytree(model, dated)
    template = dated / "chat_template.jinja"
    template.write_text("{{ strftime_now('%f') }}" + template.read_text())  # microseconds
    (dated / "loram_manifest.json").unlink()
    stop_in_batch(4)
    with pytest.raises(Stopped):
        train(dated, tmp_path / "adapter", rows_file)
    monkeypatch.undo()
    train(dated, tmp_path / "adapter", rows_file)
    with pytest.raises(loram.UserError, match="exists already"):
        train(dated, tmp_path / "adapter", rows_file)


def test_another_model_is_refused(
    model: Path, pruned_models: dict[str, Path], rows_file: Path, stopped: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match="is not the full model that it began with"):
        train(pruned_models["llama"], stopped / "adapter", rows_file)


def test_checkpoints_that_were_asked_for_stay(model: Path, rows_file: Path, tmp_path: Path) -> None:
    asked = {"save_strategy": "epoch", "save_total_limit": None}
    train(model, tmp_path / "adapter", rows_file, trainer=asked)
    found = {path.name for path in (tmp_path / "adapter-checkpoints").iterdir()}
    assert found == {"checkpoint-3", "checkpoint-6"}
    assert loram.evaluate(model, adapter=tmp_path / "adapter-checkpoints" / "checkpoint-3", data=rows_file).loss > 0


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"target_modules": ["lm_head", "v_proj"]}},
        {"load_in_4bit": True, "trainer": {"optim": "adamw_8bit"}},
        {"lora_dtype": "bfloat16"},
        {"trainer": {"packing": True, "max_length": 100, "per_device_train_batch_size": 1}},
    ],
    ids=["lm_head", "4 bits", "bfloat16", "packed"],
)
def test_every_kind_of_training_resumes(
    options: dict[str, Any],
    pruned_models: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
    stop_in_batch: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(out: str) -> Path:
        given = {**options, "trainer": {**OPTIONS, **options.get("trainer", {})}}
        return loram.train(pruned_models["llama"], tmp_path / out, data=rows_file, **given)

    expected = contents(train("a"))
    stop_in_batch(5)
    with pytest.raises(Stopped):
        train("b")
    saved = tmp_path / "b-checkpoints" / "checkpoint-2" / "adapter_model.safetensors"
    assert saved.stat().st_size < 2 * len(expected["adapter_model.safetensors"])  # it has no weight of the base
    monkeypatch.undo()
    assert contents(train("b")) == expected


@pytest.mark.parametrize("where", ["frozen weight", "gradient", "weight"])
def test_what_is_not_finite_stops_at_once_and_is_named(
    where: str, model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last good checkpoint stays, and no value that is not finite is ever saved."""
    count, step = itertools.count(1), Trainer.training_step
    bad = "model.layers.1.mlp.up_proj"

    def training_step(self: Trainer, network: Any, *args: Any, **options: Any) -> Any:
        module = network.get_submodule(f"base_model.model.{bad}")
        stop = next(count) == 6
        with torch.no_grad():
            if stop and where == "frozen weight":
                module.base_layer.weight[0, 0] = torch.nan
        if stop and where == "gradient":
            module.lora_A["default"].weight.register_hook(lambda gradient: gradient + torch.inf)
        loss = step(self, network, *args, **options)
        if stop and where == "weight":
            self.optimizer.optimizer.register_step_post_hook(
                lambda *rest: module.lora_B["default"].weight.data[0, 0].fill_(torch.nan)
            )
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    found = {
        "frozen weight": rf"step 4: the loss is nan; {bad}\.weight has values that are not finite",
        "gradient": rf"step 4: the gradient of {bad}\.lora_A\.weight is not finite",
        "weight": rf"step 4: the value of {bad}\.lora_B\.weight is not finite",
    }[where]
    with pytest.raises(FloatingPointError, match=found):
        train(model, tmp_path / "adapter", rows_file)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter-checkpoints"]
    assert sorted(path.name for path in (tmp_path / "adapter-checkpoints").iterdir()) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    for path in (tmp_path / "adapter-checkpoints").iterdir():
        checkpoints.verify(path)


def test_the_log_has_every_loss_once(undisturbed: dict[str, bytes]) -> None:
    entries = [json.loads(line) for line in undisturbed["training_log.jsonl"].splitlines()]
    assert [entry["step"] for entry in entries] == [4, 6]
    assert all(entry["loss"] > 0 for entry in entries)


class Malicious:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_in_a_checkpoint_is_not_run(model: Path, rows_file: Path, stopped: Path, tmp_path: Path) -> None:
    """This holds even for a pickle whose manifest was forged as well."""
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)
    newest = max((copy / "adapter-checkpoints").iterdir())
    manifest = checkpoints.verify(newest)[str(newest)]
    torch.save(Malicious(tmp_path / "harm"), newest / "optimizer.pt")
    (newest / "loram_manifest.json").unlink()
    forged = shutil.move(newest, tmp_path / "forged")
    put_in_place(
        forged, newest, kind="checkpoint", made_from=dict(manifest.made_from), settings=dict(manifest.settings)
    )
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train(model, copy / "adapter", rows_file)
    assert not (tmp_path / "harm").exists()
