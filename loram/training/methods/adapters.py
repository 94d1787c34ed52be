"""Adapters that differ from PEFT's plain LoRA: LoRA-FA and LoRA-SP train in part; EVA and DoRA begin differently."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import linear

from loram.training.methods.table import frozen_ranks


def specialise_(adapted: nn.Module, method: str, options: Mapping[str, Any] | None) -> None:
    """Make the adapter of a model train as the method requires.

    Args:
        adapted: a model with PEFT's adapter.
        method: a key of `METHODS`.
        options: all options of the method itself; None if it has none.
    """
    for module in adapted.modules():
        if not _has_factors(module):
            continue
        if method == "lora-fa":
            module.lora_A["default"].requires_grad_(False)
        elif method == "lora-sp":
            assert options is not None
            split_(module.lora_A, module.lora_B, options["share"])


def _has_factors(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Whether a module is a linear with the two factors of PEFT's one adapter."""
    return isinstance(module, LoraLayer) and "default" in module.lora_A


def draw_from_data_(adapted: PeftModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Initialise an adapter from data, as in EVA (arXiv 2410.07170), with PEFT's own function.

    The rows of lora_A become the directions in which the inputs of a linear vary most, and linears whose directions
    explain more of that variance get more ranks.

    Args:
        adapted: a model whose adapter has `init_lora_weights` "eva".
        batches: the batches, with `input_ids` and `attention_mask`, on which the inputs are gathered.
    """
    from peft import initialize_lora_eva_weights

    device = next(adapted.parameters()).device
    inputs = [{name: batch[name].to(device) for name in ("input_ids", "attention_mask")} for batch in batches]
    initialize_lora_eva_weights(adapted.eval(), inputs, show_progress_bar=False)


def split_(factors_a: nn.ModuleDict, factors_b: nn.ModuleDict, share: float) -> None:
    """Freeze a part of one linear's factors, as in LoRA-SP (arXiv 2403.08822), but by whole ranks.

    Let k be `frozen_ranks(r, share)`. In k ranks lora_A is frozen at its random values and lora_B trains from zero. In
    k other ranks lora_B is frozen at random values and lora_A trains from zero. The remaining ranks train both factors.
    So every rank contributes, and exactly the given share of the r (in + out) parameters trains. All ranks are drawn
    from the same distribution, so it does not matter which ones are frozen. The random lora_B is distributed like
    PEFT's lora_A, with `out` in the place of `in`.

    Args:
        factors_a: PEFT's `lora_A` of the linear; its adapter has a weight (r, in).
        factors_b: PEFT's `lora_B` of the linear; its adapter has a weight (out, r).
        share: the share of the parameters that trains, from 0.5 to 1.
    """
    a, b = _weight(factors_a), _weight(factors_b)
    rank, rows = b.shape[1], b.shape[0]
    k = frozen_ranks(rank, share)
    trained_a, frozen_a = a[: rank - k].clone(), a[rank - k :].clone()
    trained_b, frozen_b = b[:, k:].clone(), torch.empty_like(b[:, :k])
    trained_a[:k] = 0  # in these ranks lora_B is frozen at random values
    nn.init.uniform_(frozen_b, -1 / math.sqrt(rows), 1 / math.sqrt(rows))
    factors_a["default"] = SplitLinear(frozen_a, trained_a, axis=0)
    factors_b["default"] = SplitLinear(frozen_b, trained_b, axis=1)


def _weight(factors: nn.ModuleDict) -> Tensor:
    weight = factors["default"].weight
    assert isinstance(weight, Tensor)
    return weight.data


class SplitLinear(nn.Module):
    """A linear without bias in which some ranks are frozen, without gradients and without state of the optimiser.

    It is saved and loaded as the one `weight` that PEFT expects. In lora_A the trained ranks come first, as rows; in
    lora_B the frozen ranks come first, as columns.

    Args:
        frozen, trained: the two parts of the weight.
        axis: the axis of the ranks: 0 for lora_A, 1 for lora_B.
    """

    def __init__(self, frozen: Tensor, trained: Tensor, axis: int) -> None:
        super().__init__()
        self.frozen, self.axis = nn.Parameter(frozen, requires_grad=False), axis
        self.trained = nn.Parameter(trained)

    @property
    def weight(self) -> Tensor:
        """The whole weight, put together anew, for code that reads its dtype or its values."""
        return torch.cat(self._parts(), self.axis)

    def _parts(self) -> tuple[Tensor, Tensor]:
        return (self.trained, self.frozen) if self.axis == 0 else (self.frozen, self.trained)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). The parts stay apart, because autograd would keep a weight that is put together."""
        if self.axis == 0:
            return torch.cat([linear(x, part) for part in self._parts()], -1)
        first, second = self._parts()
        left, right = x.split([first.shape[1], second.shape[1]], -1)
        return linear(left, first) + linear(right, second)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if (whole := state_dict.get(f"{prefix}weight")) is None:
            rest[2].append(f"{prefix}weight")  # the list of missing keys
            return
        parts = self._parts()
        for part, value in zip(parts, whole.split([part.shape[self.axis] for part in parts], self.axis), strict=True):
            part.data.copy_(value)


def row_lengths(adapted: nn.Module) -> dict[str, Tensor]:
    """Compute the length ‖W‖ of each row of the frozen weights with an adapter; DoRA's magnitudes begin as these.

    Returns:
        The path of a module in the base model -> (out_features,) float32, in host memory.
    """
    return {
        name.removeprefix("base_model.model."): torch.linalg.vector_norm(
            dequantize_module_weight(module.base_layer).detach().float(), dim=1
        ).cpu()
        for name, module in adapted.named_modules()
        if _has_factors(module)
    }
