"""A full or pruned model as sizes alone: what its decoder layers hold, and how their attention is computed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from loram.base.paths import local
from loram.disk.files import read_json
from loram.model.architecture import HIDDEN, ONE_HEAD, Architecture, Linear
from loram.model.counts import droppable_layers, kept_units, prunable_layers
from loram.model.families import architecture_of
from loram.model.geometry import Geometry
from loram.model.packing import packing_of
from loram.model.parts import KV_GROUPS, UP, VALUES
from loram.model.sparsity import STRUCTURED, kept_values


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The sizes of one decoder layer.

    Args:
        index: its number in the full model.
        linears: its linears by their paths.
        shapes: (out_features, in_features) of each linear.
        values: how many weights of each linear are stored: all of them, or those that a sparse linear keeps.
        biases: how many values all its biases have together.
        heads, kv_heads, head_dim: the number of query heads and of key-value heads, and the width of each.
        channels: the width of the MLP.
        values_width: the width of the tensor that the values are in: all key-value heads, and with a fused linear its
            queries and keys too.
        norms: how many norms of the hidden size it has.
        head_norms: how many values per token the norms of queries and keys read and keep: queries, keys, and one
            length for each of the heads that they are normalised by, or for all heads together.
        norm_values: how many values all its norms have together.
        window: how many tokens its attention looks back, or None where it sees all.
    """

    index: int
    linears: Mapping[str, Linear]
    shapes: Mapping[str, tuple[int, int]]
    values: Mapping[str, int]
    biases: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    values_width: int
    norms: int
    head_norms: int
    norm_values: int
    window: int | None

    @property
    def weights(self) -> int:
        """Return how many values its linears compute with, without biases; the zeros of sparse linears count too."""
        return sum(map(prod, self.shapes.values()))

    @property
    def mask_bytes(self) -> int:
        """The bytes of the masks of sparse linears, with one bit per place."""
        return self.weights // 8 if self.weights != sum(self.values.values()) else 0

    @property
    def parameters(self) -> int:
        """Return how many parameters it has; sparse linears count those that stay."""
        return sum(self.values.values()) + self.biases + self.norm_values

    @property
    def queries(self) -> int:
        """The width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """The width of all key heads together."""
        return self.kv_heads * self.head_dim

    def targeted(self, names: tuple[str, ...]) -> list[Linear]:
        """Return its linears that PEFT's `target_modules` name."""
        return [linear for linear in self.linears.values() if linear.name in names]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a model.

    Args:
        architecture, geometry: the family and the sizes of the full model.
        config: the content of its config.json.
        units: how many units a narrowed layer keeps of each space; None for the full model.
        sparse: how many values a sparse layer keeps of each linear, by its path; None where no layer is sparse.
        narrowed: the layers that are narrowed, or sparse, unless they are dropped.
        dropped: the layers that are dropped.
    """

    architecture: Architecture
    geometry: Geometry
    config: Mapping[str, Any]
    units: Mapping[str, int] | None = None
    sparse: Mapping[str, int] | None = None
    narrowed: range = range(0)
    dropped: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        where: str,
        ratio: float | None,
        first: int,
        last: int,
        pattern: str = STRUCTURED,
        drop: int = 0,
    ) -> "Model":
        """Return the sizes of the model that pruning makes of another one.

        Args:
            config: the content of the full model's config.json.
            where: what error messages call that file.
            ratio: the pruning ratio, or None where no layer is narrowed or sparse.
            first, last: how many layers stay whole at the bottom and at the top.
            pattern: as for `prune`.
            drop: how many layers are dropped. Which ones depends on the weights; here they are the last that can be.

        Raises:
            UserError: the family or the format of the weights is not supported, or a setting is out of range.
        """
        packing_of(config, where)  # or it refuses the model
        architecture, geometry = architecture_of(config, where), Geometry.from_config(config, where)
        full = cls(architecture=architecture, geometry=geometry, config=config)
        if drop:
            droppable = droppable_layers(geometry, architecture, config, prunable_layers(geometry, first, last), drop)
            full = replace(full, dropped=tuple(droppable[-drop:]))
        if ratio is None:
            return full
        narrowed = prunable_layers(geometry, first, last)
        if pattern != STRUCTURED:
            shapes = {linear.path: geometry.linear_shape(linear) for linear in architecture.linears}
            kept = {path: kept_values(*shape, pattern, ratio) for path, shape in shapes.items()}
            return replace(full, sparse=kept, narrowed=narrowed)
        units = {space.name: kept_units(space, geometry.units(space), ratio) for space in architecture.spaces}
        return replace(full, units=units, narrowed=narrowed)

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

    @property
    def pruned(self) -> bool:
        """Return whether it is smaller than the full model."""
        return bool(self.narrowed or self.dropped)

    def _layer(self, index: int) -> Layer:
        geometry, row = self.geometry, self.geometry.layer(self.architecture, index)
        units, sparse = (self.units, self.sparse) if index in self.narrowed else (None, None)
        shapes = {linear.path: geometry.linear_shape(linear, units) for linear in row.linears}
        groups = geometry.units(KV_GROUPS) if units is None else units[KV_GROUPS.name]
        heads = groups * geometry.num_attention_heads // geometry.num_key_value_heads
        windows = self.architecture.windows
        return Layer(
            index=index,
            linears={linear.path: linear for linear in row.linears},
            shapes=shapes,
            values={path: prod(shape) for path, shape in shapes.items()} if sparse is None else sparse,
            biases=sum(shapes[path][0] for path in geometry.biases),
            heads=heads,
            kv_heads=groups,
            head_dim=geometry.head_dim,
            channels=geometry.size([UP], units),
            values_width=shapes[row.linear_with(VALUES).path][0],
            norms=sum(norm.width == HIDDEN for norm in row.norms),
            head_norms=self._head_norms(row, heads, groups),
            norm_values=sum(geometry.size([norm.width], units) for norm in row.norms),
            window=None if windows is None else windows.of(index, self.text_config),
        )

    def _head_norms(self, row: Architecture, heads: int, groups: int) -> int:
        """Return `Layer.head_norms` of a layer with some query heads and key-value groups."""
        widths = [norm.width for norm in row.norms if norm.width != HIDDEN]
        lengths = heads + groups if ONE_HEAD in widths else len(widths)
        return (heads + groups) * self.geometry.head_dim + lengths if widths else 0

    @property
    def rotated(self) -> int:
        """Return how many values of a head the rotary tables have."""
        if self.architecture.partial_rotary is None:
            return self.geometry.head_dim
        options = {**(self.text_config.get("rope_parameters") or {}), **self.text_config}
        return int(self.geometry.head_dim * options.get("partial_rotary_factor", self.architecture.partial_rotary))

    @property
    def parameters(self) -> int:
        """Return how many parameters it has; a tied head counts once."""
        return self.geometry.other_parameters() + sum(layer.parameters for layer in self.layers)

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
