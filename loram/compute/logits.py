"""From what the head gives to logits: some families scale it, and some cap it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loram.model.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class LogitRule:
    """How logits follow from the outputs x of the head: softcap * tanh(scale * x / softcap), or scale * x.

    Args:
        scale: the factor on the head's outputs.
        softcap: the soft limit, as Gemma 2 has it; None is no limit.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, row: Architecture, config: Mapping[str, Any]) -> "LogitRule":
        """Return the rule of a model.

        Args:
            row: the family's row.
            config: the text model's config.
        """
        return cls(
            scale=1.0 if row.logit_scale is None else row.logit_scale.of(config),
            softcap=None if row.logit_softcap is None else row.logit_softcap.of(config),
        )

    def __call__(self, outputs: Tensor) -> Tensor:
        """Return the logits; they have the shape of the head's outputs."""
        scaled = outputs if self.scale == 1 else self.scale * outputs
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()

    def pull_back_(self, gradient: Tensor, logits: Tensor) -> None:
        """Turn the gradient by the logits into the gradient by the head's outputs, in place; both have one shape."""
        if self.softcap is not None:
            gradient *= 1 - (logits / self.softcap) ** 2  # the derivative of cap * tanh(x / cap)
        if self.scale != 1:
            gradient *= self.scale
