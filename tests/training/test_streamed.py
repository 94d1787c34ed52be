"""The streamed engine trains what the resident one trains, and the model is never in memory."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, random_adapter
from helpers import Stopped, contents, stop
from transformers import TrainerCallback

import loram
from loram.base.errors import UserError
from loram.compute.loading import load_model
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model

# Steps of two micro-batches, the last of an epoch (of 20 rows) is shorter.
STEPS: dict[str, Any] = {
    "max_steps": 10,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-4,  # then Adam's steps depend on the size of a gradient, and not on the noise of one near 0
    "logging_steps": 1,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
}
ODD = ("granite", "gemma4_text", "lfm2", "qwen3_moe")


def train(model: Path, out: Path, rows: Path, engine: str, **options: Any) -> Path:
    lora = {"r": 3, "lora_dropout": 0.0, **options.pop("lora", {})}
    lora = {"lora_dropout": 0.0} if "adapter" in options else lora
    trainer = {**STEPS, **options.pop("trainer", {})}
    return loram.train(model, out, data=rows, engine=engine, lora=lora, trainer=trainer, **options)


def both(model: Path, root: Path, rows: Path, **options: Any) -> None:
    """Train by both engines, and compare adapters and losses."""
    resident, streamed = (train(model, root / engine, rows, engine, **options) for engine in ("resident", "streamed"))
    expected, tensors = Adapter.load(resident).tensors, Adapter.load(streamed).tensors
    assert tensors.keys() == expected.keys()
    for part in ("lora_A", "lora_B"):
        names = [name for name in expected if part in name]
        trained, wanted = (torch.cat([of[name].flatten() for name in names]) for of in (tensors, expected))
        assert (trained - wanted).norm() <= 1e-5 * wanted.norm(), part
    logs = [(folder / "training_log.jsonl").read_text().splitlines() for folder in (resident, streamed)]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("family", [*FAMILIES, *ODD])
def test_ten_steps_end_with_the_adapter_of_the_resident_engine(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    targets = open_model(tiny_models[family]).architecture.default_targets
    both(tiny_models[family], tmp_path, rows_file, lora={"target_modules": [*targets, "lm_head"]})


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rslora"},
        {"method": "lora-fa"},
        {"method": "lora-sp", "lora": {"r": 4}},
        {"trainer": {"packing": True, "max_length": 60, "per_device_train_batch_size": 1}},
        {"trainer": {"padding_free": True}},
        {"trainer": {"optim": "adamw_8bit"}},
    ],
    ids=["rslora", "lora-fa", "lora-sp", "packing", "padding-free", "8-bit optimiser"],
)
def test_methods_and_packed_rows(
    options: dict[str, Any], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    options = {**options, "trainer": {**options.get("trainer", {}), "max_steps": 3}}
    both(pruned_models["llama"], tmp_path, rows_file, **options)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_from_4_bits_it_trains_what_qlora_trains(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    model = tiny_models[family]
    both(model, tmp_path, rows_file, load_in_4bit=True, ram_budget=None)
    if family == "llama":
        packed = loram.quantize(model, tmp_path / "nf4")
        kept = train(packed, tmp_path / "kept", rows_file, "streamed", ram_budget="1MiB")
        expected, tensors = Adapter.load(tmp_path / "streamed").tensors, Adapter.load(kept).tensors
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_either_engine_goes_on_with_an_adapter(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    start = random_adapter(load_model(open_model(tiny_llama)), tmp_path / "start", lora_alpha=3)
    both(tiny_llama, tmp_path, rows_file, adapter=start, trainer={"max_steps": 3, "lr_scheduler_type": "constant"})
    before, after = Adapter.load(start), Adapter.load(tmp_path / "streamed")
    moved = [(after.tensors[name] - tensor).abs().max().item() for name, tensor in before.tensors.items()]
    assert 0 < min(moved) <= max(moved) < 4e-3  # Adam's steps are about the learning rate
    assert after.scaling("model.layers.0.mlp.up_proj") == 1


class Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps the names of a model's parameters."""

    def on_train_begin(self, *args: Any, model: Any = None, **rest: Any) -> None:
        """Keep them."""
        self.names = [name for name, _ in model.named_parameters()]


def test_resumed_is_the_same_as_undisturbed_and_only_factors_are_in_memory(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"trainer": {"max_steps": 5, "save_steps": 2}}
    watch = Watch()
    expected = contents(train(tiny_llama, tmp_path / "a", rows_file, "streamed", callbacks=[watch], **options))
    assert watch.names
    assert all(".lora_" in name for name in watch.names)
    stop(monkeypatch, 7, Stopped())  # in step 4: two micro-batches make a step
    with pytest.raises(Stopped):
        train(tiny_llama, tmp_path / "b", rows_file, "streamed", **options)
    assert (tmp_path / "b-checkpoints" / "checkpoint-2").is_dir()
    monkeypatch.undo()
    assert contents(train(tiny_llama, tmp_path / "b", rows_file, "streamed", **options)) == expected


@pytest.mark.parametrize(("budget", "times"), [(None, 4), ("1MiB", 1)])
def test_what_fits_into_ram_is_read_once(
    budget: str | None,
    times: int,
    tiny_llama: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, count = Checkpoint.tensor, Counter[str]()

    def counted(self: Checkpoint, name: str, *rows: Any) -> torch.Tensor:
        count[name] += not any(rows)
        return read(self, name, *rows)

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    train(tiny_llama, tmp_path / "a", rows_file, "streamed", ram_budget=budget, trainer={"max_steps": 2})
    assert {name: n for name, n in count.items() if n and ".layers." in name} == {
        name: times for name in Checkpoint(tiny_llama).names() if ".layers." in name
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dora"}, "cannot train by method dora; take lora, rslora, lora-fa, lora-sp"),
        ({"method": "full", "lora": {}}, "cannot train by method full"),
        ({"lora": {"lora_dropout": 0.1}}, "leave lora_dropout out"),
        ({"lora": {"init_lora_weights": "eva"}}, "init_lora_weights eva needs the model in memory"),
        ({"trainer": {"neftune_noise_alpha": 5}}, "neftune_noise_alpha has no place with engine streamed"),
        ({"engine": "resident", "ram_budget": "1GiB"}, "ram_budget: is for what is streamed"),
        ({"ram_budget": "much"}, "ram_budget 'much': should be a number with a unit"),
        ({"engine": "disk"}, "known are resident, streamed"),
        ({"adapter": "ADAPTER", "lora": {"r": 4}}, "r is that of the adapter"),
        ({"adapter": "ADAPTER", "method": "rslora"}, "methods lora, lora-fa, dpo, orpo, kto go on with an adapter"),
    ],
)
def test_what_it_cannot_train_is_refused_with_the_remedy(
    options: dict[str, Any], message: str, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        loram.train(tiny_llama, tmp_path / "out", data=rows_file, **{"engine": "streamed", **options})
    assert not list(tmp_path.iterdir())


def test_anchors_need_a_model_in_memory(pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"anchor_steps: .* engine streamed has none there"):
        loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, engine="streamed", anchor_steps=2)
