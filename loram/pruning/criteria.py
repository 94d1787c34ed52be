"""The criteria of pruning, as small pure functions in two tables. A criterion is one function and one row.

Imports no torch, since `--help` lists the criteria.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from loram.pruning.evidence import Evidence
    from loram.pruning.experts import ExpertStatistics

Importance = Callable[["Evidence"], "Tensor"]


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
    importance: Importance | None = None
    by_input: bool = False
    consumers: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertCriterion:
    """A rule that scores the experts of a layer.

    Args:
        summary: one line for `--help` and reports.
        reads: `nothing` (experts are ranked at random), `router` (its weight), `outputs` (what experts make of
            calibration text), or `gradient` (which also takes a backward pass).
        by_outputs: a function of what the experts made of the text that returns their scores, (experts,).
    """

    summary: str
    reads: Literal["nothing", "router", "outputs", "gradient"]
    by_outputs: "Callable[[ExpertStatistics], Tensor] | None" = None


@dataclass(frozen=True, kw_only=True)
class SparseCriterion:
    """A rule that chooses which single weights of a linear stay.

    Args:
        summary: one line for `--help` and reports.
        reads: `nothing` beyond the weights, the `norms` of the linear's inputs, or their `hessian`, with which the
            weights that stay are updated to make up for the others (SparseGPT).
        importance: a function of the evidence that returns the importance of every weight, (out_features,
            in_features); None for a random one, and with `hessian`.
        by_row: whether an unstructured pattern compares the weights of each output instead of all weights.
    """

    summary: str
    reads: Literal["nothing", "norms", "hessian"]
    importance: Importance | None = None
    by_row: bool = False


def magnitude(evidence: "Evidence") -> "Tensor":
    """Return |w|."""
    return evidence.weight.abs()


def magnitude_l2(evidence: "Evidence") -> "Tensor":
    """Return w², which makes the score of a unit its squared Euclidean norm."""
    return evidence.weight**2


def taylor(evidence: "Evidence") -> "Tensor":
    """Return |w·g|, a first-order estimate of how the loss changes without w (LLM-Pruner, arXiv 2305.11627, eq. 5)."""
    assert evidence.gradient is not None
    return (evidence.weight * evidence.gradient).abs()


def wanda(evidence: "Evidence") -> "Tensor":
    """Return |w_ij|·‖x_j‖ (Wanda, arXiv 2306.11695, equation 1). The sum over a unit is Wanda-sp in the FLAP paper."""
    assert evidence.inputs is not None
    return evidence.weight.abs() * evidence.inputs.norm.to(evidence.weight)


def flap(evidence: "Evidence") -> "Tensor":
    """Return Var(x_j)·w_ij²: how much the output changes if the mean replaces an input (FLAP, arXiv 2312.11983)."""
    assert evidence.inputs is not None
    return evidence.weight**2 * evidence.inputs.variance.to(evidence.weight)


def activation(evidence: "Evidence") -> "Tensor":
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
INFLUENCE = "block_influence"  # the criterion of whole layers (see `depth.py`), where nothing else is pruned
# The default comes first. The scores of `router` are the norms of its rows; those of `taylor` are sums of |w·g|.
EXPERT_CRITERIA: Mapping[str, ExpertCriterion] = MappingProxyType(
    {
        "reap": ExpertCriterion(
            summary="mean gate value x norm of the output, over an expert's tokens (REAP)",
            reads="outputs",
            by_outputs=lambda outputs: outputs.mean_output,
        ),
        "frequency": ExpertCriterion(
            summary="how many tokens go to an expert", reads="outputs", by_outputs=lambda outputs: outputs.tokens
        ),
        "router": ExpertCriterion(summary="norm of an expert's row of the router", reads="router"),
        "taylor": ExpertCriterion(summary="|weight x gradient|", reads="gradient"),
        "random": ExpertCriterion(summary="seeded random experts", reads="nothing"),
    }
)
READS_TEXT = frozenset(["inputs", "outputs", "gradient"])  # what takes calibration text
NEEDS_TEXT = frozenset(name for name, row in CRITERIA.items() if row.reads in READS_TEXT)
SPARSE: Mapping[str, SparseCriterion] = MappingProxyType(
    {
        "sparsegpt": SparseCriterion(summary="second-order updates (SparseGPT)", reads="hessian"),
        "wanda": SparseCriterion(summary="|weight| x norm of its input", reads="norms", importance=wanda, by_row=True),
        "magnitude": SparseCriterion(summary="|weight|", reads="nothing", importance=magnitude),
        "random": SparseCriterion(summary="seeded random weights", reads="nothing"),
    }
)


@dataclass(frozen=True, kw_only=True)
class ExpertRules:
    """How experts are scored.

    Args:
        experts: a key of `EXPERT_CRITERIA`; None where whole experts are not scored.
        channels: a key of `CRITERIA` that does not read inputs; None where their channels are not scored.
    """

    experts: str | None = None
    channels: str | None = None

    @property
    def reads(self) -> frozenset[str]:
        """What is read, by the words of `ExpertCriterion` and `Criterion`."""
        of_experts = [EXPERT_CRITERIA[self.experts].reads] if self.experts else []
        return frozenset([*of_experts, *([CRITERIA[self.channels].reads] if self.channels else [])])
