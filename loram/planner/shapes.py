"""A full or pruned model as sizes alone: what its decoder layers hold, and how their attention is computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from loram.disk.files import read_json
from loram.model.architecture import Architecture, Geometry, Linear, architecture_of
from loram.model.counts import kept_units, prunable_layers
from loram.model.sparsity import STRUCTURED, kept_values

# transformers' default where config.json leaves sliding_window out
_WINDOW = 4096
# sliding layers by index where config.json has no layer_types
_WINDOWED: Mapping[str, Callable[[int, Mapping[str, Any]], bool]] = {
    "mistral": lambda index, config: True,
    "qwen2": lambda index, config: index >= config.get("max_window_layers", 28),
    "qwen3": lambda index, config: index >= config.get("max_window_layers", 28),
    "gemma2": lambda index, config: (index + 1) % 2 != 0,
    "gemma3_text": lambda index, config: (index + 1) % config.get("sliding_window_pattern", 6) != 0,
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Sizes of one decoder layer.

    Args:
        linears: (out_features, in_features) by name.
        values: how many weights are stored of each: all, or those that a sparse one keeps.
        biases: how many values all its biases have together.
        heads, kv_heads, head_dim: of its attention.
        norms: how many norms of the hidden size.
        head_norms: whether queries and keys are normalised head by head.
        norm_values: how many values all its norms have together.
        window: tokens that its attention looks back, or None for all.
    """

    linears: Mapping[Linear, tuple[int, int]]
    values: Mapping[Linear, int]
    biases: int
    heads: int
    kv_heads: int
    head_dim: int
    norms: int
    head_norms: bool
    norm_values: int
    window: int | None

    @property
    def weights(self) -> int:
        """What its linears compute with, without biases; of sparse ones the zeros too."""
        return sum(map(prod, self.linears.values()))

    @property
    def mask_bytes(self) -> int:
        """Bytes of the masks of sparse linears: a bit a place."""
        return self.weights // 8 if self.weights != sum(self.values.values()) else 0

    @property
    def parameters(self) -> int:
        """All its parameters; of sparse linears those that stay."""
        return sum(self.values.values()) + self.biases + self.norm_values

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; values have the same."""
        return self.kv_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Width of the MLP."""
        return self.linears["mlp.up_proj"][0]


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of a model.

    Args:
        architecture, geometry: of the full model.
        config: content of its config.json.
        units: what a narrowed layer keeps of each space; None for the full model.
        sparse: how many values a sparse layer keeps of each linear; None where none is sparse.
        narrowed: which layers are narrowed, or sparse.
    """

    architecture: Architecture
    geometry: Geometry
    config: Mapping[str, Any]
    units: Mapping[str, int] | None = None
    sparse: Mapping[Linear, int] | None = None
    narrowed: range = range(0)

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        where: str,
        ratio: float | None,
        keep_first: int,
        keep_last: int,
        pattern: str = STRUCTURED,
    ) -> "Model":
        """The model that pruning at `ratio` makes of a config.json's; the full one where that is None.

        Raises:
            UserError: the config is not of a supported family, or a setting is out of range.
        """
        architecture, geometry = architecture_of(config, where), Geometry.from_config(config, where)
        full = cls(architecture=architecture, geometry=geometry, config=config)
        if ratio is None:
            return full
        narrowed = prunable_layers(geometry, keep_first, keep_last)
        if pattern != STRUCTURED:
            shapes = {linear: geometry.linear_shape(linear) for linear in architecture.linears}
            kept = {name: kept_values(*shape, pattern, ratio) for name, shape in shapes.items()}
            return replace(full, sparse=kept, narrowed=narrowed)
        units = {space.name: kept_units(space, geometry.units(space), ratio) for space in architecture.spaces}
        return replace(full, units=units, narrowed=narrowed)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Its decoder layers, bottom up."""
        return tuple(self._layer(index) for index in range(self.geometry.num_hidden_layers))

    def _layer(self, index: int) -> Layer:
        units, sparse = (self.units, self.sparse) if index in self.narrowed else (None, None)
        shapes = {name: self.geometry.linear_shape(name, units) for name in self.architecture.linears}
        head_dim, hidden = self.geometry.head_dim, self.geometry.hidden_size
        norms, head_norms = len(self.architecture.norms), len(self.architecture.head_norms)
        return Layer(
            linears=shapes,
            values={name: prod(shape) for name, shape in shapes.items()} if sparse is None else sparse,
            biases=sum(shapes[name][0] for name in self.geometry.biases),
            heads=shapes["self_attn.q_proj"][0] // head_dim,
            kv_heads=shapes["self_attn.k_proj"][0] // head_dim,
            head_dim=head_dim,
            norms=norms,
            head_norms=head_norms > 0,
            norm_values=norms * hidden + head_norms * head_dim,
            window=self._window(index),
        )

    def _window(self, index: int) -> int | None:
        family, config = self.architecture.model_type, self.config
        if family not in _WINDOWED or (family.startswith("qwen") and not config.get("use_sliding_window")):
            return None
        kinds = config.get("layer_types")
        sliding = kinds[index] == "sliding_attention" if kinds else _WINDOWED[family](index, config)
        window: int | None = config.get("sliding_window", _WINDOW)
        return window if sliding else None

    @property
    def parameters(self) -> int:
        """All parameters; a tied lm_head once."""
        return self.geometry.other_parameters() + sum(layer.parameters for layer in self.layers)

    @property
    def vocabulary(self) -> int:
        """Parameters of the embedding, and of an lm_head."""
        return self.geometry.vocab_size * self.geometry.hidden_size


def read_config(config: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """(content of a config.json, what messages call it).

    Args:
        config: a config.json, a folder that has one, a hub id, or the parsed content.

    Raises:
        UserError: it is not there, or no JSON.
    """
    if isinstance(config, Mapping):
        return config, "config"
    path = Path(config).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        from loram.disk.opening import download_config

        path = download_config(str(config))
    return read_json(path), str(config)
