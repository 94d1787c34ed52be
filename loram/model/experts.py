"""Families with mixtures of experts: one row each.

Their experts are 3-D tensors in the model, and on the hub mostly one tensor per expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loram.model.architecture import Scale, Windows
from loram.model.dense import LLAMA, QWEN_WINDOWS
from loram.model.parts import ATTENTION, HEAD_NORMS, KEYS, KV_GROUPS, MLP_LINEARS, NORMS, QKV, QKVO, QUERIES
from loram.model.segments import HIDDEN, ONE, SHARED, Experts, Linear, Norm, Parameter, Segment, Space

EXPERT_UNITS = Space(
    name="experts",
    size="num_experts",
    rounding="up",
    least="num_experts_per_tok",
    attributes=("num_experts",),
)
EXPERT_CHANNELS = Space(
    name="expert_channels",
    size="moe_intermediate_size",
    rounding="down",
    multiple=8,  # 16 bytes in 16 bits, without which torch's grouped matrix products refuse to work
    within=EXPERT_UNITS,
    attributes=("intermediate_dim", "intermediate_size"),
)
EXPERT = Segment(name="experts", unit="channel", space=EXPERT_UNITS)
EXPERT_GATE = Segment(name="gate", unit="channel", space=EXPERT_CHANNELS)
EXPERT_UP = Segment(name="up", unit="channel", space=EXPERT_CHANNELS)
EXPERT_PAIRS = Segment(name="gate and up", unit="pair", space=EXPERT_CHANNELS)
SINKS = Segment(name="sinks", unit="query", space=KV_GROUPS)

SPARSE, DENSE_MLP = "experts", "dense"  # the kinds of layers: with experts, and with an ordinary MLP
_NORMED, _WITH_SHARED = "normed", "shared"  # with norms of queries and keys, with experts that every token passes
_FUSED, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_GRANITE_FUSED, _GRANITE_DOWN = "block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"
_TENSORS = (
    Parameter(name="mlp.gate.weight", axes=((EXPERT,), (HIDDEN,)), kinds=(SPARSE,)),
    Parameter(name=_FUSED, axes=((EXPERT,), (EXPERT_GATE, EXPERT_UP), (HIDDEN,)), kinds=(SPARSE,)),
    Parameter(name=_DOWN, axes=((EXPERT,), (HIDDEN,), (EXPERT_UP,)), kinds=(SPARSE,)),
)
_EXPERTS = Experts(
    path="mlp.experts",
    router="mlp.gate.weight",
    in_files={
        _FUSED: ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        _DOWN: ("mlp.experts.{}.down_proj.weight",),
    },
)
# What config.json may call the number of experts, and of those that a token goes to.
_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ERNIE_BIAS = "mlp.gate.moe_statics.e_score_correction_bias"
_CHOSEN_KEYS = ("num_experts_per_tok", "moe_k")
_WIDE_NORMS = (
    *NORMS,
    Norm(path="self_attn.q_norm", width=QUERIES),
    Norm(path="self_attn.k_norm", width=KEYS),
)


def _only(kind: str, linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
    """Return linears that only one kind of layers has, and that get no adapter unless they are named."""
    return tuple(replace(linear, kinds=(kind,), adapted=False) for linear in linears)


def _shared(module: str, kind: str) -> tuple[Linear, ...]:
    """Return the linears of the experts that every token passes, which one kind of layers has in a module."""
    return _only(
        kind,
        (
            Linear(path=f"{module}.gate_proj", reads="mlp", rows=(SHARED,)),
            Linear(path=f"{module}.up_proj", reads="mlp", rows=(SHARED,)),
            Linear(path=f"{module}.down_proj", reads="shared", columns=(SHARED,)),
        ),
    )


def _first(config: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    """Return the value of the first key that a config.json has."""
    return next((int(config[name]) for name in names if config.get(name) is not None), default)


def expert_sizes(
    experts: int, chosen: int, width: int, key: str, shared: Callable[[Mapping[str, Any], int], int] | None = None
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return how a family's config.json gives the sizes of experts.

    Args:
        experts, chosen, width: transformers' defaults: how many experts a layer has, how many of them a token goes to,
            and how wide each is.
        key: the key of the width. Where it is `intermediate_size`, no layer has an ordinary MLP.
        shared: (config, width of an expert) -> the width of the experts that every token passes, together.
    """

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        one = config.get(key, width)
        return {
            "num_experts": _first(config, _EXPERTS_KEYS, experts),
            "num_experts_per_tok": _first(config, _CHOSEN_KEYS, chosen),
            "moe_intermediate_size": one,
            **({"intermediate_size": None} if key == "intermediate_size" else {}),
            **({} if shared is None else {"shared_intermediate_size": shared(config, one)}),
        }

    return read


