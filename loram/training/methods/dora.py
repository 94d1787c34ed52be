"""DoRA (arXiv 2402.09353): an adapter that also learns the length of every row of the adapted weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loram.training.methods.method import Method

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Dora(Method):
    """PEFT's DoRA; recovery must know the lengths that the learnt ones began as."""

    def added_files(self, model: "nn.Module") -> Mapping[str, Mapping[str, "Tensor"]]:
        """Return the lengths of the rows of the frozen weights."""
        from loram.disk.adapter import ROW_LENGTHS_NAME

        return {ROW_LENGTHS_NAME: row_lengths(model)}


def row_lengths(model: "nn.Module") -> dict[str, "Tensor"]:
    """Return the length ‖W‖ of every row of each frozen weight that has an adapter, as DoRA's magnitudes begin.

    Returns:
        Module path in the base model -> (out_features,) float32, in host memory.
    """
    import torch
    from peft.utils.integrations import dequantize_module_weight

    from loram.training.methods.adapters import adapted_linears

    return {
        path: torch.linalg.vector_norm(dequantize_module_weight(layer.base_layer).detach().float(), dim=1).cpu()
        for path, layer in adapted_linears(model)
    }


DORA = Dora(
    name="dora",
    summary="both factors, and the length of every row of the adapted weight (arXiv 2402.09353)",
    lora={"use_dora": True},
    defaults={"lora_dropout": 0.0},  # with dropout, PEFT computes the base's output a second time
    anchored=False,
    sharded=True,
    in_float32="DoRA's magnitudes need float32",
    adds_files=True,
)
