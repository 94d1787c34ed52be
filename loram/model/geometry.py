"""The sizes of one model, and the shape of each of its tensors. No weights, no torch."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from loram.base.errors import UserError, first_problem
from loram.model.architecture import Architecture
from loram.model.families import architecture_of
from loram.model.segments import Linear, MixerUnit, Segment, Space, Unit, WholeUnit

Units = Mapping[str, int]  # space name -> how many units a layer has


def _absent(value: object) -> bool:
    """Return whether a size is not there: only some families have it, and the others' plans do not name it."""
    return not value


class Geometry(BaseModel):
    """The sizes of a full model, by transformers' names: all that recovery and estimates need to know about it.

    Args:
        intermediate_size: the width of an MLP; None where every layer has experts instead.
        biases: the paths of the linears that have a bias.
        layer_kinds: the kind of every layer; empty where all layers have the same parts.
        num_experts, moe_intermediate_size: the number of experts in a layer that has some, and the width of each.
        num_experts_per_tok: the number of experts that a token goes to.
        shared_intermediate_size: the width of the experts that every token passes, together.
        linear_num_key_heads, linear_key_head_dim, linear_num_value_heads, linear_value_head_dim: the heads of layers
            that mix tokens by a state (linear attention).
        linear_conv_kernel_dim: how many tokens the convolution of such a layer sees.
        hidden_size_per_layer_input: how many values a token has for each layer, beside its hidden states.
        vocab_size_per_layer_input: how many tokens have such values.
        sizes_by_kind: a word of `layer_kinds` -> the sizes of such layers that differ from the model's, by their names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    tie_word_embeddings: bool
    biases: tuple[str, ...] = ()
    layer_kinds: tuple[str, ...] = ()
    num_experts: PositiveInt | None = Field(default=None, exclude_if=_absent)
    moe_intermediate_size: PositiveInt | None = Field(default=None, exclude_if=_absent)
    num_experts_per_tok: PositiveInt | None = Field(default=None, exclude_if=_absent)
    shared_intermediate_size: NonNegativeInt = Field(default=0, exclude_if=_absent)
    linear_num_key_heads: NonNegativeInt = Field(default=0, exclude_if=_absent)
    linear_key_head_dim: NonNegativeInt = Field(default=0, exclude_if=_absent)
    linear_num_value_heads: NonNegativeInt = Field(default=0, exclude_if=_absent)
    linear_value_head_dim: NonNegativeInt = Field(default=0, exclude_if=_absent)
    linear_conv_kernel_dim: NonNegativeInt = Field(default=0, exclude_if=_absent)
    hidden_size_per_layer_input: NonNegativeInt = Field(default=0, exclude_if=_absent)
    vocab_size_per_layer_input: NonNegativeInt = Field(default=0, exclude_if=_absent)
    sizes_by_kind: dict[str, dict[str, PositiveInt]] = Field(default_factory=dict, exclude_if=_absent)

    @model_validator(mode="after")
    def _whole_groups(self) -> "Geometry":
        own = (sizes.get("num_key_value_heads") for sizes in self.sizes_by_kind.values())
        for kv_heads in (self.num_key_value_heads, *own):
            if kv_heads is not None and self.num_attention_heads % kv_heads:
                raise ValueError(
                    f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                    f"num_key_value_heads ({kv_heads})"
                )
        return self

    @model_validator(mode="after")
    def _sizes_exist(self) -> "Geometry":
        for kind, own in self.sizes_by_kind.items():
            if unknown := sorted(own.keys() - type(self).model_fields.keys()):
                raise ValueError(f"sizes_by_kind: {kind} has an unknown size {unknown[0]!r}")
        return self

    @model_validator(mode="after")
    def _kinds_of_all_layers(self) -> "Geometry":
        if self.layer_kinds and len(self.layer_kinds) != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers is {self.num_hidden_layers}, but there are {len(self.layer_kinds)} layer_types"
            )
        return self

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> "Geometry":
        """Read the sizes from the content of a full model's config.json.

        Args:
            config: the content.
            where: what error messages call the file.

        Raises:
            UserError: the family is not supported, a size is missing, or sizes contradict each other.
        """
        architecture = architecture_of(config, where)
        text = architecture.text_config(config)
        countable = isinstance(text.get("num_hidden_layers"), int)
        if countable and architecture.unfit is not None and (reason := architecture.unfit(text)):
            raise UserError(f"{where}: {reason}")
        kinds, config = architecture.layer_kinds(config) if countable else (), text
        biases = [
            path
            for switch, paths in architecture.biases.items()
            if switch == "always" or config.get(switch, switch in architecture.on_by_default)
            for path in paths
        ]
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        kv_heads = config.get("num_key_value_heads", architecture.kv_heads)
        head_dim = config.get("head_dim")
        if head_dim is None:
            head_dim = architecture.head_dim
        if head_dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
            head_dim = hidden // heads
        values = {name: config[name] for name in cls.model_fields if name in config}
        values |= {
            "num_key_value_heads": heads if kv_heads is None else kv_heads,
            "head_dim": head_dim,
            "tie_word_embeddings": architecture.ties(config),
            "biases": tuple(biases),
            "layer_kinds": kinds,
        }
        if architecture.sizes is not None:
            values |= architecture.sizes(config)
        try:
            geometry = cls(**values)
        except ValidationError as error:
            raise UserError(f"{where}: {first_problem(error)}") from error
        for space in geometry.of_model(architecture).spaces:
            if getattr(geometry, space.size) is None:
                raise UserError(f"{where}: {space.size}: Field required")
        return geometry

    def at(self, layer: int) -> "Geometry":
        """Return the sizes as one layer has them; the same object where all layers have the same."""
        return self._by_layer[layer] if self.sizes_by_kind else self

    @cached_property
    def _by_layer(self) -> tuple["Geometry", ...]:
        by_kind = {
            kind: self.model_copy(
                update={
                    "sizes_by_kind": {},
                    **{name: size for word in kind.split() for name, size in self.sizes_by_kind.get(word, {}).items()},
                }
            )
            for kind in dict.fromkeys(self.layer_kinds)
        }
        return tuple(by_kind[kind] for kind in self.layer_kinds)

    def units(self, space: Space) -> int:
        """Return how many units of a space one layer of the full model has, if it has any."""
        return self.per_unit(space) * (1 if space.within is None else self.units(space.within))

    def per_unit(self, space: Space) -> int:
        """Return how many units of a space each unit of the space that it is within has; else the same as `units`."""
        return int(getattr(self, space.size))

    def unit_size(self, unit: Unit | MixerUnit | WholeUnit) -> int:
        """Return how many rows or columns one unit owns."""
        group = self.num_attention_heads // self.num_key_value_heads
        sizes = {
            "channel": 1,
            "pair": 2,
            "head": self.head_dim,
            "group": group * self.head_dim,
            "gated_group": 2 * group * self.head_dim,
            "hidden": self.hidden_size,
            "shared": self.shared_intermediate_size,
            "query": group,
            "mixer_keys": self.linear_num_key_heads * self.linear_key_head_dim,
            "mixer_values": self.linear_num_value_heads * self.linear_value_head_dim,
            "mixer_heads": self.linear_num_value_heads,
            "mixer_head": self.linear_value_head_dim,
            "kernel": self.linear_conv_kernel_dim,
            "queries": self.num_attention_heads * self.head_dim,
            "keys": self.num_key_value_heads * self.head_dim,
            "layer_input": self.hidden_size_per_layer_input,
            "layer_inputs": self.num_hidden_layers * self.hidden_size_per_layer_input,
            "layer_input_vocabulary": self.vocab_size_per_layer_input,
        }
        return sizes[unit]

    def size(self, segments: Iterable[Segment], units: Units | None = None) -> int:
        """Return how many rows or columns some segments have together; in each expert, where they are of experts.

        Args:
            segments: the segments of one side of a tensor.
            units: the units that a narrowed layer keeps of each space; None for a layer of the full model.
        """
        total = 0
        for segment in segments:
            count = 1
            if (space := segment.space) is not None:
                count = self.per_unit(space) if units is None else units[space.name]
                if units is not None and space.within is not None:
                    count //= units[space.within.name]
            total += count * self.unit_size(segment.unit)
        return total

    def layer(self, architecture: Architecture, layer: int) -> Architecture:
        """Return the family's row with only the parts that one layer has."""
        return architecture.of_kind(self.layer_kinds[layer] if self.layer_kinds else None)

    def of_model(self, architecture: Architecture) -> Architecture:
        """Return the family's row without what no layer of this model has."""
        return architecture.of_model(self.layer_kinds)

    def linears_short_of_inputs(self, architecture: Architecture, layer: int, units: Units) -> list[Linear]:
        """Return the linears of a layer that read fewer inputs than in the full model; `units` as for `size`."""
        own = self.at(layer)
        return [
            linear
            for linear in self.layer(architecture, layer).linears
            if own.size(linear.columns, units) < own.size(linear.columns)
        ]

    def linear_shape(self, linear: Linear, units: Units | None = None) -> tuple[int, int]:
        """Return (out_features, in_features) of a linear; `units` as for `size`."""
        return self.size(linear.rows, units), self.size(linear.columns, units)

    def linear_shapes(
        self, architecture: Architecture, units: Callable[[int], Units | None] = lambda layer: None
    ) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of every linear that can have an adapter, the head too, by module path.

        Args:
            architecture: the model's family.
            units: a layer's index -> the units that it keeps of each space, or None where it is whole.
        """
        shapes = {
            f"{architecture.layer_path(layer)}.{linear.path}": self.at(layer).linear_shape(linear, units(layer))
            for layer in range(self.num_hidden_layers)
            for linear in self.layer(architecture, layer).linears
        }
        return {**shapes, architecture.head: (self.vocab_size, self.hidden_size)}

    def expert_shapes(
        self, architecture: Architecture, units: Callable[[int], Units | None] = lambda layer: None
    ) -> dict[str, tuple[int, ...]]:
        """Return (experts, out_features, in_features) of every 3-D tensor of experts, by name; arguments as above."""
        shapes = dict[str, tuple[int, ...]]()
        for layer in range(self.num_hidden_layers):
            row = self.layer(architecture, layer)
            for tensor in row.expert_matrices:
                axes = (tensor.axes[0], *row.expert_sides(tensor))
                name = f"{architecture.layer_path(layer)}.{tensor.name}"
                shapes[name] = tuple(self.at(layer).size(axis, units(layer)) for axis in axes)
        return shapes

    def layer_shapes(
        self, architecture: Architecture, layer: int, units: Units | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a decoder layer, by its name inside the layer; `units` as for `size`."""
        row, own, shapes = self.layer(architecture, layer), self.at(layer), dict[str, tuple[int, ...]]()
        for linear in row.linears:
            shapes[f"{linear.path}.weight"] = own.linear_shape(linear, units)
            if linear.path in self.biases:
                shapes[f"{linear.path}.bias"] = (own.size(linear.rows, units),)
        shapes |= {f"{norm.path}.weight": (own.size([norm.width], units),) for norm in row.norms}
        for part in row.parameters:
            module, _, leaf = part.name.rpartition(".")
            if leaf != "bias" or module in self.biases:
                shapes[part.name] = tuple(own.size(axis, units) for axis in part.axes)
        return shapes

    def outside_shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor outside the layers but those of embedding, final norm and head, by name."""
        parts = self.of_model(architecture).outside
        return {f"{architecture.decoder}.{part.name}": tuple(map(self.size, part.axes)) for part in parts}

    def tensor_shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the full model, by name; a tied head has no tensor of its own."""
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {architecture.embedding_weight: table}
        for layer in range(self.num_hidden_layers):
            prefix = architecture.layer_path(layer)
            shapes |= {f"{prefix}.{name}": shape for name, shape in self.layer_shapes(architecture, layer).items()}
        shapes |= {f"{architecture.final_norm_path}.weight": (self.hidden_size,), **self.outside_shapes(architecture)}
        return shapes if self.tie_word_embeddings else {**shapes, architecture.head_weight: table}

    def layer_parameters(self, architecture: Architecture, layer: int, units: Units | None = None) -> int:
        """Return how many parameters one decoder layer has; `units` as for `size`."""
        buffers = [part.name for part in self.layer(architecture, layer).parameters if part.buffer]
        shapes = self.layer_shapes(architecture, layer, units)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in buffers)

    def other_parameters(self, architecture: Architecture) -> int:
        """Return how many parameters are outside the decoder layers: embedding, final norm, untied head and others."""
        tables = 1 if self.tie_word_embeddings else 2
        others = sum(map(math.prod, self.outside_shapes(architecture).values()))
        return tables * self.vocab_size * self.hidden_size + self.hidden_size + others
