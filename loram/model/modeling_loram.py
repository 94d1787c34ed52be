"""Pruned causal language models: the code that travels inside every pruned folder.

This file is self-contained (it needs torch and transformers, not loram), because a pruned folder carries a copy of
it: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then works in any tool. `import loram`
registers the same classes, so that no remote code is needed there.

A structurally pruned model is an ordinary model of its family in which some layers have fewer key-value groups (each
with its query heads) and fewer MLP channels. `config.per_layer_config` says how many; transformers' own modelling code
builds the layers, and here only the linears of the changed layers are replaced by smaller ones. Attention infers the
number of heads from the weights' shapes, and removing whole groups keeps the ratio of query to key-value heads.

A sparse model has the shapes of the full one, but its linears hold only the weights that are not zero, and a bit for
each place (`SparseLinear`). `config.sparsity` says in which layers and how many.
"""

import importlib
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional

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


def pack(kept: Tensor) -> Tensor:
    """Eight places a byte: (rows, columns) bool -> (rows, columns / 8) uint8; the inverse of `unpack`.

    Bit j of byte i is column 8 * i + j. Columns are a multiple of 8.
    """
    bits = kept.unflatten(1, (-1, 8)).to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=kept.device)
    return bits.sum(-1, dtype=torch.uint8)


def unpack(mask: Tensor) -> Tensor:
    """The bits of a mask: (rows, columns / 8) uint8 -> (rows, columns) bool; the inverse of `pack`."""
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask[..., None] & bits).ne(0).flatten(1)


def dense(values: Tensor, mask: Tensor) -> Tensor:
    """The weight that `values` (row by row, those at the mask's bits) stand for: (rows, columns), zero elsewhere."""
    kept = unpack(mask)
    return torch.zeros(kept.shape, dtype=values.dtype, device=values.device).masked_scatter_(kept, values)


class _SparseProduct(torch.autograd.Function):  # type: ignore[misc]
    """x W^T with W made from its values when it is needed, forward and backward; nothing dense is kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: "SparseLinear") -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(*([x] if ctx.needs_input_grad[1] else []))
        return functional.linear(x, dense(linear.values(), linear.mask))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), linear = gradients, ctx.linear
        by_x = by_values = None
        if ctx.needs_input_grad[0]:
            by_x = gradient @ dense(linear.values(), linear.mask).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            by_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2).to(gradient.dtype)
            by_values = by_weight[unpack(linear.mask)].to(linear.weight.dtype)
        return by_x, by_values, None


class SparseLinear(nn.Linear):  # type: ignore[misc]
    """A linear that holds only those of its weights that are not zero; to PEFT an nn.Linear, which it only calls.

    Args:
        like: the linear whose place it takes: sizes, bias, dtype and device.
        count: how many weights there are.

    `weight` is (count,), the weights in order of rows; `mask` is (out_features, in_features / 8) uint8, a bit a place.
    Weights can be trained: only those that are there get a gradient.
    """

    def __init__(self, like: nn.Linear, count: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        place = like.weight.device
        self.weight = nn.Parameter(torch.zeros(count, dtype=like.weight.dtype, device=place))
        self.register_parameter("bias", like.bias)
        empty = torch.zeros(self.out_features, self.in_features // 8, dtype=torch.uint8, device=place)
        self.register_buffer("mask", empty)

    def values(self) -> Tensor:
        """The weights, (count,), in the dtype to compute with."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        product = _SparseProduct.apply(x, self.weight, self)
        return product if self.bias is None else product + self.bias


def sparsify_layer_(layer: nn.Module, counts: dict[str, int]) -> None:
    """Replace linears of a decoder layer, by path, with sparse ones of so many values, in place."""
    for path, count in counts.items():
        layer.set_submodule(path, SparseLinear(layer.get_submodule(path), count))


def _pruned_config_class(base: Any, name: str) -> Any:
    def validate_architecture(self: Any) -> None:
        """The widths of single layers need not divide `hidden_size`: nothing to check here."""

    body = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a pruned model: narrow layers by `per_layer_config`, sparse by `sparsity`.",
        "__annotations__": {"bias_compensation": bool, "sparsity": dict | None},
        "bias_compensation": False,  # whether o_proj and down_proj of narrower layers have a bias
        "sparsity": None,  # {"layers": [first, one past the last], "values": {path of a linear: how many it holds}}
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
        for index in range(*config.sparsity["layers"]) if config.sparsity else ():
            sparsify_layer_(self.model.layers[index], config.sparsity["values"])

    body = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{base.__name__} whose layers may differ in width or be sparse, as `config` says.",
        "__init__": __init__,
        "config_class": config_class,
        "__annotations__": {"config": config_class},
    }
    return type(base)(name, (base,), body)


def pruned_classes(model_type: str) -> tuple[type, type]:
    """The (config class, causal LM class) of the pruned models of a family; the same two at every call."""
    prefix = FAMILIES[model_type][1]
    names = f"Loram{prefix}Config", f"Loram{prefix}ForCausalLM"
    if names[0] not in _classes:
        module = f"transformers.models.{FAMILIES[model_type][0]}.modeling_{FAMILIES[model_type][0]}"
        base_model = getattr(importlib.import_module(module), f"{prefix}ForCausalLM")
        _classes[names[0]] = _pruned_config_class(base_model.config_class, names[0])
        _classes[names[1]] = _pruned_model_class(base_model, _classes[names[0]], names[1])
    return _classes[names[0]], _classes[names[1]]


def register() -> None:
    """Make transformers' Auto classes know the pruned models of every family, so that loading needs no remote code."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for model_type in FAMILIES:
        config_class, model_class = pruned_classes(model_type)
        AutoConfig.register(config_class.model_type, config_class)  # type: ignore[attr-defined]
        AutoModelForCausalLM.register(config_class, model_class)
        # so that `save_pretrained` of a loaded model writes this code beside the weights again
        config_class.register_for_auto_class()  # type: ignore[attr-defined]
        model_class.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[attr-defined]


_classes: dict[str, type] = {}


def __getattr__(name: str) -> type:
    """Make a family's classes on first use (PEP 562): `LoramLlamaConfig`, `LoramLlamaForCausalLM`, ..."""
    for model_type, (_, prefix) in FAMILIES.items():
        if name in (f"Loram{prefix}Config", f"Loram{prefix}ForCausalLM"):
            return {cls.__name__: cls for cls in pruned_classes(model_type)}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
