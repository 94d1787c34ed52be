"""The pruning plan: what each layer of a model keeps, and everything needed to widen back."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from loram.base.errors import UserError, first_problem
from loram.base.paths import local
from loram.model.architecture import Architecture
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.segments import Linear, Segment, Space
from loram.model.sparsity import STRUCTURED, kept_values, n_of_m
from loram.model.wrappers import WRAPPERS

PLAN_NAME, MASKS_NAME = "loram_plan.json", "loram_masks.safetensors"
BYPASS_IN, BYPASS_OUT = "bypass_in", "bypass_out"  # the factors of a bypass, as `modeling_loram` calls them


class BaseReference(BaseModel):
    """The full model a plan was made from.

    Args:
        name: its hub id or absolute path.
        fingerprint: the fingerprint of its weights; of a wrapped model, of those of its text model.
        wrapper: the wrapper's model_type, where the plan is of a wrapped model's text model; recovered adapters then
            have the wrapped model's names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    fingerprint: str
    wrapper: str | None = Field(default=None, exclude_if=lambda value: value is None)

    @field_validator("wrapper")
    @classmethod
    def _known_wrapper(cls, value: str | None) -> str | None:
        if value is not None and value not in WRAPPERS:
            raise ValueError(f"{value!r} is not a supported wrapper ({', '.join(WRAPPERS)})")
        return value


