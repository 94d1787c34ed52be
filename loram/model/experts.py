"""Families with mixtures of experts: one row each.

Their experts are 3-D tensors in the model, and on the hub mostly one tensor per expert.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loram.model.architecture import HIDDEN, Experts, Linear, Parameter, Segment, Space, Windows
from loram.model.dense import LLAMA, QWEN_WINDOWS
from loram.model.parts import ATTENTION, HEAD_NORMS, MLP_LINEARS, NORMS, QKVO

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

SPARSE, DENSE_MLP = "experts", "dense"  # the kinds of layers: with experts, and with an ordinary MLP
_FUSED, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
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


def _only(kind: str, linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
    """Return linears that only one kind of layers has, and that get no adapter unless they are named."""
    return tuple(replace(linear, kinds=(kind,), adapted=False) for linear in linears)


def _first(config: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    """Return the value of the first key that a config.json has."""
    return next((int(config[name]) for name in names if config.get(name) is not None), default)


def _qwen_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    return tuple(
        DENSE_MLP if layer in dense or (layer + 1) % step else SPARSE for layer in range(config["num_hidden_layers"])
    )


def _qwen_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": _first(config, ("num_local_experts", "num_experts"), 128),
        "moe_intermediate_size": config.get("moe_intermediate_size", 768),
        "num_experts_per_tok": config.get("num_experts_per_tok", 8),
    }


def _mixtral_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "intermediate_size": None,
        "num_experts": _first(config, ("num_local_experts", "num_experts"), 8),
        "moe_intermediate_size": config.get("intermediate_size", 14336),
        "num_experts_per_tok": config.get("num_experts_per_tok", 2),
    }


EXPERTS = (
    replace(
        LLAMA,
        model_type="qwen3_moe",
        model_class="Qwen3MoeForCausalLM",
        linears=(*ATTENTION, *_only(DENSE_MLP, MLP_LINEARS)),
        norms=(*NORMS, *HEAD_NORMS),
        parameters=_TENSORS,
        kinds=_qwen_kinds,
        sizes=_qwen_sizes,
        experts=_EXPERTS,
        biases={"attention_bias": QKVO},
        kv_heads=4,
        windows=replace(QWEN_WINDOWS, slides=lambda layer, config: True),
    ),
    replace(
        LLAMA,
        model_type="mixtral",
        model_class="MixtralForCausalLM",
        linears=ATTENTION,
        parameters=tuple(replace(part, kinds=()) for part in _TENSORS),
        sizes=_mixtral_sizes,
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
    ),
)
