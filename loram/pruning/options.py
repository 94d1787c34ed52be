"""Options of pruning, with the defaults of the pattern filled in, and what does not go together refused."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import NonNegativeInt, PositiveInt, PrivateAttr, field_validator

from loram.base.errors import UserError
from loram.base.options import Options, option
from loram.data.spec import DataSpec
from loram.model.architecture import Architecture
from loram.model.counts import droppable_layers, kept_by_space, prunable_layers
from loram.model.families import SPACES
from loram.model.geometry import Geometry
from loram.model.sparsity import STRUCTURED, kept_values, n_of_m, removed_share
from loram.pruning.criteria import CRITERIA, EXPERT_CRITERIA, INFLUENCE, READS_TEXT, SPARSE, ExpertRules

# The names of the criteria of each kind of pattern, and of whole layers; the default comes first.
STRUCTURED_CRITERIA, SPARSE_CRITERIA, LAYER_CRITERIA = tuple(CRITERIA), tuple(SPARSE), (INFLUENCE, "random")
KEEP_FIRST, KEEP_LAST = 4, 2  # layers that structured pruning leaves whole; sparse patterns leave none


def _own_ratio(what: str, default: str = "the ratio") -> Any:
    """Return the option for the ratio of one space."""
    return option(None, f"The share of {what} to remove (default: {default}); 0 keeps all.", ge=0, lt=1, planned=True)


class PruneOptions(Options):
    """How to prune a model; see `loram.pruning.prune.prune`."""

    stage: ClassVar[str] = "prune"

    ratio: float | None = option(
        None,
        "The share of key-value groups, MLP channels and experts (with a sparse pattern: of weights) to remove; n:m "
        "implies it.",
        gt=0,
        lt=1,
        also="sparsity pruning_ratio prune_ratio",
        hint="must lie between 0 and 1, both excluded; 0.5 removes half",
        common=True,
        planned=True,
    )
    drop_layers: int = option(
        0,
        "The number of whole layers to remove, those that change their input least (with criterion random: any); then "
        "the ratio may be left out.",
        ge=0,
        also="n_prune_layers layers_to_skip",
        common=True,
        planned=True,
    )
    kv_groups_ratio: float | None = _own_ratio("key-value groups, each with its query heads,")
    channels_ratio: float | None = _own_ratio("MLP channels")
    experts_ratio: float | None = _own_ratio("experts")
    expert_channels_ratio: float | None = _own_ratio("the channels of each expert", default="0")
    round_to: PositiveInt = option(
        1,
        "Round the number of MLP channels that stay up to a multiple of this; 64 suits the matrix products of GPUs.",
        planned=True,
    )
    experts_criterion: str | None = option(
        None,
        f"What decides which experts stay: {', '.join(EXPERT_CRITERIA)} (default: {next(iter(EXPERT_CRITERIA))}; with "
        "criterion random: random).",
    )
    criterion: str | None = option(
        None,
        f"What decides which units stay: {', '.join(STRUCTURED_CRITERIA)} (default: {STRUCTURED_CRITERIA[0]}); with a "
        f"sparse pattern {', '.join(SPARSE_CRITERIA)} (default: {SPARSE_CRITERIA[0]}); where layers are dropped and "
        f"there is no ratio {', '.join(LAYER_CRITERIA)} (default: {LAYER_CRITERIA[0]}).",
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
    keep_towers: bool = option(
        False,
        "Write a wrapped model's towers and projectors too, unchanged, around the pruned text model (default: the text "
        "model alone).",
    )
    bias_compensation: bool = option(
        False, "Give narrowed layers biases that add what the removed inputs add on average (FLAP)."
    )
    refit: bool | None = option(
        None,
        "Fit the output projections of narrowed layers (o_proj, down_proj) anew to the full model's outputs on the "
        "calibration text (default: where the criterion reads text).",
        common=True,
        planned=True,
    )
    refit_dataset: DataSpec | None = option(
        None,
        "With refit: the data set that it reads beside the rows that are scored on (default: more rows of the "
        "calibration data; in a recipe without these the training rows).",
        common=True,
    )
    refit_samples: PositiveInt = option(
        128,
        "With refit: the number of rows that it reads, which should be many. Of the calibration data, scoring reads "
        "the first of them.",
    )
    refit_length: PositiveInt = option(256, "Rows of refit_dataset are cut to this many tokens.")
    bypass_rank: NonNegativeInt = option(
        0,
        "With refit: the rank of a linear bypass beside attention and MLP of narrowed layers, which is fitted to what "
        "the output projections cannot give.",
        common=True,
        planned=True,
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_as_text(cls, value: Any) -> Any:
        """4:8 without quotes is a number to YAML: 4 times 60 and 8."""
        return f"{value // 60}:{value % 60}" if type(value) is int else value

    @property
    def for_refit(self) -> "PruneOptions":
        """The options whose calibration rows are those that the refit reads."""
        if self.refit_dataset is None:  # it reads those that are scored on too
            return self.model_copy(update={"calibration_samples": max(self.refit_samples, self.calibration_samples)})
        own = {"calibration": self.refit_dataset, "calibration_length": self.refit_length}
        return self.model_copy(update={**own, "calibration_samples": self.refit_samples})

    @property
    def own_ratios(self) -> dict[str, float]:
        """The ratios of single spaces that are given, by the space's name."""
        values = {name: getattr(self, f"{name}_ratio") for name in SPACES}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def narrows(self) -> bool:
        """Return whether the options remove units or single weights, and not only whole layers."""
        return self.ratio is not None or self.pattern != STRUCTURED or any(self.own_ratios.values())

    @property
    def prunes(self) -> bool:
        """Return whether the options remove anything."""
        return self.narrows or self.drop_layers > 0

    def ratios(self, architecture: Architecture) -> dict[str, float]:
        """Return the ratio of each space that is pruned, by its name.

        `ratio` is for all spaces without a ratio of their own, but for the channels of experts.

        Raises:
            UserError: a space has a ratio that the family lacks, or nothing is pruned.
        """
        spaces, own = {space.name: space for space in architecture.spaces}, self.own_ratios
        for name in own:
            if name not in spaces:
                raise UserError(
                    f"{name}_ratio: {architecture.model_type} has no {name.replace('_', ' ')}; leave it out"
                )
        ratios = {name: own.get(name, self.ratio if space.within is None else None) for name, space in spaces.items()}
        if not (pruned := {name: ratio for name, ratio in ratios.items() if ratio}) and not self.drop_layers:
            raise UserError(
                "ratio: nothing is pruned; give the share of heads and channels to remove: 0.5 removes half"
            )
        return pruned

    def resolved(self) -> "ResolvedPruneOptions":
        """Return the same options with the pattern's defaults filled in.

        Raises:
            UserError: the pattern or criterion is not known, the criterion does not go with the pattern, the ratio is
                missing or contradicts the pattern, layers are to be dropped with a sparse pattern, biases are to be
                compensated or linears fitted anew where nothing is removed, or a text is for a refit and there is none.
        """
        sparse = n_of_m(self.pattern) is not None or self.pattern != STRUCTURED
        layers_alone = self.prunes and not self.narrows
        known = SPARSE_CRITERIA if sparse else LAYER_CRITERIA if layers_alone else STRUCTURED_CRITERIA
        if self.criterion is not None and self.criterion not in known:
            other = self.criterion in (*SPARSE_CRITERIA, *STRUCTURED_CRITERIA, *LAYER_CRITERIA)
            what = "dropping layers without a ratio" if layers_alone else f"pattern {self.pattern}"
            kind = f"for {what}" if other else "known"
            raise UserError(f"criterion {self.criterion!r} is not {kind}; known are {', '.join(known)}")
        if self.experts_criterion is not None and self.experts_criterion not in EXPERT_CRITERIA:
            raise UserError(
                f"experts_criterion {self.experts_criterion!r} is not known; known are {', '.join(EXPERT_CRITERIA)}"
            )
        ratio = removed_share(self.pattern, self.ratio) if sparse else self.ratio
        if not self.prunes:
            raise UserError("ratio: missing; give the share of heads and channels to remove: 0.5 removes half")
        if sparse and (own := next(iter(self.own_ratios), None)) is not None:
            raise UserError(f"{own}_ratio: is for structured pruning; pattern {self.pattern} removes single weights")
        if sparse and self.drop_layers:
            raise UserError(f"drop_layers: is for structured pruning; pattern {self.pattern} keeps every layer")
        if sparse and self.bias_compensation:
            raise UserError(f"bias_compensation: is for structured pruning; pattern {self.pattern} removes no inputs")
        if sparse and self.keep_towers:
            raise UserError(
                f"keep_towers: is for structured pruning; pattern {self.pattern} writes the text model alone"
            )
        if layers_alone and self.bias_compensation:
            raise UserError("bias_compensation: is for narrowed layers; add a ratio, or leave it out")
        if self.round_to > 1 and (sparse or layers_alone):
            raise UserError("round_to: is for numbers of channels, and none are removed; leave it out")
        self._check_refit(sparse=sparse, layers_alone=layers_alone)
        filled = {
            "ratio": ratio,
            "criterion": self.criterion or known[0],
            "experts_criterion": self.experts_criterion
            or ("random" if self.criterion == "random" else next(iter(EXPERT_CRITERIA))),
            "keep_first": (0 if sparse else KEEP_FIRST) if self.keep_first is None else self.keep_first,
            "keep_last": (0 if sparse else KEEP_LAST) if self.keep_last is None else self.keep_last,
        }
        if self.refit is None:
            able = not (sparse or layers_alone or self.bias_compensation)
            filled["refit"] = able and (self.bypass_rank > 0 or CRITERIA[str(filled["criterion"])].reads in READS_TEXT)
        resolved = ResolvedPruneOptions.model_validate({**dict(self), **filled})
        if self.refit_dataset is not None and not resolved.refit:
            raise UserError("refit_dataset: is read by a refit, and there is none; add refit, or leave it out")
        resolved._refit_by_default = self.refit is None and not self.bypass_rank
        return resolved

    def _check_refit(self, *, sparse: bool, layers_alone: bool) -> None:
        """Refuse to refit where no linear loses inputs, or beside what else makes up for them."""
        if self.bypass_rank and self.refit is False:
            raise UserError("bypass_rank: the bypass is fitted to what a refit leaves; add refit")
        name = "refit" if self.refit else "bypass_rank" if self.bypass_rank else None
        if name is not None and sparse:
            raise UserError(f"{name}: is for structured pruning; pattern {self.pattern} removes no inputs")
        if name is not None and layers_alone:
            raise UserError(f"{name}: is for narrowed layers; add a ratio, or leave it out")
        if name is not None and self.bias_compensation:
            raise UserError(f"bias_compensation: {name} makes up for the same inputs; give one of the two")


