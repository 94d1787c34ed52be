"""How to prune, with the defaults of the pattern filled in, and what does not go together refused."""

from dataclasses import dataclass

from loram.base.errors import UserError
from loram.model.counts import kept_units, prunable_layers
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.sparsity import STRUCTURED, kept_values, n_of_m, removed_share

# The criteria of each kind of pattern, the default first. (What they do: `criteria.py`, `sparsify.py`.)
STRUCTURED_CRITERIA = ("taylor", "activation", "wanda", "flap", "magnitude", "magnitude_l2", "random")
SPARSE_CRITERIA = ("sparsegpt", "wanda", "magnitude", "random")
KEEP_FIRST, KEEP_LAST = 4, 2  # of structured pruning; sparse patterns leave no layer whole


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """Settings of `prune` that fit one another; see there."""

    pattern: str
    ratio: float
    criterion: str
    keep_first: int
    keep_last: int
    bias_compensation: bool

    @property
    def sparse(self) -> bool:
        """Whether single weights are zeroed, and not whole units removed."""
        return self.pattern != STRUCTURED

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.bias_compensation or self.criterion not in ("magnitude", "magnitude_l2", "random")


def prune_settings(
    *,
    pattern: str = STRUCTURED,
    ratio: float | None = None,
    criterion: str | None = None,
    keep_first: int | None = None,
    keep_last: int | None = None,
    bias_compensation: bool = False,
) -> PruneSettings:
    """Fill in what was not given.

    Raises:
        UserError: the pattern or criterion is not known, the criterion is not one for the pattern, the ratio is missing
            or contradicts the pattern, or biases are to be compensated where nothing is removed.
    """
    sparse = n_of_m(pattern) is not None or pattern != STRUCTURED
    known = SPARSE_CRITERIA if sparse else STRUCTURED_CRITERIA
    if criterion is not None and criterion not in known:
        kind = f"for pattern {pattern}" if criterion in (*SPARSE_CRITERIA, *STRUCTURED_CRITERIA) else "known"
        raise UserError(f"criterion {criterion!r} is not {kind}; known are {', '.join(known)}")
    if sparse:
        ratio = removed_share(pattern, ratio)
    if ratio is None:
        raise UserError("ratio: missing; give the share of heads and channels to remove: 0.5 removes half")
    if sparse and bias_compensation:
        raise UserError(f"bias_compensation: is for structured pruning; pattern {pattern} removes no inputs")
    return PruneSettings(
        pattern=pattern,
        ratio=ratio,
        criterion=criterion or known[0],
        keep_first=(0 if sparse else KEEP_FIRST) if keep_first is None else keep_first,
        keep_last=(0 if sparse else KEEP_LAST) if keep_last is None else keep_last,
        bias_compensation=bias_compensation,
    )


def check_counts(settings: PruneSettings, geometry: Geometry, model_type: str) -> None:
    """Refuse what a model of these sizes cannot be pruned by.

    Raises:
        UserError: no layer or unit would be left, or the pattern does not divide a linear's inputs.
    """
    architecture = ARCHITECTURES[model_type]
    for linear in architecture.linears if settings.sparse else ():
        kept_values(*geometry.linear_shape(linear), settings.pattern, settings.ratio)
    for space in () if settings.sparse else architecture.spaces:
        kept_units(space, geometry.units(space), settings.ratio)
    prunable_layers(geometry, settings.keep_first, settings.keep_last)
