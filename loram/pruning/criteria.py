"""The criteria of structured pruning, as small pure functions in one table. A criterion is one function and one row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor


class InputStatistics:
    """Statistics of a linear's inputs over the calibration text, gathered one micro-batch at a time.

    All of them are float64. Mean and variance are updated as by Chan, Golub and LeVeque (1979).

    Args:
        features: the in_features of the linear.
        width: how many neighbouring features form one head (1 for channels).
        device: the device that holds the statistics.
    """

    def __init__(self, features: int, width: int, device: torch.device) -> None:
        self.width, self.count = width, 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self.mean)  # (features,) summed squared distances from the mean
        self._norms = torch.zeros(features // width, dtype=torch.float64, device=device)  # squared

    def add_(self, inputs: Tensor, real: Tensor) -> None:
        """Add one micro-batch.

        Args:
            inputs: (rows, width, features).
            real: (rows, width) bool, False where padded.
        """
        x = inputs[real]  # (tokens, features)
        variance, mean = torch.var_mean(x, 0, correction=0)
        added, shift = len(x), mean.double() - self.mean
        total = self.count + added
        self._squares += variance.double() * added + shift**2 * (self.count * added / total)
        self.mean += shift * (added / total)
        self.count = total
        # norms of the heads of every token, 0 where padded: (rows, width, features / self.width)
        heads = inputs.unflatten(-1, (-1, self.width)).norm(dim=-1) * real[..., None]
        self._norms += ((heads.sum(1) / real.sum(1, keepdim=True)) ** 2).sum(0).double()

    @property
    def variance(self) -> Tensor:
        """The variance of each feature over all tokens: (features,)."""
        return self._squares / max(self.count - 1, 1)

    @property
    def norm(self) -> Tensor:
        """The Euclidean norm of each feature over all tokens: (features,)."""
        return (self._squares + self.count * self.mean**2).sqrt()

    @property
    def head_norm(self) -> Tensor:
        """The norm of each head's features: its mean over a row's tokens, then the Euclidean norm over the rows.

        (features / width,)
        """
        return self._norms.sqrt()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence that a criterion judges some rows of a linear by.

    Args:
        weight: (rows, in_features).
        gradient: (rows, in_features), the gradient of the loss; None if the criterion does not read it.
        inputs: the statistics of the linear's inputs; None if the criterion does not read them.
    """

    weight: Tensor
    gradient: Tensor | None = None
    inputs: InputStatistics | None = None


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A rule that scores units (groups of heads, or channels) by their importance.

    Args:
        summary: one line for `--help` and reports.
        reads: `nothing` (units are ranked at random), `weights`, `inputs` (which also takes a forward pass over
            calibration text) or `gradient` (which also takes a backward pass).
        importance: a function of the evidence. It returns the importance of every element, (rows, in_features), or
            with `by_input` that of every input, (in_features,). The score of a unit is the sum over its part of the
            matrices that shrink together.
        by_input: whether `importance` judges whole inputs instead of single elements.
        consumers: whether only the matrices count that read the units (o_proj, down_proj).
    """

    summary: str
    reads: Literal["nothing", "weights", "inputs", "gradient"]
    importance: Callable[[Evidence], Tensor] | None = None
    by_input: bool = False
    consumers: bool = False


def magnitude(evidence: Evidence) -> Tensor:
    """Return |w|."""
    return evidence.weight.abs()


def magnitude_l2(evidence: Evidence) -> Tensor:
    """Return w², which makes the score of a unit its squared Euclidean norm."""
    return evidence.weight**2


def taylor(evidence: Evidence) -> Tensor:
    """Return |w·g|, a first-order estimate of how the loss changes without w (LLM-Pruner, arXiv 2305.11627, eq. 5)."""
    assert evidence.gradient is not None
    return (evidence.weight * evidence.gradient).abs()


def wanda(evidence: Evidence) -> Tensor:
    """Return |w_ij|·‖x_j‖ (Wanda, arXiv 2306.11695, equation 1). The sum over a unit is Wanda-sp in the FLAP paper."""
    assert evidence.inputs is not None
    return evidence.weight.abs() * evidence.inputs.norm.to(evidence.weight)


def flap(evidence: Evidence) -> Tensor:
    """Return Var(x_j)·w_ij²: how much the output changes if the mean replaces an input (FLAP, arXiv 2312.11983)."""
    assert evidence.inputs is not None
    return evidence.weight**2 * evidence.inputs.variance.to(evidence.weight)


def activation(evidence: Evidence) -> Tensor:
    """Return the norm of a head's or channel's activations (Minitron, arXiv 2407.14679), shared out to its features.

    See `InputStatistics.head_norm`.
    """
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
