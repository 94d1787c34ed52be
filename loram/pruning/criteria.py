"""Importance: small pure functions in one table. A criterion is one function and one row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor


class InputStatistics:
    """What a linear's inputs look like over the calibration text, gathered a micro-batch at a time.

    Args:
        features: in_features.
        width: how many neighbouring features are one head (1 for channels).

    `mean` and `_squares` are (features,) float64, by Chan's update; `_norms` is (features / width,).
    """

    def __init__(self, features: int, width: int, device: torch.device) -> None:
        self.width, self.count = width, 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self.mean)  # summed squared distances from the mean
        self._norms = torch.zeros(features // width, dtype=torch.float64, device=device)

    def add_(self, inputs: Tensor, real: Tensor) -> None:
        """Take in one micro-batch.

        Args:
            inputs: (rows, width, features).
            real: (rows, width) bool, False where padded.
        """
        x = inputs[real]
        variance, mean = torch.var_mean(x, 0, correction=0)
        added, shift = len(x), mean.double() - self.mean
        total = self.count + added
        self._squares += variance.double() * added + shift**2 * (self.count * added / total)
        self.mean += shift * (added / total)
        self.count = total
        heads = inputs.unflatten(-1, (-1, self.width)).norm(dim=-1) * real[..., None]
        self._norms += ((heads.sum(1) / real.sum(1, keepdim=True)) ** 2).sum(0).double()

    @property
    def variance(self) -> Tensor:
        """Variance of every feature over all tokens: (features,)."""
        return self._squares / max(self.count - 1, 1)

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of every feature over all tokens: (features,)."""
        return (self._squares + self.count * self.mean**2).sqrt()

    @property
    def head_norm(self) -> Tensor:
        """Norm of every head's features, mean over a row's tokens, Euclidean over rows: (features / width,)."""
        return self._norms.sqrt()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What an importance may be told from: some rows of a weight, their gradient, and the linear's inputs.

    `weight` and `gradient` are (rows, in_features); what the criterion does not read may be None.
    """

    weight: Tensor
    gradient: Tensor | None = None
    inputs: InputStatistics | None = None


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How to tell what matters.

    Args:
        summary: one line for `--help` and reports.
        reads: `nothing` (units are ranked at random), `weights`, `inputs` (one forward pass over calibration text, too)
            or `gradient` (a backward pass, too).
        importance: evidence -> importance of every element, (rows, in_features); of every input with `by_input`,
            (in_features,). A unit's score is the sum over its part of the coupled matrices.
        by_input: only the matrices that consume the units count (o_proj, down_proj), and not their single elements.
        consumers: only the matrices that consume the units count.
    """

    summary: str
    reads: Literal["nothing", "weights", "inputs", "gradient"]
    importance: Callable[[Evidence], Tensor] | None = None
    by_input: bool = False
    consumers: bool = False


def magnitude(evidence: Evidence) -> Tensor:
    """|w|."""
    return evidence.weight.abs()


def magnitude_l2(evidence: Evidence) -> Tensor:
    """w², so that a unit's score is its squared Euclidean norm."""
    return evidence.weight**2


def taylor(evidence: Evidence) -> Tensor:
    """|w·g|: first-order estimate of the loss without the weight (LLM-Pruner, arXiv 2305.11627, equation 5)."""
    assert evidence.gradient is not None
    return (evidence.weight * evidence.gradient).abs()


def wanda(evidence: Evidence) -> Tensor:
    """|w_ij|·‖x_j‖ (Wanda, arXiv 2306.11695, equation 1), summed over a structure (Wanda-sp in FLAP's comparison)."""
    assert evidence.inputs is not None
    return evidence.weight.abs() * evidence.inputs.norm.to(evidence.weight)


def flap(evidence: Evidence) -> Tensor:
    """Var(x_j)·w_ij²: how much the output changes when an input is replaced by its mean (FLAP, arXiv 2312.11983)."""
    assert evidence.inputs is not None
    return evidence.weight**2 * evidence.inputs.variance.to(evidence.weight)


def activation(evidence: Evidence) -> Tensor:
    """Norm of a head's or channel's activation: mean over the sequence, Euclidean over rows (Minitron, 2407.14679)."""
    assert evidence.inputs is not None
    width = evidence.inputs.width
    return evidence.inputs.head_norm.repeat_interleave(width) / width


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "taylor": Criterion(summary="|weight x gradient|", reads="gradient", importance=taylor),
        "activation": Criterion(
            summary="norm of heads' and channels' activations (Minitron)",
            reads="inputs",
            importance=activation,
            by_input=True,
            consumers=True,
        ),
        "wanda": Criterion(summary="|weight| x norm of its input", reads="inputs", importance=wanda),
        "flap": Criterion(
            summary="variance of inputs x squared weight (FLAP)", reads="inputs", importance=flap, consumers=True
        ),
        "magnitude": Criterion(summary="|weight|", reads="weights", importance=magnitude),
        "magnitude_l2": Criterion(summary="weight squared", reads="weights", importance=magnitude_l2),
        "random": Criterion(summary="seeded random units", reads="nothing"),
    }
)
NEEDS_TEXT = frozenset(name for name, row in CRITERIA.items() if row.reads in ("inputs", "gradient"))
