"""The split of an adapted linear's ranks into frozen and trained ones, for LoRA-SP (arXiv 2403.08822)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear


def split_(layer: LoraLayer, k: int) -> None:
    """Freeze k ranks of lora_A and k other ranks of lora_B.

    Where lora_A stays as drawn, lora_B trains from zero; where lora_B stays as drawn, lora_A trains from zero; in the
    other ranks both train. So every rank adds something, and exactly (r - k) · (in + out) parameters train. Which ranks
    these are means nothing, since all are drawn alike. The drawn lora_B has the law of lora_A, mirrored.
    """
    a, b = layer.lora_A["default"].get_parameter("weight").data, layer.lora_B["default"].get_parameter("weight").data
    rank, rows = len(a), len(b)  # a: (r, in_features), b: (out_features, r)
    trained_a, frozen_a = a[: rank - k].clone(), a[rank - k :].clone()
    trained_b, frozen_b = b[:, k:].clone(), torch.empty_like(b[:, :k])
    trained_a[:k] = 0  # the ranks whose lora_B is drawn
    nn.init.uniform_(frozen_b, -1 / math.sqrt(rows), 1 / math.sqrt(rows))
    layer.lora_A["default"] = Split(frozen_a, trained_a, axis=0)
    layer.lora_B["default"] = Split(frozen_b, trained_b, axis=1)


class Split(nn.Module):
    """A linear with some ranks frozen, which have neither gradients nor optimiser state.

    It is saved and loaded as the one `weight` that PEFT knows. lora_A is (trained, frozen) along its rows, lora_B is
    (frozen, trained) along its columns.

    Args:
        frozen: the frozen part of the weight.
        trained: the part that trains.
        axis: the axis of the ranks: 0 for lora_A (r, in_features), 1 for lora_B (out_features, r).
    """

    def __init__(self, frozen: Tensor, trained: Tensor, axis: int) -> None:
        super().__init__()
        self.frozen, self.axis = nn.Parameter(frozen, requires_grad=False), axis
        self.trained = nn.Parameter(trained)

    @property
    def weight(self) -> Tensor:
        """Both parts as one tensor, for whoever needs its dtype or its values."""
        return torch.cat(self._parts(), self.axis)

    def _parts(self) -> tuple[Tensor, Tensor]:
        return (self.trained, self.frozen) if self.axis == 0 else (self.frozen, self.trained)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., in_features) -> (..., out_features), part by part: autograd would keep a weight put together."""
        if self.axis == 0:
            return torch.cat([linear(x, part) for part in self._parts()], -1)
        first, second = self._parts()
        left, right = torch.split(x, [first.shape[1], second.shape[1]], -1)
        return linear(left, first) + linear(right, second)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        if (whole := state_dict.get(f"{prefix}weight")) is None:
            missing_keys.append(f"{prefix}weight")
            return
        parts = self._parts()
        values = torch.split(whole, [part.shape[self.axis] for part in parts], self.axis)
        for part, value in zip(parts, values, strict=True):
            part.data.copy_(value)
