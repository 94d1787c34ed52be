"""Adapters that train in part: LoRA-FA and LoRA-SP, on top of PEFT's own; and what DoRA begins with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import linear

from loram.training.methods.table import LoraSpOptions, frozen_ranks


def specialise_(adapted: nn.Module, method: str, options: LoraSpOptions | None) -> None:
    """Make a model with PEFT's adapter on it train as the method says.

    Args:
        adapted: the model.
        method: a key of `METHODS`.
        options: the method's own, with nothing left out; None where it has none.
    """
    for module in adapted.modules():
        if "default" not in getattr(module, "lora_A", {}):
            continue
        if method == "lora-fa":
            module.lora_A["default"].weight.requires_grad_(False)
        elif method == "lora-sp":
            assert options is not None
            split_(module.lora_A, module.lora_B, options.share)


def draw_from_data_(adapted: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Begin lora_A in the directions that a linear's inputs vary most in, with more ranks where they explain more (EVA,
    arXiv 2410.07170), as PEFT does it.

    Args:
        adapted: the model, with `init_lora_weights` "eva".
        batches: what its inputs are gathered on.
    """
    from peft import initialize_lora_eva_weights

    device = next(adapted.parameters()).device
    given = [{name: batch[name].to(device) for name in ("input_ids", "attention_mask")} for batch in batches]
    initialize_lora_eva_weights(adapted.eval(), given, show_progress_bar=False)


def split_(factors_a: nn.ModuleDict, factors_b: nn.ModuleDict, share: float) -> None:
    """Divide the ranks of one adapted linear as LoRA-SP does (arXiv 2403.08822), by rank and not by matrix.

    Of k ranks lora_A stays as drawn and lora_B trains from zero; of k others lora_B stays as drawn and lora_A trains
    from zero; the rest trains both. So every rank adds something, and exactly a share of r (in + out) trains. Which
    ranks they are means nothing, since all are drawn alike. The drawn lora_B has the law of lora_A, mirrored.
    """
    a, b = factors_a["default"], factors_b["default"]
    rank, (rows, _) = a.weight.shape[0], b.weight.shape
    k = frozen_ranks(rank, share)
    trained_a, frozen_a = a.weight.data[: rank - k].clone(), a.weight.data[rank - k :].clone()
    trained_b, frozen_b = b.weight.data[:, k:].clone(), torch.empty_like(b.weight.data[:, :k])
    trained_a[:k] = 0  # whose lora_B is drawn
    nn.init.uniform_(frozen_b, -1 / math.sqrt(rows), 1 / math.sqrt(rows))
    factors_a["default"] = Split(frozen_a, trained_a, axis=0)
    factors_b["default"] = Split(frozen_b, trained_b, axis=1)


class Split(nn.Module):  # type: ignore[misc]
    """A linear of which some ranks are frozen and have neither gradients nor an optimiser's state.

    It is saved and read as the one `weight` that PEFT knows. lora_A is (trained, frozen) along its rows, lora_B
    (frozen, trained) along its columns.

    Args:
        frozen, trained: the two parts.
        axis: that of the ranks.
    """

    def __init__(self, frozen: Tensor, trained: Tensor, axis: int) -> None:
        super().__init__()
        self.frozen, self.axis = nn.Parameter(frozen, requires_grad=False), axis
        self.trained = nn.Parameter(trained)

    @property
    def weight(self) -> Tensor:
        """Both parts as one, for whoever asks for its dtype or its values."""
        return torch.cat(self._parts(), self.axis)

    def _parts(self) -> tuple[Tensor, Tensor]:
        return (self.trained, self.frozen) if self.axis == 0 else (self.frozen, self.trained)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), part by part: a weight put together would be kept for backward."""
        if self.axis == 0:
            return torch.cat([linear(x, part) for part in self._parts()], -1)
        first, second = self._parts()
        left, right = x.split([first.shape[1], second.shape[1]], -1)
        return linear(left, first) + linear(right, second)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if (whole := state_dict.get(f"{prefix}weight")) is None:
            rest[2].append(f"{prefix}weight")  # the missing keys
            return
        parts = self._parts()
        for part, value in zip(parts, whole.split([part.shape[self.axis] for part in parts], self.axis), strict=True):
            part.data.copy_(value)


def row_lengths(adapted: nn.Module) -> dict[str, Tensor]:
    """Module path in the base model -> ‖W‖ of every row of its frozen weight, where it has an adapter.

    DoRA's magnitudes begin as these. (out_features,) float32, in host memory.
    """
    return {
        name.removeprefix("base_model.model."): torch.linalg.vector_norm(
            dequantize_module_weight(module.base_layer).detach().float(), dim=1
        ).cpu()
        for name, module in adapted.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
