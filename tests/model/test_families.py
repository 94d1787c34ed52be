"""Rows of families: where tensors are, what a layer has, and what a config says, also for rows of the future."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import EVERY_FAMILY, EXPERTS, HYBRID_EXPERTS, ODDITIES, SIZES

from loram.base.errors import UserError
from loram.cli import support
from loram.model.dense import LLAMA
from loram.model.families import ARCHITECTURES, architecture_of, family_of
from loram.model.geometry import Geometry
from loram.model.parts import GATE, KEYS, QUERIES, UP, VALUES
from loram.model.segments import HIDDEN, ONE_HEAD, Linear, Norm, Parameter


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_rows_name_their_own_parts_only(family: str) -> None:
    row = ARCHITECTURES[family]
    paths = {linear.path for linear in row.linears}
    assert len({(linear.path, linear.kinds) for linear in row.linears}) == len(row.linears)
    assert len(paths) == len(row.linears) or row.kinds is not None  # a layer has one linear per path
    own = {part.name.removesuffix(".bias") for part in row.parameters}  # of modules that are no linears
    assert {path for switched in row.biases.values() for path in switched} <= paths | own
    modules = {name.split(".")[0] for name in (*paths, *(part.name for part in row.parameters)) if "." in name}
    assert set(row.blocks) <= modules
    assert modules == set(row.blocks) or row.model_type == "gemma4_text"  # its experts give a part of what its MLP adds
    assert row.spaces[0].name == "kv_groups"
    assert row.spaces[-1].name == ("expert_channels" if row.experts else "channels")


def test_the_docs_list_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "models.md").read_text(encoding="utf-8")
    families, _ = page.split("**Wrapped models**")
    listed = re.findall(r"^\| ([a-z0-9_]+) \|", families, re.MULTILINE)
    assert sorted(set(listed) - {"family"}) == sorted(ARCHITECTURES)


def test_the_page_of_families_is_up_to_date_and_every_family_is_tested() -> None:
    path = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
    assert path.read_text(encoding="utf-8") == support.page(), "run `make reference`"
    assert sorted((*EVERY_FAMILY, *EXPERTS, *HYBRID_EXPERTS)) == sorted(ARCHITECTURES)


def test_adapters_target_the_last_parts_of_paths() -> None:
    assert LLAMA.adapter_targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert ARCHITECTURES["phi3"].adapter_targets == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def test_a_full_and_a_pruned_model_have_one_row() -> None:
    assert family_of({"model_type": "loram_phi3"}) is architecture_of({"model_type": "phi3"}) is ARCHITECTURES["phi3"]
    with pytest.raises(UserError, match="already pruned"):
        architecture_of({"model_type": "loram_phi3"})
    for refuse in (architecture_of, family_of):
        with pytest.raises(
            UserError, match=r"'gpt2' is not supported; supported families are llama, .*phi3, .*; .*CONTRIBUTING\.md"
        ):
            refuse({"model_type": "gpt2"})
        with pytest.raises(
            UserError, match=r"'deepseek_v3' is not supported: .*; supported families are [a-z0-9_, ]*$"
        ):
            refuse({"model_type": "deepseek_v3"})
    with pytest.raises(UserError, match="'llama4' around a text model of type 'llama4_text' is not supported: its"):
        family_of({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}})


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "base_model.model.model.language_model."])
def test_a_wrapped_model_has_its_layers_elsewhere(prefix: str) -> None:
    wrapped = replace(LLAMA, decoder="model.language_model")
    expected = None if prefix == "model." else (3, "mlp.up_proj.weight")
    assert wrapped.split(f"{prefix}layers.3.mlp.up_proj.weight") == expected
    assert wrapped.split("model.vision_tower.encoder.layers.3.mlp.up_proj.weight") is None
    assert wrapped.layer_path(3) == "model.language_model.layers.3"
    assert wrapped.embedding_weight == "model.language_model.embed_tokens.weight"
    assert wrapped.head_weight == "lm_head.weight"


def test_a_nested_config_is_read_where_it_is() -> None:
    row = replace(LLAMA, config_key="text_config", kinds=lambda config: tuple(config["layer_types"]))
    config = {"text_config": {"hidden_size": 8, "layer_types": ["full", "linear"]}}
    assert row.text_config(config)["hidden_size"] == 8
    assert row.layer_kinds(config) == ("full", "linear")
    assert LLAMA.layer_kinds(config) == ()


def test_a_layer_has_the_parts_of_its_kind_and_other_tensors() -> None:
    """A row of the future: one kind of layers has no keys and values of its own, the other has experts."""
    geometry = Geometry(
        **{**{key: SIZES[key] for key in Geometry.model_fields if key in SIZES}}, tie_word_embeddings=True
    )
    geometry = geometry.model_copy(update={"layer_kinds": ("full", "shared", "full", "shared", "full")})
    row = replace(
        LLAMA,
        linears=(
            Linear(path="self_attn.q_proj", reads="layer", rows=(QUERIES,)),
            Linear(path="self_attn.kv_proj", reads="layer", rows=(KEYS, VALUES), kinds=("full",)),
        ),
        norms=(
            Norm(path="norm"),
            Norm(path="q_norm", width=QUERIES),
            Norm(path="k_norm", width=ONE_HEAD, kinds=("full",)),
        ),
        parameters=(
            Parameter(name="mlp.experts.gate_up_proj", axes=((HIDDEN,), (GATE, UP), (HIDDEN,)), kinds=("shared",)),
        ),
    )
    assert geometry.layer_shapes(row, 0) == {
        "self_attn.q_proj.weight": (64, 32),
        "self_attn.kv_proj.weight": (64, 32),
        "norm.weight": (32,),
        "q_norm.weight": (64,),
        "k_norm.weight": (8,),
    }
    assert geometry.layer_shapes(row, 1, {"kv_groups": 2, "channels": 10}) == {
        "self_attn.q_proj.weight": (32, 32),
        "norm.weight": (32,),
        "q_norm.weight": (32,),
        "mlp.experts.gate_up_proj": (32, 20, 32),
    }
    names = geometry.tensor_shapes(row).keys()
    assert "model.layers.2.self_attn.kv_proj.weight" in names
    assert "model.layers.3.self_attn.kv_proj.weight" not in names
    assert "model.layers.3.self_attn.kv_proj" not in geometry.linear_shapes(row)


@pytest.mark.parametrize(
    ("family", "config", "windows"),
    [
        ("llama", {"sliding_window": 8}, [None] * 4),
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 2}, [None] * 4),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 2, "use_sliding_window": True}, [None, None, 8, 8]),
        ("gemma2", {"sliding_window": 8}, [8, None, 8, None]),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 3}, [8, 8, None, 8]),
        (
            "gemma3_text",
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
            [None, 8] * 2,
        ),
        ("phi3", {}, [None] * 4),
        ("phi3", ODDITIES["phi3"], [8] * 4),
        ("smollm3", {"sliding_window": 8}, [None] * 4),
        ("smollm3", {"use_sliding_window": True}, [None] * 4),
        ("smollm3", {"sliding_window": 8, "use_sliding_window": True}, [None, None, None, 8]),
        (
            "smollm3",
            {"sliding_window": 8, "use_sliding_window": True, "no_rope_layers": [0, 1, 0, 1]},
            [8, None, 8, None],
        ),
        ("ministral3", {}, [None] * 4),
        ("ministral3", {"sliding_window": 8}, [8] * 4),
        ("exaone4", {"sliding_window": 8, "sliding_window_pattern": 2}, [8, None, 8, None]),
        ("exaone4", {"sliding_window": None, "sliding_window_pattern": 0}, [None] * 4),
        ("olmo3", {}, [4096, 4096, 4096, None]),
        ("cohere2", {"sliding_window": 8}, [8, 8, 8, None]),
        ("gpt_oss", {}, [128, None, 128, None]),
        ("qwen2_moe", {"sliding_window": 8, "max_window_layers": 2}, [None] * 4),
        ("qwen2_moe", {"sliding_window": 8, "max_window_layers": 2, "use_sliding_window": True}, [8, None, None, None]),
    ],
    ids=str,
)
def test_which_layers_look_back_how_far(family: str, config: dict[str, object], windows: list[int | None]) -> None:
    row = ARCHITECTURES[family].windows
    assert [None if row is None else row.of(layer, config) for layer in range(4)] == windows


@pytest.mark.parametrize(
    ("family", "config", "kinds", "sizes"),
    [
        ("qwen2_moe", {}, ["experts"] * 4, (60, 4, 1408, 5632, 12)),
        ("qwen2_moe", {"decoder_sparse_step": 2}, ["dense", "experts"] * 2, (60, 4, 1408, 5632, 12)),
        ("glm4_moe", {}, ["dense", *["experts"] * 3], (128, 8, 1408, 1408, 12)),
        (
            "glm4_moe",
            {"first_k_dense_replace": 2, "use_qk_norm": True, "n_shared_experts": 2, "n_routed_experts": 160},
            ["dense normed"] * 2 + ["experts normed"] * 2,
            (160, 8, 1408, 2816, 12),
        ),
        ("ernie4_5_moe", {}, ["dense", *["experts shared"] * 3], (64, 6, 1536, 3072, 12)),
        (
            "ernie4_5_moe",
            {
                "moe_layer_start_index": 0,
                "moe_layer_end_index": 2,
                "moe_layer_interval": 2,
                "moe_num_shared_experts": 0,
            },
            ["dense", "experts", "dense", "dense"],
            (64, 6, 1536, 0, 12),
        ),
        ("gpt_oss", {}, [], (128, 4, 12, 0, None)),
        ("olmoe", {"num_experts": 8}, [], (8, 8, 12, 0, None)),
    ],
    ids=str,
)
def test_where_experts_are_and_how_many(
    family: str, config: dict[str, object], kinds: list[str], sizes: tuple[int | None, ...]
) -> None:
    known = {key: value for key, value in SIZES.items() if key in Geometry.model_fields}
    geometry = Geometry.from_config(
        {**known, "intermediate_size": 12, "num_hidden_layers": 4, **config, "model_type": family}
    )
    assert list(geometry.layer_kinds) == kinds
    assert (
        geometry.num_experts,
        geometry.num_experts_per_tok,
        geometry.moe_intermediate_size,
        geometry.shared_intermediate_size,
        geometry.intermediate_size,
    ) == sizes


def test_a_layer_that_predicts_the_token_after_the_next_is_unused() -> None:
    config, row = {"num_hidden_layers": 4}, ARCHITECTURES["glm4_moe"]
    assert row.leaves_unused("model.layers.4.eh_proj.weight", config)
    assert not row.leaves_unused("model.layers.3.mlp.gate.weight", config)
    assert not LLAMA.leaves_unused("model.layers.4.eh_proj.weight", config)


_ATTENTION_OF_16 = {"num_attention_heads": 16, "num_key_value_heads": 16}


@pytest.mark.parametrize(
    ("parameters", "config"),
    [
        (
            20_914_757_184,
            {
                **{"model_type": "gpt_oss", "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880},
                **{"num_hidden_layers": 24, "num_attention_heads": 64, "num_local_experts": 32},
            },
        ),
        (
            6_919_161_856,
            {
                **{"model_type": "olmoe", "vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 1024},
                **{"num_hidden_layers": 16, "num_experts": 64, **_ATTENTION_OF_16},
            },
        ),
        (
            14_315_784_192,
            {
                **{"model_type": "qwen2_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5632},
                **{"num_hidden_layers": 24, "num_experts": 60, **_ATTENTION_OF_16},
            },
        ),
        (
            1_334_628_352,
            {
                **{"model_type": "granitemoe", "vocab_size": 49_155, "hidden_size": 1024, "intermediate_size": 512},
                **{"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8},
                **{"num_local_experts": 32, "tie_word_embeddings": True},
            },
        ),
    ],
    ids=["gpt-oss-20b", "OLMoE-1B-7B", "Qwen1.5-MoE-A2.7B", "granite-3.1-1b-a400m"],
)
def test_mixtures_on_the_hub_have_as_many_parameters(parameters: int, config: dict[str, object]) -> None:
    row, geometry = architecture_of(config), Geometry.from_config(config)
    layers = sum(geometry.layer_parameters(row, layer) for layer in range(geometry.num_hidden_layers))
    assert geometry.other_parameters(row) + layers == parameters
