"""The counts of every family at transformers' default sizes, wrapped or not, and of mixtures of experts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import loram
from loram import cli
from loram.model.families import ARCHITECTURES
from loram.model.wrappers import WRAPPERS
from loram.planner.fit import fit
from loram.planner.shapes import Model

# transformers builds no HunYuan model whose config leaves head_dim out
CHANGES: Mapping[str, dict[str, Any]] = {"hunyuan_v1_dense": {"head_dim": 128}}
ASKED = (
    *("qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "gemma3", "gemma4", "gpt_oss", "mistral3", "ministral3"),
    *("phi3", "glm4", "granite", "smollm3", "olmo3", "llama4", "seed_oss", "mixtral", "glm4_moe"),
)
WITH_A_ROW = {*ARCHITECTURES, *WRAPPERS}


def parameters_of_text(model: Any) -> int:
    """The parameters of a wrapped model's text model: its decoder's and its head's, which may be one and the same."""
    parts = (model.model.language_model, model.lm_head)
    return sum({id(p): p.numel() for part in parts for p in part.parameters()}.values())


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_count_of_a_family_is_transformers_own(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **CHANGES.get(model_type, {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert [loram.estimate(written).parameters for written in (config.to_dict(), config.to_diff_dict())] == [count] * 2


@pytest.mark.parametrize("model_type", sorted(WRAPPERS))
def test_the_count_of_a_wrapped_text_model_is_transformers_own(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    found = loram.estimate(config.to_dict())
    assert (found.wrapper, found.parameters) == (model_type, parameters_of_text(model))


@pytest.mark.parametrize("model_type", ASKED)
def test_an_answer_or_the_reason_why_there_is_none(model_type: str) -> None:
    config = AutoConfig.for_model(model_type).to_dict()
    if model_type in WITH_A_ROW:
        found = loram.estimate(config, ratio=0.5)
        assert found.pruned_parameters < found.parameters
        assert found.pruned_active_parameters <= found.active_parameters <= found.parameters
    else:
        with pytest.raises(loram.UserError, match=rf"model_type '{model_type}'.* not supported") as raised:
            loram.estimate(config, ratio=0.5)
        assert str(raised.value).count("\n") == 0


QWEN3_30B_A3B = {
    **{"model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144},
    **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False},
    **{"norm_topk_prob": True, "torch_dtype": "bfloat16"},
}


def test_qwen3_30b_a3b() -> None:
    found = loram.estimate(QWEN3_30B_A3B, experts_ratio=0.5)
    expert = 3 * 768 * 2048
    assert found.parameters == 30_532_122_624
    assert found.active_parameters == 30_532_122_624 - 48 * (128 - 8) * expert == 3_353_032_704
    assert found.pruned_parameters == 30_532_122_624 - 42 * 64 * (expert + 2048)  # a row of the router goes too
    assert found.pruned_active_parameters == found.active_parameters - 42 * 64 * 2048
    assert found.units == {"kv_groups": 4, "experts": 64, "expert_channels": 768}
    assert found.arithmetic.flops_per_token < 8 * found.active_parameters  # and not of all parameters


@pytest.mark.parametrize(
    ("ratios", "units"),
    [
        ({"ratio": 0.5}, {"kv_groups": 2, "experts": 64, "expert_channels": 768}),
        ({"ratio": 0.5, "experts_ratio": 0.75}, {"kv_groups": 2, "experts": 32, "expert_channels": 768}),
        ({"expert_channels_ratio": 0.25}, {"kv_groups": 4, "experts": 128, "expert_channels": 576}),
        ({"ratio": 0.5, "kv_groups_ratio": 0.0}, {"kv_groups": 4, "experts": 64, "expert_channels": 768}),
    ],
    ids=str,
)
def test_each_space_has_a_ratio(ratios: dict[str, float], units: dict[str, int]) -> None:
    found = loram.estimate(QWEN3_30B_A3B, **ratios)
    assert found.units == units
    own = {name.removesuffix("_ratio"): ratio for name, ratio in ratios.items() if name != "ratio"}
    assert (found.ratio, found.ratios) == (ratios.get("ratio"), own)


def test_experts_are_among_what_pruning_holds() -> None:
    """A decoder layer with all its experts, and with taylor the gradient of the largest tensor of them."""
    full = Model.of(QWEN3_30B_A3B, "config")
    stages = {stage.name: stage.memory for stage in loram.estimate(QWEN3_30B_A3B, experts_ratio=0.5).stages}
    layer, tensor = full.layers[0].parameters, 128 * 2 * 768 * 2048
    assert stages["prune (magnitude, random)"] == (1 << 29) + 3 * 2 * layer
    assert stages["prune (taylor)"] - stages["prune (wanda, flap, activation)"] == 2 * 4 * tensor


def test_the_least_ratio_keeps_the_ratios_of_single_spaces() -> None:
    found = fit(QWEN3_30B_A3B, 9 << 30, experts_ratio=0.75, per_device_train_batch_size=1)
    assert found.estimate.ratios == {"experts": 0.75}
    assert "  experts_ratio: 0.75\n" in found.recipe
    assert found.estimate.training.total <= 9 << 30


def test_the_command_says_how_many_parameters_are_active(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_30B_A3B))
    assert cli._main(["estimate", str(path), "--experts-ratio", "0.5", "--load-in-4bit"]) == 0
    printed = capfd.readouterr().out
    assert "3,353,032,704 -> 3,347,527,680 active per token at experts ratio 0.5" in printed
    assert "10.08 GiB" in printed  # as docs/reference/planner.md says
    path.write_text(json.dumps({**QWEN3_30B_A3B, "model_type": "qwen3"}))
    assert cli._main(["estimate", str(path), "--ratio", "0.5"]) == 0
    assert "active" not in capfd.readouterr().out
