"""Options of pruning, with the defaults of the pattern filled in, and what does not go together refused."""

from typing import Any, ClassVar

from pydantic import PositiveInt, field_validator

from loram.base.errors import UserError
from loram.base.options import Options, option
from loram.data.spec import DataSpec
from loram.model.architecture import Architecture
from loram.model.counts import kept_units, prunable_layers
from loram.model.geometry import Geometry
from loram.model.sparsity import STRUCTURED, kept_values, n_of_m, removed_share
from loram.pruning.criteria import CRITERIA, NEEDS_TEXT, SPARSE

# The names of the criteria of each kind of pattern; the default comes first.
STRUCTURED_CRITERIA, SPARSE_CRITERIA = tuple(CRITERIA), tuple(SPARSE)
KEEP_FIRST, KEEP_LAST = 4, 2  # layers that structured pruning leaves whole; sparse patterns leave none


class PruneOptions(Options):
    """How to prune a model; see `loram.pruning.prune.prune`."""

    stage: ClassVar[str] = "prune"

    ratio: float | None = option(
        None,
        "The share of key-value groups and MLP channels (with a sparse pattern: of weights) to remove; n:m implies it.",
        gt=0,
        lt=1,
        also="sparsity pruning_ratio prune_ratio",
        hint="must lie between 0 and 1, both excluded; 0.5 removes half",
        common=True,
        planned=True,
    )
    criterion: str | None = option(
        None,
        f"What decides which units stay: {', '.join(STRUCTURED_CRITERIA)} (default: {STRUCTURED_CRITERIA[0]}); with a "
        f"sparse pattern {', '.join(SPARSE_CRITERIA)} (default: {SPARSE_CRITERIA[0]}).",
        common=True,
    )
    pattern: str = option(
        STRUCTURED,
        "What is removed: structured (whole units), or single weights: 4:8, 2:4 (n of every m stay), unstructured.",
        planned=True,
    )
    calibration: DataSpec | None = option(
        None, "The data set for criteria that read text (default: ten built-in passages).", common=True
    )
    calibration_samples: PositiveInt = option(10, "The number of rows of the calibration data to use.")
    calibration_length: PositiveInt = option(128, "Calibration rows are cut to this many tokens.")
    keep_first: int | None = option(
        None, f"The first layers to leave whole (default: {KEEP_FIRST}; with a sparse pattern 0).", planned=True
    )
    keep_last: int | None = option(
        None, f"The last layers to leave whole (default: {KEEP_LAST}; with a sparse pattern 0).", planned=True
    )
    bias_compensation: bool = option(
        False, "Give narrowed layers biases that add what the removed inputs add on average (FLAP)."
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_as_text(cls, value: Any) -> Any:
        """4:8 without quotes is a number to YAML: 4 times 60 and 8."""
        return f"{value // 60}:{value % 60}" if type(value) is int else value

    def resolved(self) -> "ResolvedPruneOptions":
        """Return the same options with the pattern's defaults filled in.

        Raises:
            UserError: the pattern or criterion is not known, the criterion does not go with the pattern, the ratio is
                missing or contradicts the pattern, or biases are to be compensated where nothing is removed.
        """
        sparse = n_of_m(self.pattern) is not None or self.pattern != STRUCTURED
        known = SPARSE_CRITERIA if sparse else STRUCTURED_CRITERIA
        if self.criterion is not None and self.criterion not in known:
            other = self.criterion in (*SPARSE_CRITERIA, *STRUCTURED_CRITERIA)
            kind = f"for pattern {self.pattern}" if other else "known"
            raise UserError(f"criterion {self.criterion!r} is not {kind}; known are {', '.join(known)}")
        ratio = removed_share(self.pattern, self.ratio) if sparse else self.ratio
        if ratio is None:
            raise UserError("ratio: missing; give the share of heads and channels to remove: 0.5 removes half")
        if sparse and self.bias_compensation:
            raise UserError(f"bias_compensation: is for structured pruning; pattern {self.pattern} removes no inputs")
        filled = {
            "ratio": ratio,
            "criterion": self.criterion or known[0],
            "keep_first": (0 if sparse else KEEP_FIRST) if self.keep_first is None else self.keep_first,
            "keep_last": (0 if sparse else KEEP_LAST) if self.keep_last is None else self.keep_last,
        }
        return ResolvedPruneOptions.model_validate({**dict(self), **filled})


class ResolvedPruneOptions(PruneOptions):
    """Options of pruning of which none is left open."""

    ratio: float
    criterion: str
    keep_first: int
    keep_last: int

    @property
    def sparse(self) -> bool:
        """Return whether single weights are removed, and not whole units."""
        return self.pattern != STRUCTURED

    def layers(self, geometry: Geometry) -> range:
        """Return the decoder layers that are pruned.

        Raises:
            UserError: no layer would be left to prune.
        """
        return prunable_layers(geometry, self.keep_first, self.keep_last)

    @property
    def reads_text(self) -> bool:
        """Return whether calibration text is needed."""
        if self.sparse:
            return SPARSE[self.criterion].reads != "nothing"
        return self.bias_compensation or self.criterion in NEEDS_TEXT

    def check_fits(self, geometry: Geometry, architecture: Architecture) -> None:
        """Refuse options that leave nothing of a model of these sizes, or whose pattern does not divide its linears.

        Raises:
            UserError: no layer or unit would be left, or the pattern does not divide the inputs of a linear.
        """
        for linear in architecture.linears if self.sparse else ():
            if linear.has_units:
                kept_values(*geometry.linear_shape(linear), self.pattern, self.ratio)
        for space in () if self.sparse else architecture.spaces:
            kept_units(space, geometry.units(space), self.ratio)
        self.layers(geometry)
