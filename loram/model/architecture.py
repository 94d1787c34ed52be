"""Model families as data: which linears of a decoder layer share a dimension that can be pruned.

Supporting a family is adding a row to `ARCHITECTURES`. Nothing here touches a weight.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from loram.base.errors import UserError, first_problem

Unit = Literal["channel", "head", "group"]
Linear = str  # a linear's path inside its decoder layer: "self_attn.q_proj"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One axis of one linear that a space shortens.

    `axis` 0 is the output rows (weight, bias, lora_B), 1 the input columns (weight, lora_A). `unit` is how many rows or
    columns one unit of the space owns: a channel 1, a head `head_dim`, a group all query heads of a key-value head.
    """

    linear: Linear
    axis: Literal[0, 1]
    unit: Unit


@dataclass(frozen=True, kw_only=True)
class Space:
    """A prunable dimension of a decoder layer: linears that must shrink together.

    `size` is the name of the `Geometry` field with the number of units, also the key of transformers' config.
    """

    name: str
    size: Literal["num_key_value_heads", "intermediate_size"]
    cuts: tuple[Cut, ...]


KV_GROUPS = Space(
    name="kv_groups",
    size="num_key_value_heads",
    cuts=(
        Cut(linear="self_attn.q_proj", axis=0, unit="group"),
        Cut(linear="self_attn.k_proj", axis=0, unit="head"),
        Cut(linear="self_attn.v_proj", axis=0, unit="head"),
        Cut(linear="self_attn.o_proj", axis=1, unit="group"),
    ),
)
CHANNELS = Space(
    name="channels",
    size="intermediate_size",
    cuts=(
        Cut(linear="mlp.gate_proj", axis=0, unit="channel"),
        Cut(linear="mlp.up_proj", axis=0, unit="channel"),
        Cut(linear="mlp.down_proj", axis=1, unit="channel"),
    ),
)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family: its prunable spaces, and what else it takes to count its parameters from a bare config.json.

    Args:
        model_type: transformers' name of the family.
        biases: config switch -> the linears whose bias it turns on; `always` is no switch.
        norms: a decoder layer's norms of the hidden size.
        head_norms: its norms of a head's size.
        kv_heads: transformers' default of num_key_value_heads where config.json leaves it out; None is
            num_attention_heads, which is also what a null in config.json means.
        head_dim: transformers' default where config.json leaves it out; None is hidden_size / num_attention_heads.
        tied: transformers' default of tie_word_embeddings where config.json leaves it out.
        spaces: what can be pruned in a decoder layer.
    """

    model_type: str
    biases: Mapping[str, tuple[Linear, ...]] = field(default_factory=dict)
    norms: tuple[str, ...] = _NORMS
    head_norms: tuple[str, ...] = ()
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    spaces: tuple[Space, ...] = (KV_GROUPS, CHANNELS)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears of a decoder layer, in the order of the spaces."""
        return tuple(cut.linear for space in self.spaces for cut in space.cuts)


CUTS = MappingProxyType({cut.linear: (space, cut) for space in (KV_GROUPS, CHANNELS) for cut in space.cuts})
LINEARS = tuple(linear.rpartition(".")[2] for linear in CUTS)  # q_proj, k_proj ...: as adapters name them

_ROWS = (
    Architecture(model_type="llama", biases={"attention_bias": _QKVO, "mlp_bias": _MLP}),
    Architecture(model_type="mistral", kv_heads=8),
    Architecture(model_type="qwen2", biases={"always": _QKV}, kv_heads=32),
    Architecture(
        model_type="qwen3", biases={"attention_bias": _QKVO}, head_norms=_HEAD_NORMS, kv_heads=32, head_dim=128
    ),
    Architecture(
        model_type="gemma2", biases={"attention_bias": _QKVO}, norms=_FOUR_NORMS, kv_heads=4, head_dim=256, tied=True
    ),
    Architecture(
        model_type="gemma3_text",
        biases={"attention_bias": _QKVO},
        norms=_FOUR_NORMS,
        head_norms=_HEAD_NORMS,
        kv_heads=4,
        head_dim=256,
        tied=True,
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.model_type: row for row in _ROWS})


