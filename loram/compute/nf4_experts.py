"""Experts in NF4: each expert's matrices are quantised by themselves, and dequantised one at a time.

transformers has a table of ways to compute what experts give (`transformers.integrations.moe`). This file adds one that
multiplies by one expert after the other. No dequantised weight is kept for the backward pass.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_IMPLEMENTATION, _SUFFIX = "loram_nf4", "_4bit"


class ExpertWeights(nn.ParameterList):
    """One tensor of all experts of a layer: a frozen matrix in NF4 per expert, (out_features, in_features)."""

    def product(self, expert: int, x: Tensor) -> Tensor:
        """Return x W^T for the weight W of one expert: (tokens, in_features) -> (tokens, out_features).

        W is dequantised in the forward pass and again in the backward pass. The product has the dtype of x.
        """
        weight = cast(Params4bit, self[expert])
        state = weight.quant_state
        return cast(Tensor, matmul_4bit(x.to(state.dtype), weight, quant_state=state)).to(x.dtype)


def put_experts_(experts: nn.Module, name: str, weights: Iterable[Params4bit]) -> None:
    """Put matrices in NF4 in the place of a 3-D tensor of a module of experts.

    They get another name than the tensor had, because PEFT would take a module for a linear of that name.
    """
    delattr(experts, name)
    experts.add_module(f"{name}{_SUFFIX}", ExpertWeights(weights))


def use_4bit_experts_(model: PreTrainedModel) -> None:
    """Make a model whose experts are `ExpertWeights` compute with them, in place."""
    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _forward)
    config: Any = model.config
    config._experts_implementation = _IMPLEMENTATION  # the model's method looks at code that pruned models inherit


def _forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return what the experts of a layer give for each token, summed with the router's weights.

    Args:
        experts: transformers' module of a family's experts.
        hidden_states: (tokens, hidden size).
        top_k_index: the numbers of each token's experts, (tokens, k).
        top_k_weights: the weights of each token's experts, (tokens, k).
    """
    tokens, k = top_k_index.shape
    numbers, order = top_k_index.flatten().sort(stable=True)  # (tokens * k,): the pairs of a token and an expert
    chosen, counts = numbers.unique_consecutive(return_counts=True)
    inputs = hidden_states[order // k].split(counts.tolist())
    outputs = [_expert(experts, expert, x) for expert, x in zip(chosen.tolist(), inputs, strict=True)]
    weighted = torch.cat(outputs) * top_k_weights.flatten()[order, None]
    return weighted[order.argsort()].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def _expert(experts: Any, expert: int, x: Tensor) -> Tensor:
    """Return what one expert gives: (tokens, hidden size) -> (tokens, hidden size)."""
    if experts.has_gate:
        channels = experts._apply_gate(_linear(experts, "gate_up_proj", expert, x))
    else:
        channels = experts.act_fn(_linear(experts, "up_proj", expert, x))
    return _linear(experts, "down_proj", expert, channels)


def _linear(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    product: Tensor = getattr(experts, f"{name}{_SUFFIX}").product(expert, x)
    return product + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else product
