"""Full fine-tuning: all of the model's own weights train."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loram.base.options import Options
from loram.training.methods.method import Method

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """All weights train; `r` is the rank of the adapter that is extracted from a pruned model."""

    weights: bool = True
    anchored: bool = False
    sharded: bool = True
    in_float32: str = "the weights themselves train, in float32"
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"r": 64})
    trainer: Mapping[str, Any] = field(default_factory=lambda: {"learning_rate": 2e-5})

    def specialise_(self, model: "nn.Module", own: Options | None, *, pruned: bool) -> None:
        """Let all weights train that the result has a place for."""
        from loram.training.methods.weights import unfreeze_

        unfreeze_(model, pruned=pruned, around=True)


FULL = Full(name="full", summary="all weights")
