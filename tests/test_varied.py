"""Gemma 4: what its layers share, its experts beside an MLP, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ODDITIES, SIZES, VARIED, make_model, relative
from helpers import WithoutExperts, zeroed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loram
from loram.base.errors import UserError
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan

(GEMMA4,) = VARIED
CUT = {"ratio": 0.5, "criterion": "random", "keep_first": 1, "keep_last": 1}
CONFIG = {"model_type": GEMMA4, **SIZES, **ODDITIES[GEMMA4]}


def test_groups_that_later_layers_read_stay_and_others_go(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    plan = loram.prune(tiny_models[GEMMA4], tmp_path / "pruned", **CUT)
    kept = {layer: {space: len(units) for space, units in spaces.items()} for layer, spaces in plan.layers.items()}
    assert kept == {1: {"kv_groups": 1, "channels": 20}, 2: {"channels": 20}, 3: {"kv_groups": 2, "channels": 20}}
    assert plan.linear_shapes()["model.layers.1.self_attn.q_proj"] == (4 * 16, 32)
    assert plan.linear_shapes()["model.layers.2.self_attn.q_proj"] == (8 * 16, 32)
    assert plan.linear_shapes()["model.layers.4.mlp.up_proj"] == (80, 32)
    assert "model.layers.4.self_attn.k_proj" not in plan.linear_shapes()
    found = loram.estimate(CONFIG, ratio=0.5, keep_first=1, keep_last=1)
    assert [(alike.layers, alike.units) for alike in found.narrowed] == [(1, kept[1]), (1, kept[2]), (1, kept[3])]
    assert found.pruned_parameters == plan.parameters()[1]
    assert PruningPlan.load(tmp_path / "pruned") == plan


def test_keys_in_files_that_no_layer_has_are_left_alone(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The hub's files have keys and values for layers that read those of others."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_models[GEMMA4]).save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    more = {"k_proj.weight": torch.ones(32, 32), "k_norm.weight": torch.ones(16)}
    weights |= {f"model.layers.4.self_attn.{name}": tensor for name, tensor in more.items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert Checkpoint(base).fingerprint == Checkpoint(tiny_models[GEMMA4]).fingerprint
    loram.prune(base, tmp_path / "pruned", **CUT)
    loram.prune(tiny_models[GEMMA4], tmp_path / "other", **CUT)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("pruned", "other")]
    assert files[0] == files[1]


def test_experts_stand_beside_an_mlp(tokenizer: Any, tmp_path: Path) -> None:
    experts = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16}
    changes = {**experts, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}  # as its 26B-A4B
    base = make_model(tmp_path / "base", GEMMA4, tokenizer, **changes)
    plan = loram.prune(base, tmp_path / "pruned", **CUT, expert_channels_ratio=0.5)
    assert {space: len(kept) for space, kept in plan.layers[3].items()} == {
        "kv_groups": 2,
        "channels": 20,
        "experts": 3,
        "expert_channels": 24,
    }
    small, full = loram.load_pruned(tmp_path / "pruned"), zeroed(base, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters()[1]
    tokens = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode(), WithoutExperts(full, plan):
        assert relative(small.eval()(tokens).logits, full(tokens).logits) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"use_bidirectional_attention": "all"}, {}, "only models that predict the next token"),
        ({"num_kv_shared_layers": 5}, {}, "leaves no layer with full_attention that has keys and values of its own"),
        ({"per_layer_config": {"1": {"head_dim": 16}}}, {}, "gives layer 2 sizes of its own"),
        ({"per_layer_config": {layer: {"intermediate_size": 8} for layer in "124"}}, {}, "only head_dim and"),
        ({"num_global_key_value_heads": 3}, {}, r"is not a multiple of num_key_value_heads \(3\)"),
        ({}, {"drop_layers": 1}, "also multiplies the hidden states, so it cannot be dropped"),
        ({}, {"pattern": "4:8", "ratio": None}, "needs layers of one size"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loram.estimate({**CONFIG, **changes}, **{"ratio": 0.5, "keep_first": 1, "keep_last": 1, **options})
