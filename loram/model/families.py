"""The supported families, one row each. Adding a family is adding a row; `CONTRIBUTING.md` has a worked example."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from loram.base.errors import UserError
from loram.model.architecture import ONE_HEAD, Architecture, Linear, Norm, Scale, Segment, Softcap, Space, Windows

PRUNED_PREFIX = "loram_"  # the model_type of a pruned llama is `loram_llama`

KV_GROUPS = Space(
    name="kv_groups",
    size="num_key_value_heads",
    config_keys=("num_attention_heads", "num_key_value_heads"),
    rounding="up",
)
CHANNELS = Space(name="channels", size="intermediate_size", config_keys=("intermediate_size",), rounding="down")

QUERIES = Segment(name="queries", unit="group", space=KV_GROUPS)
KEYS = Segment(name="keys", unit="head", space=KV_GROUPS)
VALUES = Segment(name="values", unit="head", space=KV_GROUPS)
GATE = Segment(name="gate", unit="channel", space=CHANNELS)
UP = Segment(name="up", unit="channel", space=CHANNELS)

_OUT = Linear(path="self_attn.o_proj", reads="attention", columns=(QUERIES,))
_DOWN = Linear(path="mlp.down_proj", reads="channels", columns=(UP,))
_LINEARS = (
    Linear(path="self_attn.q_proj", reads="layer", rows=(QUERIES,)),
    Linear(path="self_attn.k_proj", reads="layer", rows=(KEYS,)),
    Linear(path="self_attn.v_proj", reads="layer", rows=(VALUES,)),
    _OUT,
    Linear(path="mlp.gate_proj", reads="mlp", rows=(GATE,)),
    Linear(path="mlp.up_proj", reads="mlp", rows=(UP,)),
    _DOWN,
)
_FUSED_LINEARS = (
    Linear(path="self_attn.qkv_proj", reads="layer", rows=(QUERIES, KEYS, VALUES)),
    _OUT,
    Linear(path="mlp.gate_up_proj", reads="mlp", rows=(GATE, UP)),
    _DOWN,
)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = (Norm(path="input_layernorm"), Norm(path="post_attention_layernorm"))
_FOUR_NORMS = (*_NORMS, Norm(path="pre_feedforward_layernorm"), Norm(path="post_feedforward_layernorm"))
_HEAD_NORMS = (Norm(path="self_attn.q_norm", width=ONE_HEAD), Norm(path="self_attn.k_norm", width=ONE_HEAD))

# Some layers of Qwen's models slide: those from `max_window_layers` on.
_POST_NORMS = (Norm(path="post_attention_layernorm"), Norm(path="post_feedforward_layernorm"))
_THREE_OF_FOUR = Windows(slides=lambda layer, config: (layer + 1) % config.get("sliding_window_pattern", 4) != 0)
_QWEN_WINDOWS = Windows(
    switch="use_sliding_window", slides=lambda layer, config: layer >= config.get("max_window_layers", 28)
)


def _rotates(layer: int, config: Mapping[str, Any]) -> bool:
    """Return whether a layer of SmolLM3 has rotary embeddings."""
    listed = config.get("no_rope_layers")  # 1 where a layer has them, in spite of the name
    return bool(listed[layer]) if listed else (layer + 1) % config.get("no_rope_layer_interval", 4) != 0


LLAMA = Architecture(
    model_type="llama",
    model_class="LlamaForCausalLM",
    decoder="model",
    embedding="embed_tokens",
    layers="layers",
    final_norm="norm",
    head="lm_head",
    linears=_LINEARS,
    norms=_NORMS,
    blocks=("self_attn", "mlp"),
    biases={"attention_bias": _QKVO, "mlp_bias": _MLP},
)
_OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    model_class="Olmo2ForCausalLM",
    norms=(
        *_POST_NORMS,
        Norm(path="self_attn.q_norm", width=QUERIES),
        Norm(path="self_attn.k_norm", width=KEYS),
    ),
    normed_inputs=False,
    biases={"attention_bias": _QKVO},
    rotary_in_float32=True,
)
# The other rows say in what they differ from Llama's.
_ROWS = (
    LLAMA,
    replace(
        LLAMA,
        model_type="mistral",
        model_class="MistralForCausalLM",
        biases={},
        kv_heads=8,
        windows=Windows(slides=lambda layer, config: True),
    ),
    replace(
        LLAMA,
        model_type="qwen2",
        model_class="Qwen2ForCausalLM",
        biases={"always": _QKV},
        kv_heads=32,
        windows=_QWEN_WINDOWS,
    ),
    replace(
        LLAMA,
        model_type="qwen3",
        model_class="Qwen3ForCausalLM",
        norms=(*_NORMS, *_HEAD_NORMS),
        biases={"attention_bias": _QKVO},
        kv_heads=32,
        head_dim=128,
        windows=_QWEN_WINDOWS,
    ),
    replace(
        LLAMA,
        model_type="gemma2",
        model_class="Gemma2ForCausalLM",
        norms=_FOUR_NORMS,
        biases={"attention_bias": _QKVO},
        kv_heads=4,
        head_dim=256,
        tied=True,
        windows=Windows(slides=lambda layer, config: (layer + 1) % 2 != 0),
        attention_softcap=Softcap(key="attn_logit_softcapping", default=50.0),
        logit_softcap=Softcap(key="final_logit_softcapping", default=30.0),
        norms_add_one=True,
    ),
    replace(
        LLAMA,
        model_type="gemma3_text",
        model_class="Gemma3ForCausalLM",
        norms=(*_FOUR_NORMS, *_HEAD_NORMS),
        biases={"attention_bias": _QKVO},
        kv_heads=4,
        head_dim=256,
        tied=True,
        windows=Windows(slides=lambda layer, config: (layer + 1) % config.get("sliding_window_pattern", 6) != 0),
        logit_softcap=Softcap(key="final_logit_softcapping", default=None),
        norms_add_one=True,
        rotary_by_window=True,
    ),
    replace(
        LLAMA,
        model_type="phi3",
        model_class="Phi3ForCausalLM",
        linears=_FUSED_LINEARS,
        biases={},
        windows=Windows(slides=lambda layer, config: True, default=None),
        partial_rotary=1.0,
    ),
    replace(
        LLAMA,
        model_type="seed_oss",
        model_class="SeedOssForCausalLM",
        biases={"attention_bias": _QKV, "attention_out_bias": ("self_attn.o_proj",), "mlp_bias": _MLP},
        on_by_default=("attention_bias",),
        kv_heads=8,
        head_dim=128,
        dropouts={"attention_dropout": 0.1, "residual_dropout": 0.1},
    ),
    replace(
        LLAMA,
        model_type="smollm3",
        model_class="SmolLM3ForCausalLM",
        kv_heads=4,
        tied=True,
        windows=Windows(
            switch="use_sliding_window", slides=lambda layer, config: not _rotates(layer, config), default=None
        ),
    ),
    replace(
        LLAMA,
        model_type="granite",
        model_class="GraniteForCausalLM",
        logit_scale=Scale(key="logits_scaling", default=1.0, divides=True),
    ),
    replace(
        LLAMA,
        model_type="ministral3",
        model_class="Ministral3ForCausalLM",
        biases={},
        kv_heads=8,
        head_dim=128,
        windows=Windows(slides=lambda layer, config: True, default=None),
        queries_scaled=True,
    ),
    replace(
        LLAMA,
        model_type="ernie4_5",
        model_class="Ernie4_5ForCausalLM",
        biases={"use_bias": (*_QKVO, *_MLP)},
        kv_heads=2,
        head_dim=128,
        tied=True,
        rotary_by_layer=True,
        rotary_in_float32=True,
        dropouts={},
    ),
    replace(
        LLAMA,
        model_type="hunyuan_v1_dense",
        model_class="HunYuanDenseV1ForCausalLM",
        norms=(
            *_NORMS,
            Norm(path="self_attn.query_layernorm", width=ONE_HEAD),
            Norm(path="self_attn.key_layernorm", width=ONE_HEAD),
        ),
        biases={"attention_bias": _QKVO},
    ),
    replace(
        LLAMA,
        model_type="exaone4",
        model_class="Exaone4ForCausalLM",
        norms=(*_POST_NORMS, *_HEAD_NORMS),
        normed_inputs=False,
        biases={},
        kv_heads=32,
        windows=_THREE_OF_FOUR,
    ),
    _OLMO2,
    replace(
        _OLMO2,
        model_type="olmo3",
        model_class="Olmo3ForCausalLM",
        windows=Windows(slides=lambda layer, config: (layer + 1) % 4 != 0),
        rotary_by_window=True,
    ),
    replace(
        LLAMA,
        model_type="glm4",
        model_class="Glm4ForCausalLM",
        linears=(*_LINEARS[:3], *_FUSED_LINEARS[1:]),
        norms=(*_NORMS, Norm(path="post_self_attn_layernorm"), Norm(path="post_mlp_layernorm")),
        biases={"attention_bias": _QKV},
        on_by_default=("attention_bias",),
        kv_heads=2,
        head_dim=128,
        partial_rotary=0.5,
        rotary_by_layer=True,
    ),
    replace(
        LLAMA,
        model_type="cohere2",
        model_class="Cohere2ForCausalLM",
        # attention and MLP stand side by side, and read the same normed hidden states
        linears=tuple(replace(linear, reads="layer") if linear.reads == "mlp" else linear for linear in _LINEARS),
        norms=_NORMS[:1],
        norms_center=True,
        biases={"attention_bias": _QKVO},
        tied=True,
        windows=_THREE_OF_FOUR,
        logit_scale=Scale(key="logit_scale", default=0.0625),
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.model_type: row for row in _ROWS})
MODEL_CLASSES = tuple(row.model_class for row in _ROWS)
# The modules that an adapter can target, over all families; which of them a model has, its own row says.
KNOWN_TARGETS = tuple(dict.fromkeys(target for row in _ROWS for target in (*row.adapter_targets, row.head)))
LINEARS = LLAMA.adapter_targets  # the default targets before the model is known


def is_pruned(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a pruned model."""
    return str(config.get("model_type")).startswith(PRUNED_PREFIX)


def architecture_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Return the row of a full model's family.

    Args:
        config: the content of its config.json.
        where: what the error message calls that file.

    Raises:
        UserError: the model is pruned already, or its family has no row; the message lists those that have one.
    """
    if is_pruned(config):
        raise UserError(f"{where}: this model is already pruned; start from the full model that it was made from")
    return family_of(config, where)


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Return the row of a full or pruned model's family; arguments as for `architecture_of`.

    Raises:
        UserError: the family has no row; the message lists those that have one.
    """
    model_type = str(config.get("model_type")).removeprefix(PRUNED_PREFIX)
    if model_type not in ARCHITECTURES:
        text = config.get("text_config")
        of_text = f" around a text model of type {text.get('model_type')!r}" if isinstance(text, Mapping) else ""
        raise UserError(
            f"{where}: model_type {model_type!r}{of_text} is not supported; supported families are "
            f"{', '.join(ARCHITECTURES)}; what is missing is its row in loram/model/families.py (see CONTRIBUTING.md, "
            "'Add a family')"
        )
    return ARCHITECTURES[model_type]
