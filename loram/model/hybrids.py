"""Families that mix tokens by attention in some layers, and in others by a state or a convolution: one row each.

The mixers of the other kind (Gated DeltaNet, short convolutions) stay whole, and their layers lose MLP channels or
experts alone.
"""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from loram.model.dense import LLAMA
from loram.model.experts import QWEN2_MOE, SPARSE, expert_sizes, qwen_mlps
from loram.model.parts import ATTENTION, GATE, HEAD_NORMS, KV_GROUPS, MLP_LINEARS, NORMS, QKVO, UP
from loram.model.segments import HIDDEN, ONE, ONE_HEAD, Linear, Norm, Parameter, Segment

Part = TypeVar("Part", Linear, Norm, Parameter)
Sizes = Callable[[Mapping[str, Any]], dict[str, Any]]

FULL, LINEAR, CONVOLUTION = "full_attention", "linear_attention", "conv"  # kinds of layers, as layer_types has them

GATED_QUERIES = Segment(name="queries and gates", unit="gated_group", space=KV_GROUPS)
_KEYS = Segment(name="keys of all heads", unit="mixer_keys")
_VALUES = Segment(name="values of all heads", unit="mixer_values")
_HEADS = Segment(name="heads", unit="mixer_heads")
_HEAD = Segment(name="values of a head", unit="mixer_head")
_KERNEL = Segment(name="kernel", unit="kernel")


