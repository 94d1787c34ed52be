"""Structurally pruned causal language models: the code that travels inside every pruned folder.

This file is self-contained (it needs torch and transformers, not loram), because a pruned folder carries a copy of
it: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then works in any tool. `import loram`
registers the same classes, so that no remote code is needed there.

A pruned model is an ordinary model of its family in which some layers have fewer key-value groups (each with its
query heads) and fewer MLP channels. `config.per_layer_config` says how many; transformers' own modelling code builds
the layers, and here only the linears of the changed layers are replaced by smaller ones. Attention infers the number
of heads from the weights' shapes, and removing whole groups keeps the ratio of query to key-value heads.
"""

import importlib
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn

# model_type -> (transformers module, prefix of its class names)
FAMILIES = {
    "llama": ("llama", "Llama"),
    "mistral": ("mistral", "Mistral"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "gemma2": ("gemma2", "Gemma2"),
    "gemma3_text": ("gemma3", "Gemma3"),
}


def _resized(linear: nn.Linear, out_features: int, in_features: int, bias: bool = False) -> nn.Linear:
    """A fresh linear of another shape, like `linear` in everything else (dtype, device, bias but for a new one)."""
    bias = bias or linear.bias is not None
    if (linear.out_features, linear.in_features, linear.bias is not None) == (out_features, in_features, bias):
        return linear
    return nn.Linear(in_features, out_features, bias, device=linear.weight.device, dtype=linear.weight.dtype)


def resize_layer_(layer: nn.Module, config: Any) -> None:
    """Give a decoder layer the widths that `config` (its entry in `per_layer_config`) names, in place."""
    attention, mlp, hidden = layer.self_attn, layer.mlp, config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention.q_proj = _resized(attention.q_proj, queries, hidden)
    attention.k_proj = _resized(attention.k_proj, keys, hidden)
    attention.v_proj = _resized(attention.v_proj, keys, hidden)
    attention.o_proj = _resized(attention.o_proj, hidden, queries, config.bias_compensation)
    mlp.intermediate_size = config.intermediate_size
    mlp.gate_proj = _resized(mlp.gate_proj, config.intermediate_size, hidden)
    mlp.up_proj = _resized(mlp.up_proj, config.intermediate_size, hidden)
    mlp.down_proj = _resized(mlp.down_proj, hidden, config.intermediate_size, config.bias_compensation)


def _pruned_config_class(base: Any, name: str) -> Any:
    def validate_architecture(self: Any) -> None:
        """The widths of single layers need not divide `hidden_size`: nothing to check here."""

    body = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a structurally pruned model; `per_layer_config` holds the narrower layers.",
        "__annotations__": {"bias_compensation": bool},
        "bias_compensation": False,  # whether o_proj and down_proj of narrower layers have a bias
        "model_type": f"loram_{base.model_type}",
        "validate_architecture": validate_architecture,
    }
    return strict(type(base)(name, (base,), body))


def _pruned_model_class(base: Any, config_class: Any, name: str) -> Any:
    def __init__(self: Any, config: Any) -> None:
        # The family's own constructor reads the global widths, which a config with per-layer widths refuses to tell.
        # So it sees the config without them first.
        widths = config.to_dict().get("per_layer_config", {})
        config.per_layer_config = None
        try:
            base.__init__(self, config)
        finally:
            config.per_layer_config = widths
        for index in map(int, widths):
            resize_layer_(self.model.layers[index], config.per_layer_config[index])

    body = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{base.__name__} whose layers may differ in width, as `config.per_layer_config` says.",
        "__init__": __init__,
        "config_class": config_class,
        "__annotations__": {"config": config_class},
    }
    return type(base)(name, (base,), body)


def pruned_classes(model_type: str) -> tuple[type, type]:
    """The (config class, causal LM class) of the pruned models of a family."""
    module, prefix = FAMILIES[model_type]
    package = f"transformers.models.{module}"
    base_model = getattr(importlib.import_module(f"{package}.modeling_{module}"), f"{prefix}ForCausalLM")
    config = _pruned_config_class(base_model.config_class, f"Loram{prefix}Config")
    return config, _pruned_model_class(base_model, config, f"Loram{prefix}ForCausalLM")


_classes: dict[str, type] = {}


def __getattr__(name: str) -> type:
    """Make a family's classes on first use (PEP 562): `LoramLlamaConfig`, `LoramLlamaForCausalLM`, ..."""
    if name not in _classes:
        for model_type, (_, prefix) in FAMILIES.items():
            if name in (f"Loram{prefix}Config", f"Loram{prefix}ForCausalLM"):
                pair = pruned_classes(model_type)
                _classes.update({cls.__name__: cls for cls in pair})
    if name not in _classes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _classes[name]
