"""Families whose layers differ in size: one row each.

Gemma 4's layers with a sliding window and with full attention have heads of different width, and the last layers may
read the keys and values of an earlier one. Where a layer shares its keys and values, its key-value groups stay whole,
and so do those of the layers that read them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loram.model.architecture import Softcap, Windows
from loram.model.dense import LLAMA
from loram.model.experts import EXPERT, EXPERT_GATE, EXPERT_UP
from loram.model.parts import ATTENTION, FOUR_NORMS, MLP_LINEARS, QKVO, WHOLE_KEYS, WHOLE_QUERIES, WHOLE_VALUES
from loram.model.segments import HIDDEN, ONE, ONE_HEAD, Argument, Experts, Linear, Norm, Parameter, Segment

_SLIDING, _FULL = "sliding_attention", "full_attention"
# Words in the kind of a layer of Gemma 4. Its keys and values are its own, or also those of later layers (`source`), or
# an earlier layer's (`shared`); a layer without values of its own takes its keys for them.
_OWN, _OWN_VALUES, _SOURCE, _SOURCE_VALUES, _SHARED = "own", "own_values", "source", "source_values", "shared"
_WIDE, _INPUT, _EXPERTS = "wide", "layer_input", "experts"

_LAYER_INPUT = Segment(name="layer input", unit="layer_input")
_LAYER_INPUTS = Segment(name="inputs of all layers", unit="layer_inputs")
_TOKENS = Segment(name="tokens", unit="layer_input_vocabulary")


def _layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return how each layer attends; the last one sees all tokens whatever the config says."""
    layers = config.get("num_hidden_layers", 0)
    listed = config.get("layer_types") or [_SLIDING if _slides(layer, config) else _FULL for layer in range(layers)]
    return (*listed[:-1], _FULL)


def _slides(layer: int, config: Mapping[str, Any]) -> bool:
    return (layer + 1) % 6 != 0 and layer + 1 != config.get("num_hidden_layers")


def _first_shared(config: Mapping[str, Any]) -> int:
    """Return the first of the layers that read an earlier layer's keys and values."""
    return int(config.get("num_hidden_layers", 0)) - int(config.get("num_kv_shared_layers", 0))


def _sources(config: Mapping[str, Any]) -> set[int]:
    """Return the layers whose keys and values later ones read: of each kind of attention, the last with its own."""
    types, first = _layer_types(config), _first_shared(config)
    last = {kind: layer for layer, kind in enumerate(types[:first])}
    return {last[kind] for kind in types[first:] if kind in last}


def _kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    types, first, sources = _layer_types(config), _first_shared(config), _sources(config)
    everywhere = [
        *([_INPUT] if config.get("hidden_size_per_layer_input", 256) else []),
        *([_EXPERTS] if config.get("enable_moe_block") else []),
    ]
    kinds = []
    for layer, attention in enumerate(types):
        values = attention == _SLIDING or not config.get("attention_k_eq_v")
        if layer >= first:
            words = [_SHARED, *([_WIDE] if config.get("use_double_wide_mlp") else [])]
        elif layer in sources:
            words = [_SOURCE, *([_SOURCE_VALUES] if values else [])]
        else:
            words = [_OWN, *([_OWN_VALUES] if values else [])]
        kinds.append(" ".join([attention, *words, *everywhere]))
    return tuple(kinds)