class ResolvedPruneOptions(PruneOptions):
    """Options of pruning of which none is left open."""

    criterion: str
    experts_criterion: str
    keep_first: int
    keep_last: int
    refit: bool
    _refit_by_default: bool = PrivateAttr(default=False)

    @property
    def refit_by_default(self) -> bool:
        """Return whether there was no word on a refit, so that the criterion decides."""
        return self._refit_by_default

    @property
    def sparse(self) -> bool:
        """Return whether single weights are removed, and not whole units."""
        return self.pattern != STRUCTURED

    @property
    def removed_share(self) -> float:
        """The share of weights that a sparse pattern removes."""
        assert self.ratio is not None
        return self.ratio

    def layers(self, geometry: Geometry) -> range:
        """Return the decoder layers that are pruned: narrowed, dropped, or made sparse.

        Raises:
            UserError: no layer would be left to prune.
        """
        return prunable_layers(geometry, self.keep_first, self.keep_last)

    def kept(self, geometry: Geometry, architecture: Architecture, layer: int) -> dict[str, int]:
        """Return how many units of each space a narrowed layer keeps, by the space's name.

        Raises:
            UserError: a ratio leaves too few.
        """
        spaces = geometry.layer(architecture, layer).spaces
        return kept_by_space(geometry.at(layer), spaces, self.ratios(architecture), self.round_to)

    def droppable(self, geometry: Geometry, architecture: Architecture, config: Mapping[str, Any]) -> list[int]:
        """Return the layers among which `drop_layers` are dropped; arguments as for `check_fits`.

        Raises:
            UserError: there are not as many, none would be left to narrow, or the family's layers do more than add.
        """
        layers = self.layers(geometry)
        if self.drop_layers and not architecture.adds_only:
            raise UserError(
                f"drop_layers: a layer of {architecture.model_type} also multiplies the hidden states, so it cannot be "
                "dropped; leave it out"
            )
        if self.narrows and self.drop_layers == len(layers):
            raise UserError(f"drop_layers {self.drop_layers}: leaves no layer to narrow; leave the ratio out")
        return droppable_layers(geometry, architecture, config, layers, self.drop_layers)

    def dropped_blindly(
        self, geometry: Geometry, architecture: Architecture, config: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """Return as many layers as are dropped, the last that can be; which ones they are depends on the weights.

        Args:
            geometry, architecture, config: as for `check_fits`.

        Raises:
            UserError: as `droppable`.
        """
        layers = self.droppable(geometry, architecture, config) if self.drop_layers else []
        return tuple(layers[len(layers) - self.drop_layers :])

    @property
    def measures_influence(self) -> bool:
        """Return whether layers are dropped by how much they change their input."""
        return self.drop_layers > 0 and self.criterion != "random"

    def scored(self, architecture: Architecture) -> tuple[list[str], ExpertRules]:
        """Return the criteria that score units of linears, which are one or none, and how experts are scored."""
        ratios = self.ratios(architecture)
        linears = any(space.name in ratios for space in architecture.linear_spaces)
        of_experts = {
            space: space.name in ratios for space in architecture.spaces if space not in architecture.linear_spaces
        }
        whole = any(pruned for space, pruned in of_experts.items() if space.within is None)
        channels = any(pruned for space, pruned in of_experts.items() if space.within is not None)
        rules = ExpertRules(
            experts=self.experts_criterion if whole else None, channels=self.criterion if channels else None
        )
        return ([self.criterion] if linears else []), rules

    def reads_text(self, architecture: Architecture) -> bool:
        """Return whether calibration text is needed for a model of a family."""
        if self.sparse:
            return SPARSE[self.criterion].reads != "nothing"
        criteria, rules = self.scored(architecture)
        reads = {*rules.reads, *(CRITERIA[criterion].reads for criterion in criteria)}
        refit = self.refit and not self.refit_by_default  # by default there is one where the criterion reads text
        return self.bias_compensation or refit or self.measures_influence or bool(reads & READS_TEXT)

    def check_fits(self, geometry: Geometry, architecture: Architecture, config: Mapping[str, Any]) -> None:
        """Refuse options that leave nothing of a model of these sizes, or whose pattern does not divide its linears.

        Args:
            geometry, architecture: the full model's sizes and family.
            config: the content of its config.json.

        Raises:
            UserError: no layer or unit would be left, so many layers cannot be dropped, experts are in groups of one
                size, there is nothing to refit, the bypass is too wide, or the pattern does not divide the inputs of a
                linear.
        """
        self.droppable(geometry, architecture, config)
        if not self.sparse:
            for layer in self.layers(geometry):
                self.kept(geometry, architecture, layer)
            self._check_groups_of_experts(architecture, config)
            self._check_anything_refitted(geometry, architecture)
            if self.scored(architecture)[1].channels and CRITERIA[self.criterion].reads == "inputs":
                raise UserError(f"criterion {self.criterion}: cannot score the channels of experts; take another one")
            return
        if architecture.experts is not None:
            raise UserError(f"pattern {self.pattern}: prunes linears, and the experts of this model are none")
        if geometry.sizes_by_kind:
            raise UserError(
                f"pattern {self.pattern}: needs layers of one size, and some layers of this model have sizes of their "
                f"own ({', '.join(geometry.sizes_by_kind)}); prune it structurally, with a ratio alone"
            )
        for linear in architecture.linears:
            if linear.has_units:
                kept_values(*geometry.linear_shape(linear), self.pattern, self.removed_share)

    def _check_anything_refitted(self, geometry: Geometry, architecture: Architecture) -> None:
        """Refuse a refit where no linear loses inputs, and a bypass of a higher rank than any matrix there has."""
        if self.bypass_rank > geometry.hidden_size:
            raise UserError(f"bypass_rank {self.bypass_rank}: is above the hidden size, {geometry.hidden_size}")
        if self.refit and not self.refit_by_default and not self.for_model(geometry, architecture).refit:
            raise UserError("refit: no linear loses inputs at these ratios (experts are not refitted); leave it out")

    def for_model(self, geometry: Geometry, architecture: Architecture) -> "ResolvedPruneOptions":
        """Return the same options, without a refit where no linear of a model loses inputs."""
        if not self.refit:
            return self
        kept = {layer: self.kept(geometry, architecture, layer) for layer in self.layers(geometry)}
        short = any(geometry.linears_short_of_inputs(architecture, layer, units) for layer, units in kept.items())
        return self.model_copy(update={"refit": short})

    def _check_groups_of_experts(self, architecture: Architecture, config: Mapping[str, Any]) -> None:
        """Refuse to remove experts where a router first chooses among groups, which have to be of one size."""
        key = None if architecture.experts is None else architecture.experts.groups
        if key is None or "experts" not in self.ratios(architecture):
            return
        if (groups := architecture.text_config(config).get(key) or 1) > 1:
            raise UserError(
                f"experts_ratio: the config's {key} is {groups}, so experts are in groups that must stay of one size; "
                "set it to 0, and remove channels of experts with expert_channels_ratio"
            )
