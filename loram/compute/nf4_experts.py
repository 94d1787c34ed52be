"""Experts in NF4: each expert's matrices are quantised by themselves, and dequantised one at a time.

transformers has a table of ways to compute what experts give (`transformers.integrations.moe`). This file adds one that
multiplies by one expert after the other. No dequantised weight is kept for the backward pass. An adapter on experts
multiplies the tokens too, so its update is never put together with the weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, cast

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_IMPLEMENTATION, _SUFFIX = "loram_nf4", "_4bit"
Update = tuple[Tensor, Tensor, float]  # (experts, rows, rank), (experts, rank, columns), the scale of their product


class ExpertWeights(nn.ParameterList):
    """One tensor of all experts of a layer: a frozen matrix in NF4 per expert, (out_features, in_features)."""

    def product(self, expert: int, x: Tensor) -> Tensor:
        """Return x W^T for the weight W of one expert: (tokens, in_features) -> (tokens, out_features).

        W is dequantised in the forward pass and again in the backward pass. The product has the dtype of x.
        """
        weight = cast(Params4bit, self[expert])
        state = weight.quant_state
        return cast(Tensor, matmul_4bit(x.to(state.dtype), weight, quant_state=state)).to(x.dtype)


class ExpertStack(Tensor):
    """The 3-D tensor that some `ExpertWeights` have taken the place of, without values, for PEFT.

    PEFT's `target_parameters` looks for a parameter of that shape, and adds updates to it in each forward pass:
    W + scaling * first @ second. Here that makes a stack that has the factors beside it.

    Args:
        shape: (experts, rows, columns), as transformers has it.
        dtype, device: where and in which dtype the weights are when they are dequantised.
        updates: what was added.
    """

    updates: tuple[Update, ...]

    @staticmethod
    def __new__(
        cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, updates: tuple[Update, ...] = ()
    ) -> Self:
        """Make a tensor that has no memory of its own."""
        stack: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        stack.updates = updates
        return stack

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Keep factors that are added, and leave the rest to torch."""
        if func is torch.baddbmm:
            (stack, first, second), scaling = args, (kwargs or {})["alpha"]
            return cls(stack.shape, stack.dtype, stack.device, (*stack.updates, (first, second, scaling)))
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what torch does to register a parameter and to parametrise it; there is nothing to compute with."""
        (stack, *_) = args
        if func is torch.ops.aten.detach.default:
            return cls(stack.shape, stack.dtype, stack.device, stack.updates)
        if func is torch.ops.aten.set_.source_Tensor:  # to itself
            return stack
        raise NotImplementedError(f"{func}: experts in 4 bits have no values")


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


def open_experts_(model: nn.Module) -> None:
    """Let PEFT's `target_parameters` put adapters on experts in NF4, in place."""
    for experts, name, weights in list(_in_4bit(model)):
        state = cast(Params4bit, weights[0]).quant_state
        sides = reversed(state.shape) if experts.is_transposed else state.shape
        stack = ExpertStack(torch.Size((len(weights), *sides)), state.dtype, state.absmax.device)
        experts.register_parameter(name, nn.Parameter(stack, requires_grad=False))


def share_no_stacks_(model: nn.Module) -> None:
    """Keep DistributedDataParallel from sending what has no values from process to process, in place."""
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, ExpertStack)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def _in_4bit(model: nn.Module) -> Iterator[tuple[Any, str, ExpertWeights]]:
    """Yield (module of experts, name of the 3-D tensor, what is there in its place)."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, ExpertWeights):
                yield module, name.removesuffix(_SUFFIX), child


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
    """Return what one expert's matrix gives, with its bias and with what an adapter adds to it."""
    output: Tensor = getattr(experts, f"{name}{_SUFFIX}").product(expert, x)
    if experts.has_bias:
        output = output + getattr(experts, f"{name}_bias")[expert]
    if not is_parametrized(experts, name):
        return output
    for first, second, scaling in getattr(experts, name).updates:
        a, b = (first[expert], second[expert]) if experts.is_transposed else (second[expert].T, first[expert].T)
        output = output + scaling * (x.to(a.dtype) @ a @ b).to(x.dtype)  # (tokens, in_features) -> rank -> out_features
    return output
