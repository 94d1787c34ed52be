"""A full or pruned model as sizes alone, from the content of its config.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from loram.base.paths import local
from loram.disk.files import read_json
from loram.model.architecture import Architecture
from loram.model.families import architecture_of
from loram.model.geometry import Geometry, Units
from loram.model.packing import packing_of
from loram.model.parts import KV_GROUPS, UP, VALUES, WHOLE_VALUES
from loram.model.segments import HIDDEN, ONE_HEAD, SHARED, Linear
from loram.model.sparsity import kept_values
from loram.planner.layer import Layer, Routed
from loram.pruning.options import ResolvedPruneOptions


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a model.

    Args:
        architecture, geometry: the family and the sizes of the full model.
        config: the content of its config.json.
        units: how many units each narrowed layer keeps of each space; None where no layer is narrowed.
        sparse: how many values a sparse layer keeps of each linear, by its path; None where no layer is sparse.
        narrowed: the layers that are narrowed, or sparse, unless they are dropped.
        dropped: the layers that are dropped.
        refit: whether output projections are refitted.
        always_refit: whether they are with any criterion, and not only with one that reads text.
        bypass_rank: the rank of the bypass beside each block whose output projection has lost inputs; 0 is none.
    """

    architecture: Architecture
    geometry: Geometry
    config: Mapping[str, Any]
    units: Mapping[int, Units] | None = None
    sparse: Mapping[str, int] | None = None
    narrowed: Sequence[int] = ()
    dropped: tuple[int, ...] = ()
    refit: bool = False
    always_refit: bool = False
    bypass_rank: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str, options: ResolvedPruneOptions | None = None) -> "Model":
        """Return the sizes of the model that pruning makes of another one.

        Args:
            config: the content of the full model's config.json.
            where: what error messages call that file.
            options: how it is pruned, or None for the full model. Which layers are dropped depends on the weights; here
                they are the last that can be.

        Raises:
            UserError: the family or the format of the weights is not supported, or a setting is out of range.
        """
        packing_of(config, where)  # or it refuses the model
        geometry = Geometry.from_config(config, where)
        architecture = geometry.of_model(architecture_of(config, where))
        full = cls(architecture=architecture, geometry=geometry, config=config)
        if options is None:
            return full
        full = replace(full, dropped=options.dropped_blindly(geometry, architecture, config))
        if not options.narrows:
            return full
        narrowed = [layer for layer in options.layers(geometry) if layer not in full.dropped]
        if options.sparse:
            shapes = {linear.path: geometry.linear_shape(linear) for linear in architecture.linears if linear.has_units}
            share = options.removed_share
            kept = {path: kept_values(*shape, options.pattern, share) for path, shape in shapes.items()}
            return replace(full, sparse=kept, narrowed=narrowed)
        ratios, spaces = options.ratios(architecture), {n: geometry.layer(architecture, n).spaces for n in narrowed}
        units = {
            layer: options.kept(geometry, architecture, layer)
            for layer, own in spaces.items()
            if any(space.name in ratios for space in own)
        }
        refit = options.for_model(geometry, architecture).refit
        full = replace(
            full, refit=refit, always_refit=refit and not options.refit_by_default, bypass_rank=options.bypass_rank
        )
        return replace(full, units=units, narrowed=tuple(units))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of its config.json that describes the text model."""
        return self.architecture.text_config(self.config)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Its decoder layers, from the bottom up, without those that are dropped."""
        indices = range(self.geometry.num_hidden_layers)
        return tuple(self._layer(index) for index in indices if index not in self.dropped)

    @property
    def narrowed_layers(self) -> list[Layer]:
        """Its layers that are narrowed, or sparse."""
        return [layer for layer in self.layers if layer.index in self.narrowed]

    def refitted(self, index: int) -> list[Linear]:
        """Return the output projections of a layer that are refitted."""
        if not self.refit or self.units is None or index not in self.units:
            return []
        return self.geometry.linears_short_of_inputs(self.architecture, index, self.units[index])

    @property
    def pruned(self) -> bool:
        """Return whether it is smaller than the full model."""
        return bool(self.narrowed or self.dropped)

    def _layer(self, index: int) -> Layer:
        geometry, row = self.geometry.at(index), self.geometry.layer(self.architecture, index)
        units = None if self.units is None else self.units.get(index)
        tensors = self.geometry.layer_shapes(self.architecture, index, units)
        shapes = {linear.path: geometry.linear_shape(linear, units) for linear in row.linears}
        widths = {segment: shapes[linear.path][0] for linear in row.linears for segment in linear.rows}
        groups, sharing = 0, row.shared_states
        if any(linear.reads == "attention" for linear in row.linears):
            groups = (units or {}).get(KV_GROUPS.name, geometry.units(KV_GROUPS))
        own_keys = sharing is None or not sharing.readers
        heads = groups * geometry.num_attention_heads // geometry.num_key_value_heads
        own = {part.name: tensors[part.name] for part in row.parameters if part.name in tensors and not part.buffer}
        experts = {part.name: own.pop(part.name) for part in row.expert_tensors}
        stored = {path: prod(shape) for path, shape in shapes.items()}
        if self.sparse is not None and index in self.narrowed:
            stored |= {path: self.sparse[path] for path in shapes if path in self.sparse}
        windows = self.architecture.windows
        return Layer(
            index=index,
            linears={linear.path: linear for linear in row.linears},
            shapes=shapes,
            values=stored,
            biases=sum(shape[0] for name, shape in tensors.items() if name.removesuffix(".bias") in shapes),
            heads=heads,
            kv_heads=groups,
            own_keys=own_keys,
            head_dim=geometry.head_dim,
            gated=any(segment.unit == "gated_group" for segment in widths),
            channels=geometry.size([UP], units) if UP in widths else 0,
            shared=widths.get(SHARED, 0),
            routed=self._routed(row, experts, units) if experts else None,
            tensors=own,
            bypasses=2 * self.bypass_rank * geometry.hidden_size * len(self.refitted(index)) if self.bypass_rank else 0,
            values_width=widths.get(VALUES, groups * geometry.head_dim),
            layer_input=geometry.hidden_size_per_layer_input,
            norms=sum(norm.width == HIDDEN for norm in row.norms),
            head_norms=self._head_norms(row, geometry.head_dim, heads, groups if own_keys else 0),
            norm_values=sum(geometry.size([norm.width], units) for norm in row.norms),
            window=None if windows is None else windows.of(index, self.text_config),
        )

    def _routed(self, row: Architecture, tensors: Mapping[str, tuple[int, ...]], units: Units | None) -> Routed:
        """Return the sizes of a layer's experts from the shapes of their tensors, (experts, ...)."""
        assert self.geometry.num_experts_per_tok is not None
        (space,) = (space for space in row.spaces if space.within is not None)
        experts = next(iter(tensors.values()))[0]
        return Routed(
            experts=experts,
            chosen=self.geometry.num_experts_per_tok,
            channels=self.geometry.per_unit(space) if units is None else units[space.name] // experts,
            matrices=tuple((shape[1], shape[2]) for shape in tensors.values() if len(shape) == 3),
            biases=sum(shape[1] for shape in tensors.values() if len(shape) == 2),
        )

    def _head_norms(self, row: Architecture, head_dim: int, heads: int, groups: int) -> int:
        """Return `Layer.head_norms` of a layer with some query heads, and key-value groups of its own."""
        widths = [norm.width for norm in row.norms if norm.width != HIDDEN]
        lengths = heads + groups if ONE_HEAD in widths else len(widths)
        values = 0
        if row.norms_values:  # a layer without values of its own norms its keys twice
            own = any({VALUES, WHOLE_VALUES} & set(linear.rows) for linear in row.linears)
            values = groups * head_dim if own else 0
            lengths += groups
        return (heads + groups) * head_dim + values + lengths * row.norm_lengths if widths else 0

    @property
    def sinks(self) -> bool:
        """Return whether its heads attend to sinks too, which have a parameter per query head."""
        axes = [axis for part in self.architecture.parameters for axis in part.axes]
        return any(segment.unit == "query" for axis in axes for segment in axis)

    def rotated(self, head_dim: int) -> int:
        """Return how many values of a head, which has `head_dim`, the rotary tables have."""
        if self.architecture.partial_rotary is None:
            return head_dim
        options = {**(self.text_config.get("rope_parameters") or {}), **self.text_config}
        return int(head_dim * options.get("partial_rotary_factor", self.architecture.partial_rotary))

    @property
    def parameters(self) -> int:
        """Return how many parameters it has; a tied head counts once."""
        return self.geometry.other_parameters(self.architecture) + sum(layer.parameters for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        """Return how many of its parameters a token meets: all but those of experts that it does not go to."""
        return self.geometry.other_parameters(self.architecture) + sum(layer.active_parameters for layer in self.layers)

    @property
    def matrices_outside(self) -> list[tuple[int, bool]]:
        """Return (values, whether its rows are looked up by token) of matrices in no layer, embedding or head."""
        shapes = self.geometry.outside_shapes(self.architecture)
        looked_up = self.architecture.embedding_weights
        return [(prod(shape), name in looked_up) for name, shape in shapes.items() if len(shape) > 1]

    @property
    def vectors_outside(self) -> int:
        """Return how many values the vectors in no layer have, but for the final norm."""
        shapes = self.geometry.outside_shapes(self.architecture)
        return sum(prod(shape) for shape in shapes.values() if len(shape) == 1)

    @property
    def vocabulary(self) -> int:
        """Return how many parameters the embedding has, and the head."""
        return self.geometry.vocab_size * self.geometry.hidden_size


def read_config(config: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Read a model's config.

    Args:
        config: a config.json, a folder that has one, a hub id, or the parsed content.

    Returns:
        The content of the config.json, and what messages call it.

    Raises:
        UserError: the file is not there, or it is not JSON.
    """
    if isinstance(config, Mapping):
        return config, "config"
    path = local(config)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        from loram.disk.opening import download_config

        path = download_config(str(config))
    return read_json(path), str(config)
