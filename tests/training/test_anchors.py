"""Anchored training: with the adapter of the last measurement, the pruned model predicts the same as the full one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, HYBRIDS, make_model, targets_of
from helpers import Live, Stopped, contents, stop
from peft import LoraConfig, PeftModel, get_peft_model

import loram
from loram.base.errors import UserError
from loram.compute.loading import load_model, load_pruned
from loram.compute.loss import use_chunked_loss_
from loram.disk.opening import open_model
from loram.model.plan import PruningPlan
from loram.model.resize import narrow
from loram.planner.memory import training_memory
from loram.planner.settings import make_settings
from loram.planner.shapes import Model
from loram.pruning.options import PruneOptions
from loram.training.anchors import Anchors, Course

ROWS = [[5, 9, 40, 7, 77, 30, 8], [6, 3, 12], [90, 91, 4, 4, 17]]


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def adapted(model: Any, *, random: bool = False) -> Any:
    torch.manual_seed(1)
    targets = targets_of(model.config.model_type)
    options = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=not random)
    return get_peft_model(model, options)


def course(folder: Path, **options: Any) -> Course:
    plan = PruningPlan.load(folder)
    cpu = torch.device("cpu")
    return Course(base=open_model(plan.base.name), plan=plan, steps=1, device=cpu, dtype=torch.float32, **options)


def both(folder: Path, tmp_path: Path, *, random: bool) -> tuple[Any, Any]:
    """Return the pruned model in `folder` with an adapter, and the full model with the recovered adapter."""
    small = adapted(load_pruned(folder), random=random)
    small.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    PruningPlan.load(folder).save(tmp_path / "adapter")
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    full: Any = load_model(open_model(PruningPlan.load(folder).base.name))
    full = PeftModel.from_pretrained(full, tmp_path / "recovered", is_trainable=True).eval()
    for model in (small, full):
        use_chunked_loss_(model.get_base_model())
    return small, full


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("random", [False, True], ids=["at B = 0", "with an adapter"])
@torch.no_grad()
def test_anchored_is_the_full_model_with_the_recovered_adapter(
    family: str, random: bool, pruned_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = pruned_models[family]
    small, full = both(folder, tmp_path, random=random)
    anchors, given = Anchors(course(folder), small), [batch(ROWS[:2]), batch(ROWS[2:])]
    alone = [small(**part).loss for part in given]
    for part, rows, before in zip(given, anchors.measure_(given), alone, strict=True):
        anchors.use_(rows)
        expected = full(**part).loss
        torch.testing.assert_close(small(**part).loss, expected, rtol=1e-5, atol=1e-5)
        assert (before - expected).abs() > 1e-3


def check_anchored_gradients(folder: Path, tmp_path: Path, *, checkpointing: bool) -> None:
    """Compare losses and gradients of the factors; the full model's are narrowed to the shapes of the pruned one."""
    small, full = both(folder, tmp_path, random=True)
    if checkpointing:
        small.get_base_model().activation_checkpointing_enable()
        small.enable_input_require_grads()
        small.train()
    plan, given = PruningPlan.load(folder), [batch(ROWS[:2]), batch(ROWS[2:])]
    anchors = Anchors(course(folder, gradients=True), small)
    for part, rows in zip(given, anchors.measure_(given), strict=True):
        count = 5
        anchors.use_(rows, 1 / count)
        losses: list[torch.Tensor] = []
        for model in (small, full):
            model.zero_grad()
            losses.append(model(**part, num_items_in_batch=count).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        expected = dict(full.named_parameters())
        for name, parameter in small.named_parameters():
            if parameter.grad is None:
                continue
            wanted = narrow(name.replace(".default", ""), expected[name].grad, plan)
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


# EXAONE's attention reads the hidden states themselves; Cohere's attention and MLP read the same normed ones
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS, "exaone4", "cohere2", "gemma4_text"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_anchored_gradients_are_the_full_models(
    checkpointing: bool, family: str, pruned_models: dict[str, Path], tmp_path: Path
) -> None:
    check_anchored_gradients(pruned_models[family], tmp_path, checkpointing=checkpointing)


@pytest.mark.parametrize("options", [{"drop_layers": 2}, {"drop_layers": 1, "ratio": 0.5}], ids=["alone", "mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropped_layers_are_made_up_for_too(
    checkpointing: bool, options: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    loram.prune(tiny_llama, tmp_path / "pruned", criterion="random", keep_first=1, keep_last=1, **options)
    check_anchored_gradients(tmp_path / "pruned", tmp_path, checkpointing=checkpointing)


def nothing_lost(folder: Path, tokenizer: Any) -> Path:
    """A model from which pruning only removes zeros."""
    base = make_model(folder, "llama", tokenizer)
    model: Any = load_model(open_model(base))
    with torch.no_grad():
        for layer in model.model.layers[1:-1]:
            half = layer.mlp.intermediate_size // 2 if hasattr(layer.mlp, "intermediate_size") else None
            half = half or layer.mlp.gate_proj.out_features // 2
            layer.mlp.gate_proj.weight[half:] = 0
            layer.mlp.up_proj.weight[half:] = 0
            layer.mlp.down_proj.weight[:, half:] = 0
            queries, keys = layer.self_attn.q_proj.out_features // 2, layer.self_attn.k_proj.out_features // 2
            for linear, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                getattr(layer.self_attn, linear).weight[rows:] = 0
            layer.self_attn.o_proj.weight[:, queries:] = 0
    model.save_pretrained(base)
    return base


def test_where_nothing_is_left_out_anchors_change_nothing(tokenizer: Any, rows_file: Path, tmp_path: Path) -> None:
    """Rows come in the same order as without anchors, with accumulation, two epochs and a short last step."""
    base = nothing_lost(tmp_path / "base", tokenizer)
    loram.prune(base, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    trainer = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    adapters: dict[int, Any] = {}
    for options in ({}, {"anchor_steps": 1}, {"anchor_steps": 2, "anchor_gradients": False}, {"anchor_steps": 100}):
        out = tmp_path / f"adapter-{len(adapters)}"
        lora = {"r": 2, "lora_dropout": 0.0}
        loram.train(tmp_path / "pruned", out, data=rows_file, lora=lora, trainer=trainer, **options)
        adapters[len(adapters)] = loram.disk.adapter.Adapter.load(out)
    for number in (1, 2, 3):
        for name, tensor in adapters[0].tensors.items():
            torch.testing.assert_close(adapters[number].tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_4_bits_are_made_up_for_too(pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    trainer = {"max_steps": 3, "learning_rate": 1e-2}
    for steps in (0, 2):
        loram.train(
            pruned_models["llama"],
            tmp_path / f"adapter-{steps}",
            data=rows_file,
            trainer=trainer,
            load_in_4bit=True,
            anchor_steps=steps,
        )
    plain, anchored = ((tmp_path / f"adapter-{steps}" / "training_log.jsonl").read_text() for steps in (0, 2))
    assert plain != anchored


def test_with_checkpointing_it_is_the_same(pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    adapters = []
    for checkpointing in (False, True):
        out = tmp_path / f"adapter-{checkpointing}"
        trainer = {"max_steps": 3, "learning_rate": 1e-2, "gradient_checkpointing": checkpointing}
        loram.train(pruned_models["qwen3"], out, data=rows_file, trainer=trainer, anchor_steps=2)
        adapters.append(loram.disk.adapter.Adapter.load(out).tensors)
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_anchored_is_refused(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="full model is on its own course"):
        loram.train(tiny_llama, tmp_path / "out", data=rows_file, anchor_steps=2)
    for trainer in ({"packing": True}, {"padding_free": True}):
        with pytest.raises(UserError, match="anchor_steps: measures each row by itself"):
            loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, anchor_steps=2, trainer=trainer)
    with pytest.raises(UserError, match="--base"):
        loram.train(
            pruned_models["llama"], tmp_path / "out", data=rows_file, anchor_steps=2, base=pruned_models["llama"]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [3, 7, 9], ids=["before any checkpoint", "mid-round", "in the second epoch"])
def test_resumed_is_the_same_as_undisturbed(
    number: int, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    def train(out: Path) -> dict[str, bytes]:
        trainer = {
            "num_train_epochs": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "save_steps": 1,
            "logging_steps": 1,
        }
        loram.train(pruned_models["llama"], out, data=rows_file, trainer=trainer, lora={"r": 2}, anchor_steps=2)
        return contents(out)

    wanted = train(tmp_path / "undisturbed" / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, number, Stopped())
        with pytest.raises(Stopped):
            train(tmp_path / "stopped" / "adapter")
    assert train(tmp_path / "stopped" / "adapter") == wanted


@pytest.mark.parametrize("gradients", [True, False])
def test_the_estimate_covers_a_measurement(gradients: bool, tokenizer: Any, tmp_path: Path) -> None:
    """The planner counts all tensors that are alive during a measurement, and rounds up."""
    base = make_model(
        tmp_path / "base", "llama", tokenizer, hidden_size=128, intermediate_size=340, num_hidden_layers=4
    )
    loram.prune(base, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    small = adapted(load_pruned(tmp_path / "pruned"))
    live = Live()
    for tensor in (*small.parameters(), *small.buffers()):
        live.add(tensor)
    anchors = Anchors(course(tmp_path / "pruned", gradients=gradients), small)
    with live:
        anchors.measure_([batch([[7] * 200]) for _ in range(8)])
    config = json.loads((base / "config.json").read_text())
    pruning = PruneOptions(ratio=0.5, keep_first=1, keep_last=1).resolved()
    full, pruned = Model.of(config, "config"), Model.of(config, "config", pruning)
    options = {"max_length": 200, "per_device_train_batch_size": 1, "anchor_steps": 8, "anchor_gradients": gradients}
    settings = make_settings(device="cpu", lora_r=3, gradient_checkpointing=True, **options)
    found = training_memory(pruned, settings, full)
    assert found.moment == "measuring the full model's course"
    assert live.peak <= found.total - found.optimizer <= 1.5 * live.peak