def _only(kind: str, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Return parts that only one kind of layers has."""
    return tuple(replace(part, kinds=(kind,)) for part in parts)


def _by_attention_or(other: str, config: Mapping[str, Any], full: Container[int]) -> tuple[str, ...]:
    """Return the kind of every layer by how it mixes tokens.

    Args:
        other: the kind of the layers without attention.
        config: the text model's config.
        full: the layers with attention where the config has no `layer_types`.
    """
    listed = config.get("layer_types")
    return tuple(listed or (FULL if layer in full else other for layer in range(config["num_hidden_layers"])))


def _qwen_mixers(config: Mapping[str, Any]) -> tuple[str, ...]:
    interval = config.get("full_attention_interval", 4)
    return _by_attention_or(LINEAR, config, range(interval - 1, config["num_hidden_layers"], interval))


def _delta_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of Qwen's Gated DeltaNets."""
    defaults = {
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }
    return {name: config.get(name, default) for name, default in defaults.items()}


def _shared_width(config: Mapping[str, Any], width: int) -> int:
    return int(config.get("shared_expert_intermediate_size", 512))


def _mixture_sizes(experts: Sizes) -> Sizes:
    """Return how a config.json gives the sizes of both mixers and experts."""
    return lambda config: {**_delta_sizes(config), **experts(config)}


def _lfm2_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    listed = config.get("full_attn_idxs")
    return _by_attention_or(CONVOLUTION, config, range(config["num_hidden_layers"]) if listed is None else listed)


def _lfm2_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    width = config.get("block_ff_dim", config.get("intermediate_size", 12_288))
    if config.get("block_auto_adjust_ff_dim", True):
        multiple = config.get("block_multiple_of", 256)
        scaled = int(config.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        width = multiple * math.ceil(scaled / multiple)
    return {"intermediate_size": width, "linear_conv_kernel_dim": config.get("conv_L_cache", 3)}


# Each head's queries stand before its gate, which multiplies what the head gives.
_GATED_ATTENTION = (replace(ATTENTION[0], rows=(GATED_QUERIES,)), *ATTENTION[1:])


def _delta_linear(name: str, *rows: Segment) -> Linear:
    return Linear(path=f"linear_attn.{name}", reads="layer", rows=rows, adapted=False)


_DELTA_OUT = Linear(path="linear_attn.out_proj", reads="mixer", columns=(_VALUES,), adapted=False)
_DELTA_LINEARS = (
    _delta_linear("in_proj_qkv", _KEYS, _KEYS, _VALUES),
    _delta_linear("in_proj_z", _VALUES),
    _delta_linear("in_proj_b", _HEADS),
    _delta_linear("in_proj_a", _HEADS),
    _DELTA_OUT,
)
_DELTA_TENSORS = (
    Parameter(name="linear_attn.conv1d.weight", axes=((_KEYS, _KEYS, _VALUES), (ONE,), (_KERNEL,))),
    Parameter(name="linear_attn.dt_bias", axes=((_HEADS,),)),
    Parameter(name="linear_attn.A_log", axes=((_HEADS,),)),
    Parameter(name="linear_attn.norm.weight", axes=((_HEAD,),)),
)
_QWEN3_5_MIXERS = (*_only(FULL, _GATED_ATTENTION), *_only(LINEAR, _DELTA_LINEARS))
_QWEN3_5 = replace(
    LLAMA,
    model_type="qwen3_5_text",
    model_class="Qwen3_5ForCausalLM",
    linears=(*_QWEN3_5_MIXERS, *MLP_LINEARS),
    norms=(*NORMS, *_only(FULL, HEAD_NORMS)),
    parameters=_only(LINEAR, _DELTA_TENSORS),
    blocks=("self_attn", "linear_attn", "mlp"),
    kinds=_qwen_mixers,
    sizes=_delta_sizes,
    recurrent=True,
    unused=("mtp.",),
    biases={"attention_bias": QKVO},
    kv_heads=4,
    head_dim=256,
    norms_add_one=True,
    partial_rotary=0.25,
)
_CONVOLUTION_LINEARS = (
    Linear(path="conv.in_proj", reads="layer", rows=(HIDDEN, HIDDEN, HIDDEN), adapted=False),
    # its name is that of attention's, so an adapter on the one is on the other too
    Linear(path="conv.out_proj", reads="mixer"),
)
_LFM2 = replace(
    LLAMA,
    model_type="lfm2",
    model_class="Lfm2ForCausalLM",
    final_norm="embedding_norm",
    linears=(
        *_only(FULL, (*ATTENTION[:3], replace(ATTENTION[3], path="self_attn.out_proj"))),
        *_only(CONVOLUTION, _CONVOLUTION_LINEARS),
        Linear(path="feed_forward.w1", reads="mlp", rows=(GATE,)),
        Linear(path="feed_forward.w3", reads="mlp", rows=(UP,)),
        Linear(path="feed_forward.w2", reads="channels", columns=(UP,)),
    ),
    norms=(
        Norm(path="operator_norm"),
        Norm(path="ffn_norm"),
        *_only(FULL, tuple(Norm(path=f"self_attn.{name}_layernorm", width=ONE_HEAD) for name in "qk")),
    ),
    parameters=_only(
        CONVOLUTION,
        (
            Parameter(name="conv.conv.weight", axes=((HIDDEN,), (ONE,), (_KERNEL,))),
            Parameter(name="conv.conv.bias", axes=((HIDDEN,),)),
        ),
    ),
    blocks=("self_attn", "conv", "feed_forward"),
    kinds=_lfm2_kinds,
    sizes=_lfm2_sizes,
    recurrent=True,
    biases={"conv_bias": ("conv.in_proj", "conv.out_proj", "conv.conv")},
    kv_heads=8,
    tied=True,
    tied_keys=("tie_embedding", "tie_word_embeddings"),
    dropouts={},
)
# All layers have experts, but for an ordinary MLP in some layers of Qwen3-Next.
_MLPS = tuple(linear for linear in QWEN2_MOE.linears if linear.kinds)
_QWEN3_5_MOE = replace(
    _QWEN3_5,
    model_type="qwen3_5_moe_text",
    model_class="Qwen3_5MoeForCausalLM",
    linears=(*_QWEN3_5_MIXERS, *(linear for linear in _MLPS if SPARSE in linear.kinds)),
    parameters=(*_QWEN3_5.parameters, *QWEN2_MOE.parameters),
    kinds=lambda config: tuple(f"{mixer} {SPARSE}" for mixer in _qwen_mixers(config)),
    sizes=_mixture_sizes(expert_sizes(256, 8, 512, "moe_intermediate_size", _shared_width)),
    experts=QWEN2_MOE.experts,
    kv_heads=2,
)
HYBRIDS = (
    _QWEN3_5,
    _QWEN3_5_MOE,
    replace(
        _QWEN3_5_MOE,
        model_type="qwen3_next",
        model_class="Qwen3NextForCausalLM",
        linears=(
            *_only(FULL, _GATED_ATTENTION),
            *_only(
                LINEAR,
                (
                    _delta_linear("in_proj_qkvz", _KEYS, _KEYS, _VALUES, _VALUES),
                    _delta_linear("in_proj_ba", _HEADS, _HEADS),
                    _DELTA_OUT,
                ),
            ),
            *_MLPS,
        ),
        kinds=lambda config: tuple(map(" ".join, zip(_qwen_mixers(config), qwen_mlps(config), strict=True))),
        sizes=_mixture_sizes(expert_sizes(512, 10, 512, "moe_intermediate_size", _shared_width)),
    ),
    _LFM2,
)
