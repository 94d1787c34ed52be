"""Importance of single weights: small pure functions in one table. A criterion is one function and one row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How to tell what matters.

    Args:
        summary: one line for `--help` and reports.
        importance: (weight, gradient) of the same shape -> the importance of every element, same shape; None where
            units are ranked at random.
        needs_gradient: whether `importance` reads the gradient of the loss on calibration text.
    """

    summary: str
    importance: Callable[[Tensor, Tensor | None], Tensor] | None
    needs_gradient: bool = False


def magnitude(weight: Tensor, gradient: Tensor | None = None) -> Tensor:
    """|w|: the weight's size."""
    return weight.abs()


def taylor(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """|w·g|: first-order estimate of the loss without the weight (LLM-Pruner, arXiv 2305.11627, equation 5)."""
    assert gradient is not None
    return (weight * gradient).abs()


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "taylor": Criterion(summary="|weight x gradient| on calibration text", importance=taylor, needs_gradient=True),
        "magnitude": Criterion(summary="|weight|; reads no text", importance=magnitude),
        "random": Criterion(summary="seeded random units; reads no text", importance=None),
    }
)