def _of_full_layers(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of layers with full attention that differ from the model's."""
    listed = config.get("per_layer_config")
    if listed is not None:  # transformers writes it in place of the other two keys
        own = {int(layer): sizes for layer, sizes in listed.items()}
        return dict(own.get(_layer_types(config).index(_FULL), {}))
    heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
    return {"head_dim": config.get("global_head_dim", 512), **({} if heads is None else {"num_key_value_heads": heads})}


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    by_kind = {_FULL: _of_full_layers(config)}
    if config.get("use_double_wide_mlp") and _first_shared(config) < config.get("num_hidden_layers", 0):
        by_kind[_WIDE] = {"intermediate_size": 2 * config.get("intermediate_size", 0)}
    routed = bool(config.get("enable_moe_block"))
    width = config.get("hidden_size_per_layer_input", 256)
    return {
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": config.get("vocab_size_per_layer_input", 262_144) if width else 0,
        "num_experts": config.get("num_experts") if routed else None,
        "num_experts_per_tok": config.get("top_k_experts") if routed else None,
        "moe_intermediate_size": config.get("moe_intermediate_size") if routed else None,
        "sizes_by_kind": {kind: sizes for kind, sizes in by_kind.items() if sizes},
    }


def _unfit(config: Mapping[str, Any]) -> str | None:
    if config.get("use_bidirectional_attention") == "all":
        return "use_bidirectional_attention is 'all', and only models that predict the next token are supported"
    types, first = _layer_types(config), _first_shared(config)
    if unread := sorted(set(types[first:]) - set(types[:first])):
        return f"num_kv_shared_layers leaves no layer with {unread[0]} that has keys and values of its own"
    full = _of_full_layers(config)
    own = {int(layer): sizes for layer, sizes in (config.get("per_layer_config") or {}).items()}
    known = {"head_dim", "num_key_value_heads"}
    for layer, kind in enumerate(types if config.get("per_layer_config") is not None else ()):
        if own.get(layer, {}) != (full if kind == _FULL else {}) or not known.issuperset(full):
            return (
                f"per_layer_config gives layer {layer} sizes of its own; only head_dim and num_key_value_heads of all "
                "layers with full attention may differ"
            )
    return None


def _cut_or_whole(linear: Linear, whole: Linear, cut_in: str, whole_in: tuple[str, ...]) -> tuple[Linear, Linear]:
    """Return a linear of attention as two kinds of layers have it: with units that can go, and whole."""
    return replace(linear, kinds=(cut_in,)), replace(whole, path=linear.path, reads=linear.reads, kinds=whole_in)


_Q, _K, _V, _O = ATTENTION
_GEMMA4 = replace(
    LLAMA,
    model_type="gemma4_text",
    model_class="Gemma4ForCausalLM",
    linears=(
        *_cut_or_whole(_Q, replace(_Q, rows=(WHOLE_QUERIES,)), _OWN, (_SOURCE, _SHARED)),
        *_cut_or_whole(_K, replace(_K, rows=(WHOLE_KEYS,)), _OWN, (_SOURCE,)),
        *_cut_or_whole(_V, replace(_V, rows=(WHOLE_VALUES,)), _OWN_VALUES, (_SOURCE_VALUES,)),
        *_cut_or_whole(_O, replace(_O, columns=(WHOLE_QUERIES,)), _OWN, (_SOURCE, _SHARED)),
        *MLP_LINEARS,
        Linear(path="per_layer_input_gate", reads="hidden", rows=(_LAYER_INPUT,), kinds=(_INPUT,), adapted=False),
        Linear(
            path="per_layer_projection", reads="layer_input", columns=(_LAYER_INPUT,), kinds=(_INPUT,), adapted=False
        ),
    ),
    norms=(
        *FOUR_NORMS,
        Norm(path="self_attn.q_norm", width=ONE_HEAD),
        Norm(path="self_attn.k_norm", width=ONE_HEAD, kinds=(_OWN, _SOURCE)),
        Norm(path="post_per_layer_input_norm", kinds=(_INPUT,)),
        Norm(path="post_feedforward_layernorm_1", kinds=(_EXPERTS,)),
        Norm(path="post_feedforward_layernorm_2", kinds=(_EXPERTS,)),
        Norm(path="pre_feedforward_layernorm_2", kinds=(_EXPERTS,)),
    ),
    parameters=(
        Parameter(name="layer_scalar", axes=((ONE,),), buffer=True),
        Parameter(name="router.proj.weight", axes=((EXPERT,), (HIDDEN,)), kinds=(_EXPERTS,)),
        Parameter(name="router.scale", axes=((HIDDEN,),), kinds=(_EXPERTS,)),
        Parameter(name="router.per_expert_scale", axes=((EXPERT,),), kinds=(_EXPERTS,)),
        Parameter(
            name="experts.gate_up_proj", axes=((EXPERT,), (EXPERT_GATE, EXPERT_UP), (HIDDEN,)), kinds=(_EXPERTS,)
        ),
        Parameter(name="experts.down_proj", axes=((EXPERT,), (HIDDEN,), (EXPERT_UP,)), kinds=(_EXPERTS,)),
    ),
    outside=(
        Parameter(name="embed_tokens_per_layer.weight", axes=((_TOKENS,), (_LAYER_INPUTS,)), kinds=(_INPUT,)),
        Parameter(name="per_layer_model_projection.weight", axes=((_LAYER_INPUTS,), (HIDDEN,)), kinds=(_INPUT,)),
        Parameter(name="per_layer_projection_norm.weight", axes=((_LAYER_INPUT,),), kinds=(_INPUT,)),
    ),
    second_embedding="embed_tokens_per_layer",
    layer_input=Argument(name="per_layer_input", readers=(_INPUT,)),
    shared_states=Argument(name="shared_kv_states", readers=(_SHARED,)),
    kinds=_kinds,
    sizes=_sizes,
    unfit=_unfit,
    experts=Experts(path="experts", router="router.proj.weight", in_files={}, balanced_by_loss=False),
    unused_in={_SHARED: tuple(f"self_attn.{name}." for name in ("k_proj", "v_proj", "k_norm", "v_norm"))},
    biases={"attention_bias": QKVO},
    kv_heads=4,
    head_dim=256,
    tied=True,
    windows=Windows(slides=_slides, default=512),
    logit_softcap=Softcap(key="final_logit_softcapping", default=None),
    norm_lengths=2,
    norms_values=True,
    adds_only=False,  # it multiplies them too
    rotary_by_window=True,
)
VARIED = (_GEMMA4,)
