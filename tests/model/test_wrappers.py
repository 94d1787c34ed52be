"""Rows of wrappers: where a wrapped model has its text model, and what its config.json says of it."""

from typing import Any

import pytest
from conftest import SIZES, WRAPPED
from transformers import AutoConfig

import loram
from loram.base.errors import UserError
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.wrappers import WRAPPERS

WRAPPER = WRAPPERS["gemma3"]
# google/gemma-3-4b-it and Mistral-Small-3.1 as they are on the hub, without what no reader of ours looks at
GEMMA_3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.encoder.layers.3.mlp.up_proj.weight", None),
        ("vision_tower.encoder.layers.3.mlp.up_proj.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
        ("image_newline", None),
    ],
)
def test_tensors_in_files_have_the_text_models_own_names(stored: str, own: str | None) -> None:
    assert WRAPPER.unwrapped(stored) == own


@pytest.mark.parametrize(
    ("own", "outside"),
    [("model.layers.3.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"), ("lm_head", "lm_head")],
)
def test_modules_have_other_names_outside_and_back(own: str, outside: str) -> None:
    assert WRAPPER.outside(own) == outside
    assert WRAPPER.inside(outside) == own
    assert WRAPPER.inside("model.vision_tower.layers.3.mlp.up_proj") is None


def test_what_the_wrapper_says_counts_more_than_its_text_config() -> None:
    text = {**GEMMA_3_4B["text_config"], "eos_token_id": 1, "torch_dtype": "float32", "tie_word_embeddings": True}
    config = WRAPPER.text_config({**GEMMA_3_4B, "text_config": text, "tie_word_embeddings": False}, "config.json")
    assert config["eos_token_id"] == [1, 106]
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert config["tie_word_embeddings"] is False
    assert config["model_type"] == "gemma3_text"
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["sliding_window"] == 1024


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_first_family_is_the_default(model_type: str) -> None:
    wrapper = WRAPPERS[model_type]
    config = wrapper.text_config({"model_type": model_type, "text_config": {}}, "config.json")
    assert config["model_type"] == wrapper.families[0] == AutoConfig.for_model(model_type).text_config.model_type


@pytest.mark.parametrize(
    ("model_type", "family"),
    [(name, family) for name, row in WRAPPERS.items() for family in row.families if family in ARCHITECTURES],
)
def test_sizes_that_a_text_config_leaves_out_are_transformers_own(model_type: str, family: str) -> None:
    config = {"model_type": model_type, "text_config": {"model_type": family}}
    own = Geometry.from_config(WRAPPERS[model_type].text_config(config, "config.json"))
    theirs = AutoConfig.for_model(family).to_dict()  # some refuse to tell what differs between layers
    for key in SIZES.keys() & Geometry.model_fields.keys():
        if (expected := theirs.get(key)) is not None:
            assert getattr(own, key) == expected, key


def test_an_unsupported_text_model_is_refused_with_both_names() -> None:
    for family in ("gpt2", "gemma2"):
        refused = f"model_type 'mistral3' holds a text model of type '{family}', which is not supported there"
        with pytest.raises(UserError, match=refused):
            loram.estimate({"model_type": "mistral3", "text_config": {"model_type": family}})
    with pytest.raises(UserError, match=r"'gemma3' needs a text_config, and there is none"):
        loram.estimate({"model_type": "gemma3"})
    with pytest.raises(UserError, match=r"'clip' around a text model of type 'clip_text' is not supported"):
        loram.estimate({"model_type": "clip", "text_config": {"model_type": "clip_text"}})


def test_every_wrapper_is_tested() -> None:
    assert WRAPPED.keys() == WRAPPERS.keys()
    for name, (family, _, _) in WRAPPED.items():
        assert family in WRAPPERS[name].families
        assert WRAPPERS[name].families[0] in ARCHITECTURES