class PruningPlan(BaseModel):
    """What every layer of a pruned model keeps of the full model's.

    A structured plan lists the kept units (key-value groups and channels) of every narrowed layer, and the layers that
    are dropped as a whole. A sparse plan keeps all shapes, and masks beside it say which single weights stay.

    Args:
        model_type: the full model's family.
        base: which full model it is.
        geometry: its sizes, so that recovery never reads its weights.
        layers: layer -> space name -> sorted indices of the kept units. A layer or space that is not named keeps
            everything. The channels of experts are numbered through: channel c of expert e is e * (channels per
            expert) + c, and every expert that stays keeps as many of them.
        dropped: the layers that are gone, sorted. The others keep their numbers. The first layer is never among them,
            since transformers asks its key-value cache how long the text is.
        criterion, ratio, seed, keep_first, keep_last: how the plan was chosen.
        round_to: what the numbers of channels that stay were rounded up to a multiple of.
        ratios: space name -> the ratio of its own, where it has one; `ratio` is None where each pruned space has one,
            and where nothing but whole layers is pruned.
        pattern: `structured`, or the pattern of sparse layers: `unstructured`, or n:m, which keeps n of m weights.
        masks: the SHA-256 of a sparse plan's `loram_masks.safetensors`, where `model.layers.3.mlp.up_proj.mask` is
            (out_features, in_features / 8) uint8: bit j of byte i is 1 if the weight in column 8 * i + j stays.
        bias_compensation: whether the linears that lost inputs have a bias that makes up for them.
        refit: whether the weights of the linears that lost inputs were fitted anew to the full model's outputs.
        bypass_rank: the rank of the bypass that is beside every block with such a linear; 0 is no bypass.
        versions: the versions of the libraries that made the plan.

    Example: `{4: {"kv_groups": (0, 2), "channels": (1, 5, 7)}}` keeps two groups and three channels of layer 4.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    format_version: Literal[1] = 1
    model_type: str
    base: BaseReference
    geometry: Geometry
    criterion: str
    ratio: float | None = Field(gt=0, lt=1)
    ratios: dict[str, float] = Field(default_factory=dict, exclude_if=lambda value: not value)
    round_to: int = Field(default=1, ge=1, exclude_if=lambda value: value == 1)
    bias_compensation: bool = False
    refit: bool = Field(default=False, exclude_if=lambda value: not value)
    bypass_rank: int = Field(default=0, ge=0, exclude_if=lambda value: not value)
    seed: int
    keep_first: int = Field(ge=0)
    keep_last: int = Field(ge=0)
    pattern: str = STRUCTURED
    masks: str | None = None
    dropped: tuple[int, ...] = Field(default=(), exclude_if=lambda value: not value)
    versions: dict[str, str]
    layers: dict[int, dict[str, tuple[int, ...]]]

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield what `repr` shows: all but the many indices and sizes. Called by pydantic."""
        for name, value in super().__repr_args__():
            if name == "layers":
                yield name, f"{len(self.layers)} of {self.geometry.num_hidden_layers} narrowed"
            elif name not in ("geometry", "versions"):
                yield name, value

    @field_validator("model_type")
    @classmethod
    def _known_family(cls, value: str) -> str:
        if value not in ARCHITECTURES:
            raise ValueError(f"{value!r} is not a supported family ({', '.join(ARCHITECTURES)})")
        return value

    @model_validator(mode="after")
    def _kept_units_exist(self) -> "PruningPlan":
        for layer, spaces in self.layers.items():
            if not 0 <= layer < self.geometry.num_hidden_layers:
                raise ValueError(f"layer {layer} is outside 0..{self.geometry.num_hidden_layers - 1}")
            for space in self.spaces(layer):
                if getattr(self.geometry.at(layer), space.size) is None:
                    raise ValueError(f"geometry: {space.size} is missing, though the family has {space.name}")
            sizes = {space.name: self.geometry.at(layer).units(space) for space in self.spaces(layer)}
            for name, kept in spaces.items():
                if name not in sizes:
                    raise ValueError(f"layer {layer}: unknown space {name!r}")
                if not kept or any(a >= b for a, b in pairwise(kept)):
                    raise ValueError(f"layer {layer} {name}: kept indices must be at least one, sorted and distinct")
                if kept[0] < 0 or kept[-1] >= sizes[name]:
                    raise ValueError(f"layer {layer} {name}: kept indices must lie in 0..{sizes[name] - 1}")
            for space in self.spaces(layer):
                if space.within is not None and space.name in spaces:
                    self._check_within(layer, space)
        return self

    def _check_within(self, layer: int, space: Space) -> None:
        """Refuse units of experts that are gone, and experts that keep unlike numbers of units."""
        assert space.within is not None
        geometry = self.geometry.at(layer)
        outer = self.layers[layer].get(space.within.name, range(geometry.units(space.within)))
        size, kept = geometry.per_unit(space), self.layers[layer][space.name]
        counts = Counter(unit // size for unit in kept)
        if sorted(counts) != list(outer) or len(set(counts.values())) > 1:
            raise ValueError(f"layer {layer} {space.name}: every kept unit of {space.within.name} must keep as many")

    @model_validator(mode="after")
    def _narrow_or_sparse(self) -> "PruningPlan":
        n_of_m(self.pattern)
        if self.sparse != (self.masks is not None) or (self.sparse and (self.layers or self.bias_compensation)):
            raise ValueError(f"pattern {self.pattern}: sparse plans have masks and nothing narrowed, others no masks")
        if self.refit and (self.sparse or self.bias_compensation):
            raise ValueError("refit: is for structured plans without bias_compensation")
        if self.bypass_rank > (self.geometry.hidden_size if self.refit else 0):
            raise ValueError("bypass_rank: a plan with a bypass is refitted, and no rank is above hidden_size")
        return self

    @model_validator(mode="after")
    def _dropped_layers_can_go(self) -> "PruningPlan":
        pruned = range(max(1, self.keep_first), self.geometry.num_hidden_layers - self.keep_last)
        if any(a >= b for a, b in pairwise(self.dropped)):
            raise ValueError("dropped: layers must be sorted and distinct")
        if self.dropped and not pruned.start <= self.dropped[0] <= self.dropped[-1] < pruned.stop:
            raise ValueError(f"dropped: layers must lie in {pruned.start}..{pruned.stop - 1}")
        if self.dropped and self.sparse:
            raise ValueError(f"pattern {self.pattern}: a sparse plan drops no layers")
        if both := sorted(self.layers.keys() & set(self.dropped)):
            raise ValueError(f"layer {both[0]} is dropped, and keeps units")
        if self.ratio is None and not self.ratios and (self.layers or not self.dropped):
            raise ValueError("ratio: missing, and only a plan that does nothing but drop layers has none")
        return self

    @property
    def sparse(self) -> bool:
        """Return whether weights were zeroed one by one, so that all shapes are the full model's."""
        return self.pattern != STRUCTURED

    @property
    def sparse_layers(self) -> range:
        """The layers whose linears are sparse."""
        return range(self.keep_first, self.geometry.num_hidden_layers - self.keep_last) if self.sparse else range(0)

    def kept_values(self) -> dict[str, int]:
        """Return how many weights a sparse layer keeps of each linear, by the linear's path inside the layer.

        A layer has those of the linears that its kind has. Linears without units, as in mixers of tokens other than
        attention, stay whole.
        """
        linears = [linear for linear in self.architecture.linears if linear.has_units]
        shapes = {linear.path: self.geometry.linear_shape(linear) for linear in linears}
        assert self.ratio is not None
        return {path: kept_values(*shape, self.pattern, self.ratio) for path, shape in shapes.items()}

    def sparsity(self) -> dict[str, Any] | None:
        """Return the key `sparsity` for a sparse model's config.json (see `modeling_loram`), or None."""
        layers = self.sparse_layers
        return {"layers": [layers.start, layers.stop], "values": self.kept_values()} if self.sparse else None

    @property
    def architecture(self) -> Architecture:
        """The family's row."""
        return ARCHITECTURES[self.model_type]

    def spaces(self, layer: int) -> tuple[Space, ...]:
        """Return the spaces of a layer."""
        return self.geometry.layer(self.architecture, layer).spaces

    def units(self, layer: int) -> dict[str, int]:
        """Return how many units a layer keeps of every space, by the space's name."""
        narrowed, units = self.layers.get(layer, {}), dict[str, int]()
        for space in self.spaces(layer):
            if space.name in narrowed:
                units[space.name] = len(narrowed[space.name])
            else:
                outer = 1 if space.within is None else units[space.within.name]
                units[space.name] = outer * self.geometry.at(layer).per_unit(space)
        return units

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of every linear of the pruned model, the head included, by module path."""
        shapes = self.geometry.linear_shapes(self.architecture, self.units)
        return {module: shape for module, shape in shapes.items() if not self.drops(module)}

    def drops(self, name: str) -> bool:
        """Return whether a tensor or module is in a layer that is dropped."""
        place = self.architecture.split(name)
        return place is not None and place[0] in self.dropped

    def adaptable_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all that an adapter can be on: `linear_shapes`, and those of experts.

        A tensor of experts goes by its name, and has the shape (experts, out_features, in_features).
        """
        experts = self.geometry.expert_shapes(self.architecture, self.units)
        return {**self.linear_shapes(), **{name: shape for name, shape in experts.items() if not self.drops(name)}}

    def kept_elements(self, layer: int, segments: Sequence[Segment]) -> Tensor | None:
        """Return the rows or columns of a tensor that a layer keeps.

        Args:
            layer: the layer's index.
            segments: the segments of the tensor's rows, or of its columns.

        Returns:
            Sorted indices, int64, or None where the layer keeps all of them.

        Example: with head_dim 2, key-value groups (0, 2) kept of 3 and one query head per group, a fused qkv_proj has
        6 rows per segment and keeps the rows 0, 1, 4, 5 (queries), 6, 7, 10, 11 (keys), 12, 13, 16, 17 (values).
        """
        kept, geometry, parts, start = self.layers.get(layer, {}), self.geometry.at(layer), [], 0
        if not any(segment.space is not None and segment.space.name in kept for segment in segments):
            return None
        for segment in segments:
            size = geometry.size([segment])
            elements = torch.arange(size)
            if segment.space is not None and segment.space.name in kept:
                width = geometry.unit_size(segment.unit)
                elements = elements.view(-1, width)[list(kept[segment.space.name])].flatten()
            parts.append(start + elements)
            start += size
        return torch.cat(parts)

    def kept_in_experts(self, layer: int, segments: Sequence[Segment]) -> Tensor | None:
        """Return the rows or columns that each kept expert of a layer keeps.

        Args:
            layer, segments: as for `kept_elements`; all segments are of a space within another.

        Returns:
            Sorted indices, (kept experts, rows or columns that each keeps) int64, or None where experts keep all.
        """
        kept, geometry, parts, start = self.layers.get(layer, {}), self.geometry.at(layer), [], 0
        for segment in segments:
            if (space := segment.space) is None or space.name not in kept:
                return None
            size, width = geometry.per_unit(space), geometry.unit_size(segment.unit)
            assert space.within is not None
            channels = torch.tensor(kept[space.name]).view(self.units(layer)[space.within.name], -1, 1) % size
            parts.append(start + (channels * width + torch.arange(width)).flatten(1))  # (kept experts, elements)
            start += size * width
        return torch.cat(parts, dim=1)

    def config_keys(self) -> dict[str, Any]:
        """Return the keys of a pruned model's config.json that follow from the plan."""
        return {
            "per_layer_config": self.per_layer_config(),
            "narrow_linears": self.narrow_linears() or None,
            "bias_compensation": self.bias_compensation,
            "sparsity": self.sparsity(),
            **({"dropped_layers": list(self.dropped)} if self.dropped else {}),
            **({"narrow_norms": norms} if (norms := self.narrow_norms()) else {}),
            **({"narrow_parameters": parts} if (parts := self.narrow_parameters()) else {}),
            **({"bypasses": bypasses} if (bypasses := self.bypasses()) else {}),
        }

    def per_layer_config(self) -> dict[str, dict[str, int]]:
        """Return the narrowed layers' widths as transformers' `per_layer_config`."""
        widths: dict[str, dict[str, int]] = {}
        for layer in sorted(self.layers):
            widths[str(layer)], units, full = {}, self.units(layer), self.geometry.at(layer)
            for space in self.spaces(layer):
                share = Fraction(units[space.name], full.units(space))
                widths[str(layer)] |= {key: int(share * getattr(full, key)) for key in space.config_keys}
        return widths

    def narrow_linears(self) -> dict[str, dict[str, tuple[int, int, bool]]]:
        """Return config.json's key `narrow_linears`: layer -> path -> (out_features, in_features, has a bias).

        It lists all linears of every layer that the plan narrows.
        """
        return {
            str(layer): {
                linear.path: (
                    *self.geometry.at(layer).linear_shape(linear, self.units(layer)),
                    self._has_bias(layer, linear),
                )
                for linear in self.geometry.layer(self.architecture, layer).linears
            }
            for layer in sorted(self.layers)
        }

    def narrow_norms(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return config.json's key `narrow_norms`: layer -> path -> (width, width in the full model).

        It lists the norms over all heads of every layer that the plan narrows. Few families have such norms, and the
        others' files do not have the key.
        """
        norms = [norm for norm in self.architecture.norms if norm.width.space is not None]
        return {
            str(layer): {
                norm.path: (self.geometry.size([norm.width], self.units(layer)), self.geometry.size([norm.width]))
                for norm in norms
            }
            for layer in sorted(self.layers)
            if norms
        }

    def narrow_parameters(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return config.json's key `narrow_parameters`: layer -> module -> shapes of its tensors, and its own numbers.

        It lists the modules of every layer that the plan narrows which hold experts or other tensors that are in no
        linear or norm: `{"shapes": {"gate_up_proj": (4, 32, 16)}, "numbers": {"num_experts": 4}}`. Few families have
        such tensors.
        """
        modules: dict[str, dict[str, dict[str, Any]]] = {}
        for layer in sorted(self.layers):
            units, row = self.units(layer), self.geometry.layer(self.architecture, layer)
            for part in row.parameters:
                spaces = dict.fromkeys(segment.space for axis in part.axes for segment in axis if segment.space)
                if not spaces:
                    continue
                path, _, name = part.name.rpartition(".")
                own = modules.setdefault(str(layer), {}).setdefault(path, {"shapes": {}, "numbers": {}})
                own["shapes"][name] = tuple(self.geometry.at(layer).size(axis, units) for axis in part.axes)
                for space in spaces:
                    count = units[space.name] // (1 if space.within is None else units[space.within.name])
                    own["numbers"] |= dict.fromkeys(space.attributes, count)
        return modules

    def refitted(self, layer: int) -> list[Linear]:
        """Return the linears of a layer whose weights were fitted anew, which are those that lost inputs."""
        if not self.refit or layer not in self.layers:
            return []
        return self.geometry.linears_short_of_inputs(self.architecture, layer, self.units(layer))

    def bypasses(self) -> dict[str, dict[str, int]]:
        """Return config.json's key `bypasses`: layer -> path of a block -> the rank of the bypass beside it."""
        layers = [layer for layer in sorted(self.layers) if self.bypass_shapes(layer)]
        return {str(layer): {linear.block: self.bypass_rank for linear in self.refitted(layer)} for layer in layers}

    def bypass_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """Return the shapes of both factors of each bypass in a layer, by the tensors' full names."""
        hidden, rank, shapes = self.geometry.hidden_size, self.bypass_rank, dict[str, tuple[int, int]]()
        for linear in self.refitted(layer) if rank else ():
            path = f"{self.architecture.layer_path(layer)}.{linear.block}"
            shapes |= {f"{path}.{BYPASS_IN}": (rank, hidden), f"{path}.{BYPASS_OUT}": (hidden, rank)}
        return shapes

    def compensated(self, layer: int) -> Iterator[tuple[str, Linear]]:
        """Yield (full path, linear) of the linears of a layer whose bias makes up for the inputs that they lost."""
        for linear in self.geometry.layer(self.architecture, layer).linears:
            if self._compensates(layer, linear):
                yield f"{self.architecture.layer_path(layer)}.{linear.path}", linear

    def _compensates(self, layer: int, linear: Linear) -> bool:
        """Return whether a linear has a bias that makes up for the inputs that it lost."""
        kept = self.layers.get(layer, {})
        lost = any(segment.space is not None and segment.space.name in kept for segment in linear.columns)
        return self.bias_compensation and lost

    def _has_bias(self, layer: int, linear: Linear) -> bool:
        return linear.path in self.geometry.biases or self._compensates(layer, linear)

    def parameters(self) -> tuple[int, int]:
        """Return the parameters of the full and of the pruned model; sparse linears count what they keep."""
        full = pruned = self.geometry.other_parameters(self.architecture)
        for layer in range(self.geometry.num_hidden_layers):
            full += self.geometry.layer_parameters(self.architecture, layer)
            if layer not in self.dropped:
                pruned += self.geometry.layer_parameters(self.architecture, layer, self.units(layer))
        for layer in self.layers:
            linears = [linear for _, linear in self.compensated(layer) if linear.path not in self.geometry.biases]
            pruned += sum(self.geometry.size(linear.rows) for linear in linears)
            pruned += sum(map(math.prod, self.bypass_shapes(layer).values()))
        kept = self.kept_values() if self.sparse else {}
        for layer in self.sparse_layers:
            for linear in self.geometry.layer(self.architecture, layer).linears:
                if linear.path in kept:
                    pruned -= math.prod(self.geometry.linear_shape(linear)) - kept[linear.path]
        return full, pruned

    def to_json(self) -> str:
        """Return the plan as JSON, with one line per key and per layer, in a fixed order.

        Fields that were added to the format later are left out where they have no say, so that older plans keep their
        fingerprints.
        """
        newer: dict[str, Any] = {} if self.sparse else {"pattern": True, "masks": True}
        if not self.geometry.layer_kinds:
            newer["geometry"] = {"layer_kinds"}
        fields: dict[str, Any] = self.model_dump(mode="json", exclude=newer)
        layers = fields.pop("layers")
        rows = [f"    {json.dumps(key)}: {json.dumps(layers[key], sort_keys=True)}" for key in sorted(layers, key=int)]
        lines = [f"  {json.dumps(key)}: {json.dumps(value, sort_keys=True)}," for key, value in fields.items()]
        body = ",\n".join(rows)
        return "\n".join(["{", *lines, '  "layers": {', *([body] if rows else []), "  }", "}", ""])

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the JSON form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `loram_plan.json` into a folder."""
        (folder / PLAN_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "PruningPlan":
        """Read a folder's plan; the inverse of `save`.

        Raises:
            UserError: there is no plan, or it is not a valid one; the message names the file and the place in it.
        """
        path = local(folder) / PLAN_NAME
        if not path.is_file():
            raise UserError(
                f"{folder}: no {PLAN_NAME} here, so this is not a folder that `loram prune` or `train` made"
            )
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a valid pruning plan: {first_problem(error)}") from error


def find_plan(folder: Path) -> PruningPlan | None:
    """Return the plan that travels with a folder, or None where there is none."""
    return PruningPlan.load(folder) if (folder / PLAN_NAME).exists() else None
