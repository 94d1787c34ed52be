"""Hybrids: which layers mix tokens by attention, and what else their configs and files may say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, random_adapter, relative
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import loram
from loram.base.errors import UserError
from loram.disk.checkpoint import Checkpoint
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.training.options import TrainOptions, resolve

TOKENS = torch.arange(3, 15)[None]
FULL, LINEAR = "full_attention", "linear_attention"
# What the config.json of LFM2-1.2B says of its MLPs and its head
LFM2_1_2B = {"block_ff_dim": 12288, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "tie_embedding": True}


def geometry(family: str, **config: Any) -> Geometry:
    known = {key: value for key, value in SIZES.items() if key in Geometry.model_fields}
    return Geometry.from_config({**known, "num_hidden_layers": 4, **config, "model_type": family})


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(TOKENS).logits
    return result


@pytest.mark.parametrize(
    ("family", "config", "kinds"),
    [
        ("qwen3_5_text", {}, [LINEAR, LINEAR, LINEAR, FULL]),
        ("qwen3_5_text", {"full_attention_interval": 2}, [LINEAR, FULL, LINEAR, FULL]),
        ("qwen3_5_text", {"layer_types": [FULL, LINEAR, LINEAR, FULL]}, [FULL, LINEAR, LINEAR, FULL]),
        ("qwen3_5_moe_text", {"full_attention_interval": 4}, [*[f"{LINEAR} experts"] * 3, f"{FULL} experts"]),
        (
            "qwen3_next",
            {"mlp_only_layers": [0, 3]},
            [f"{LINEAR} dense", f"{LINEAR} experts", f"{LINEAR} experts", f"{FULL} dense"],
        ),
        ("lfm2", {}, [FULL] * 4),
        ("lfm2", {"full_attn_idxs": [2]}, ["conv", "conv", FULL, "conv"]),
    ],
    ids=str,
)
def test_which_layers_have_attention(family: str, config: dict[str, Any], kinds: list[str]) -> None:
    assert list(geometry(family, **config).layer_kinds) == kinds


@pytest.mark.parametrize(
    ("config", "width", "tied"),
    [
        ({}, 256, True),
        (LFM2_1_2B, 8192, True),
        ({**LFM2_1_2B, "block_ffn_dim_multiplier": 1.1, "tie_embedding": False}, 9216, False),
        ({"block_auto_adjust_ff_dim": False, "tie_word_embeddings": False}, 40, False),
    ],
    ids=str,
)
def test_the_mlp_and_the_head_of_lfm2_are_transformers_own(config: dict[str, Any], width: int, tied: bool) -> None:
    found = geometry("lfm2", **config)
    assert (found.intermediate_size, found.tie_word_embeddings) == (width, tied)
    with torch.device("meta"):
        own = AutoConfig.for_model("lfm2", **{**SIZES, "num_hidden_layers": 1, **config})
        model: Any = AutoModelForCausalLM.from_config(own)
    assert model.model.layers[0].feed_forward.w1.out_features == width
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_kind_for_every_layer_is_needed() -> None:
    with pytest.raises(UserError, match="num_hidden_layers is 4, but there are 2 layer_types"):
        geometry("qwen3_5_text", layer_types=[LINEAR, FULL])
    with pytest.raises(UserError, match="num_hidden_layers: Input should be a valid integer"):
        Geometry.from_config({**SIZES, "num_hidden_layers": None, "model_type": "lfm2"})


def test_mixers_stay_whole_in_a_sparse_model(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_models["qwen3_5_text"]
    plan = loram.prune(base, tmp_path / "out", pattern="4:8", criterion="magnitude")
    full, sparse = Checkpoint(base), Checkpoint(tmp_path / "out").stored
    mixers = [name for name in full.names() if ".linear_attn." in name]
    assert mixers
    assert all(torch.equal(full.tensor(name), sparse.tensor(name)) for name in mixers)
    assert sparse.shape("model.layers.0.mlp.up_proj.weight") == (40 * 32 // 2,)
    assert loram.estimate(base, pattern="4:8").pruned_parameters == plan.parameters()[1]


def test_mixers_get_an_adapter_when_they_are_named() -> None:
    row = ARCHITECTURES["qwen3_5_text"]
    assert row.default_targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"} < set(row.adapter_targets)
    assert ARCHITECTURES["lfm2"].default_targets == ("q_proj", "k_proj", "v_proj", "out_proj", "w1", "w3", "w2")


@pytest.mark.parametrize("key", ["packing", "padding_free"])
def test_rows_are_not_put_together(key: str) -> None:
    options = TrainOptions(trainer={key: True})
    with pytest.raises(UserError, match=f"{key} puts rows together, and some layers of lfm2 would carry"):
        resolve(options, ARCHITECTURES["lfm2"])
    resolve(options, ARCHITECTURES["llama"])


def test_layers_that_predict_further_tokens_are_left_out_and_merged_along(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models["qwen3_5_text"], tmp_path / "base")
    further = {"mtp.norm.weight": torch.ones(32), "mtp.layers.0.mlp.up_proj.weight": torch.ones(40, 32)}
    weights = {**load_file(base / "model.safetensors"), **further}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    loram.prune(base, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    assert not [name for name in load_file(tmp_path / "pruned" / "model.safetensors") if name.startswith("mtp")]
    adapter = random_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    merged = load_file(loram.merge(base, adapter, tmp_path / "merged") / "model.safetensors")
    assert merged.keys() == weights.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in further.items())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # ours merge it rightly
def test_a_head_that_was_tied_under_another_key_is_merged(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(tiny_models["lfm2"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps({**config, "tie_embedding": True}))
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapter = random_adapter(plain, tmp_path / "adapter", target_modules=["lm_head", "out_proj"])
    merged = AutoModelForCausalLM.from_pretrained(loram.merge(base, adapter, tmp_path / "merged"))
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert relative(logits(merged), expected) < 1e-5