def architecture_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The row of a config.json's family; `where` is what the message calls it.

    Raises:
        UserError: the family has no row; the message lists those that have.
    """
    model_type = str(config.get("model_type"))
    if model_type.startswith("loram_"):
        raise UserError(f"{where}: this model is already pruned; start from the full model that it was made from")
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type {model_type!r} is not supported; supported families are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


class Geometry(BaseModel):
    """The sizes of a full model: all that recovery and estimates need to know of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    tie_word_embeddings: bool
    biases: tuple[Linear, ...] = ()

    @model_validator(mode="after")
    def _whole_groups(self) -> "Geometry":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        return self

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> "Geometry":
        """Read the sizes from the content of a config.json of a supported family.

        Raises:
            UserError: the family is not supported, a size is missing, or sizes contradict each other.
        """
        architecture = architecture_of(config, where)
        biases = [
            linear
            for switch, linears in architecture.biases.items()
            if switch == "always" or config.get(switch)
            for linear in linears
        ]
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        kv_heads = config.get("num_key_value_heads", architecture.kv_heads)
        head_dim = config.get("head_dim")
        if head_dim is None:
            head_dim = architecture.head_dim
        if head_dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
            head_dim = hidden // heads
        tied = config.get("tie_word_embeddings")
        values = {name: config[name] for name in cls.model_fields if name in config}
        values |= {
            "num_key_value_heads": heads if kv_heads is None else kv_heads,
            "head_dim": head_dim,
            "tie_word_embeddings": architecture.tied if tied is None else tied,
            "biases": tuple(biases),
        }
        try:
            return cls(**values)
        except ValidationError as error:
            raise UserError(f"{where}: {first_problem(error)}") from error

    def units(self, space: Space) -> int:
        """How many units of a space a layer of the full model has."""
        return int(getattr(self, space.size))

    def unit_size(self, unit: Unit) -> int:
        """Rows or columns that one unit owns."""
        group = self.num_attention_heads // self.num_key_value_heads
        return {"channel": 1, "head": self.head_dim, "group": group * self.head_dim}[unit]

    def linear_shape(self, linear: Linear, units: Mapping[str, int] | None = None) -> tuple[int, int]:
        """(out_features, in_features) of a linear; `units` gives a pruned layer's units by space name."""
        shape = [self.hidden_size, self.hidden_size]
        space, cut = CUTS[linear]
        count = self.units(space) if units is None else units[space.name]
        shape[cut.axis] = count * self.unit_size(cut.unit)
        return shape[0], shape[1]

    def linear_shapes(
        self, linears: Iterable[Linear], units: Callable[[int], Mapping[str, int] | None] = lambda layer: None
    ) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear, lm_head included, by module path.

        Args:
            linears: those of a decoder layer.
            units: a pruned layer's units by space name, of a layer's index; None where it is whole.
        """
        shapes = {
            f"model.layers.{layer}.{linear}": self.linear_shape(linear, units(layer))
            for layer in range(self.num_hidden_layers)
            for linear in linears
        }
        return {**shapes, "lm_head": (self.vocab_size, self.hidden_size)}

    def tensor_shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the full model, by name; no lm_head where it is tied."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for linear in architecture.linears:
                shapes[f"{prefix}.{linear}.weight"] = self.linear_shape(linear)
                if linear in self.biases:
                    shapes[f"{prefix}.{linear}.bias"] = self.linear_shape(linear)[:1]
            shapes |= {f"{prefix}.{norm}.weight": (self.hidden_size,) for norm in architecture.norms}
            shapes |= {f"{prefix}.{norm}.weight": (self.head_dim,) for norm in architecture.head_norms}
        shapes["model.norm.weight"] = (self.hidden_size,)
        return shapes if self.tie_word_embeddings else {**shapes, "lm_head.weight": (self.vocab_size, self.hidden_size)}

    def layer_parameters(self, architecture: Architecture, units: Mapping[str, int] | None = None) -> int:
        """Parameters of one decoder layer, full or with `units` of each space."""
        total = len(architecture.norms) * self.hidden_size + len(architecture.head_norms) * self.head_dim
        for linear in architecture.linears:
            rows, columns = self.linear_shape(linear, units)
            total += rows * columns + (rows if linear in self.biases else 0)
        return total

    def other_parameters(self) -> int:
        """Parameters outside the decoder layers: embedding, final norm, and lm_head unless tied."""
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * self.hidden_size + self.hidden_size
