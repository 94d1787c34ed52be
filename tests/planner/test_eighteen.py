"""The counts of every family at transformers' default sizes, wrapped or not, and of mixtures of experts."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import loram
from loram.model.families import ARCHITECTURES
from loram.model.wrappers import WRAPPERS

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