def qwen_mlps(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which layers of Qwen's mixtures have experts, and which an ordinary MLP, as kinds of layers."""
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    return tuple(
        DENSE_MLP if layer in dense or (layer + 1) % step else SPARSE for layer in range(config["num_hidden_layers"])
    )


def _glm_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    dense, normed = config.get("first_k_dense_replace", 1), f" {_NORMED}" if config.get("use_qk_norm") else ""
    return tuple((DENSE_MLP if layer < dense else SPARSE) + normed for layer in range(config["num_hidden_layers"]))


def _ernie_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    layers, step = config["num_hidden_layers"], config.get("moe_layer_interval", 1)
    first, last = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", -1)
    sparse = f"{SPARSE} {_WITH_SHARED}" if config.get("moe_num_shared_experts", 2) else SPARSE
    within = range(first, (layers if last == -1 else last + 1))
    return tuple(sparse if layer in within and (layer + 1) % step == 0 else DENSE_MLP for layer in range(layers))


_QWEN3 = replace(
    LLAMA,
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    linears=(*ATTENTION, *_only(DENSE_MLP, MLP_LINEARS)),
    norms=(*NORMS, *HEAD_NORMS),
    parameters=_TENSORS,
    kinds=qwen_mlps,
    sizes=expert_sizes(128, 8, 768, "moe_intermediate_size"),
    experts=_EXPERTS,
    biases={"attention_bias": QKVO},
    kv_heads=4,
    windows=replace(QWEN_WINDOWS, slides=lambda layer, config: True),
)
_MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    linears=ATTENTION,
    parameters=tuple(replace(part, kinds=()) for part in _TENSORS),
    sizes=expert_sizes(8, 2, 14336, "intermediate_size"),
    experts=replace(
        _EXPERTS,
        in_files={
            _FUSED: ("mlp.experts.{}.w1.weight", "mlp.experts.{}.w3.weight"),
            _DOWN: ("mlp.experts.{}.w2.weight",),
        },
        renamed={"block_sparse_moe.": "mlp."},
    ),
    biases={},
    kv_heads=8,
    windows=Windows(slides=lambda layer, config: True, default=None),
)
QWEN2_MOE = replace(
    _QWEN3,
    model_type="qwen2_moe",
    model_class="Qwen2MoeForCausalLM",
    linears=(*_QWEN3.linears, *_shared("mlp.shared_expert", SPARSE)),
    parameters=(
        *_TENSORS,
        Parameter(name="mlp.shared_expert_gate.weight", axes=((ONE,), (HIDDEN,)), kinds=(SPARSE,)),
    ),
    norms=NORMS,
    sizes=expert_sizes(
        *(60, 4, 1408, "moe_intermediate_size"),
        lambda config, width: config.get("shared_expert_intermediate_size", 5632),
    ),
    biases={"qkv_bias": QKV},
    on_by_default=("qkv_bias",),
    kv_heads=16,
    windows=replace(
        QWEN_WINDOWS,
        slides=lambda layer, config: layer % 2 == 0 and layer < config.get("max_window_layers", 28),
    ),
)
EXPERTS = (
    _QWEN3,
    _MIXTRAL,
    replace(
        LLAMA,
        model_type="gpt_oss",
        model_class="GptOssForCausalLM",
        linears=ATTENTION,
        parameters=(
            Parameter(name="self_attn.sinks", axes=((SINKS,),)),
            Parameter(name="mlp.router.weight", axes=((EXPERT,), (HIDDEN,))),
            Parameter(name="mlp.router.bias", axes=((EXPERT,),)),
            Parameter(name=_FUSED, axes=((EXPERT,), (HIDDEN,), (EXPERT_PAIRS,))),
            Parameter(name=f"{_FUSED}_bias", axes=((EXPERT,), (EXPERT_PAIRS,))),
            Parameter(name=_DOWN, axes=((EXPERT,), (EXPERT_UP,), (HIDDEN,))),
            Parameter(name=f"{_DOWN}_bias", axes=((EXPERT,), (HIDDEN,))),
        ),
        sizes=expert_sizes(128, 4, 2880, "intermediate_size"),
        experts=replace(_EXPERTS, router="mlp.router.weight", kept_values=6, in_files={}, transposed=True),
        biases={"attention_bias": QKVO, "always": ("mlp.router",)},
        on_by_default=("attention_bias",),
        kv_heads=8,
        head_dim=64,
        windows=Windows(slides=lambda layer, config: layer % 2 == 0, default=128),
    ),
    replace(
        LLAMA,
        model_type="glm4_moe",
        model_class="Glm4MoeForCausalLM",
        linears=(*ATTENTION, *_only(DENSE_MLP, MLP_LINEARS), *_shared("mlp.shared_experts", SPARSE)),
        norms=(*NORMS, *(replace(norm, kinds=(_NORMED,)) for norm in HEAD_NORMS)),
        parameters=(
            *_TENSORS,
            Parameter(name="mlp.gate.e_score_correction_bias", axes=((EXPERT,),), kinds=(SPARSE,), buffer=True),
        ),
        kinds=_glm_kinds,
        sizes=expert_sizes(
            *(128, 8, 1408, "moe_intermediate_size"), lambda config, width: width * config.get("n_shared_experts", 1)
        ),
        experts=replace(_EXPERTS, groups="n_group", balanced_by_loss=False),
        biases={"attention_bias": QKV},
        kv_heads=8,
        partial_rotary=0.5,
        unused=("model.layers.{}.",),
    ),
    replace(
        LLAMA,
        model_type="olmoe",
        model_class="OlmoeForCausalLM",
        linears=ATTENTION,
        norms=_WIDE_NORMS,
        parameters=_MIXTRAL.parameters,
        sizes=expert_sizes(64, 8, 2048, "intermediate_size"),
        experts=_EXPERTS,
        biases={"attention_bias": QKVO},
    ),
    QWEN2_MOE,
    replace(
        LLAMA,
        model_type="ernie4_5_moe",
        model_class="Ernie4_5_MoeForCausalLM",
        linears=(
            *ATTENTION,
            *_only(DENSE_MLP, MLP_LINEARS),
            *_shared("mlp.shared_experts", _WITH_SHARED),
        ),
        parameters=(
            *_TENSORS,
            Parameter(name=_ERNIE_BIAS, axes=((ONE,), (EXPERT,)), kinds=(SPARSE,)),
        ),
        kinds=_ernie_kinds,
        sizes=expert_sizes(
            *(64, 6, 1536, "moe_intermediate_size"),
            lambda config, width: width * config.get("moe_num_shared_experts", 2),
        ),
        experts=replace(_EXPERTS, renamed={"mlp.moe_statics.": "mlp.gate.moe_statics."}),
        biases={},
        kv_heads=4,
        tied=True,
        rotary_by_layer=True,
        rotary_in_float32=True,
        dropouts={},
        unused=("model.mtp_",),
    ),
    replace(
        _MIXTRAL,
        model_type="minimax_m2",
        model_class="MiniMaxM2ForCausalLM",
        norms=_WIDE_NORMS,
        parameters=(
            *_MIXTRAL.parameters,
            Parameter(name="mlp.e_score_correction_bias", axes=((EXPERT,),), buffer=True),
        ),
        sizes=expert_sizes(256, 8, 1536, "intermediate_size"),
        head_dim=128,
        windows=None,
        partial_rotary=1.0,
    ),
    replace(
        LLAMA,
        model_type="granitemoe",
        model_class="GraniteMoeForCausalLM",
        linears=ATTENTION,
        parameters=(
            Parameter(name="block_sparse_moe.router.weight", axes=((EXPERT,), (HIDDEN,))),
            Parameter(name=_GRANITE_FUSED, axes=((EXPERT,), (EXPERT_GATE, EXPERT_UP), (HIDDEN,))),
            Parameter(name=_GRANITE_DOWN, axes=((EXPERT,), (HIDDEN,), (EXPERT_UP,))),
        ),
        blocks=("self_attn", "block_sparse_moe"),
        sizes=expert_sizes(8, 2, 11008, "intermediate_size"),
        experts=Experts(
            path="block_sparse_moe.experts",
            router="block_sparse_moe.router.weight",
            in_files={},
            renamed={
                "block_sparse_moe.input_linear.weight": _GRANITE_FUSED,
                "block_sparse_moe.output_linear.weight": _GRANITE_DOWN,
                "block_sparse_moe.router.layer.": "block_sparse_moe.router.",
            },
        ),
        biases={"attention_bias": QKVO},
        logit_scale=Scale(key="logits_scaling", default=1.0, divides=True),
    ),
)
