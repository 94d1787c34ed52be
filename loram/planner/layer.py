"""One decoder layer as sizes alone: what it holds, and how its attention is computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from loram.model.segments import Linear


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The sizes of one layer's experts, of which a router sends each token to a few.

    Args:
        experts: how many experts there are.
        chosen: how many of them a token goes to.
        channels: the width of each expert.
        matrices: (rows, columns) of each matrix of one expert.
        biases: how many values all biases of one expert have together.
    """

    experts: int
    chosen: int
    channels: int
    matrices: tuple[tuple[int, int], ...]
    biases: int

    @property
    def weights(self) -> int:
        """Return how many values the matrices of one expert have."""
        return sum(map(prod, self.matrices))

    @property
    def parameters(self) -> int:
        """Return how many parameters all experts have together."""
        return self.experts * (self.weights + self.biases)

    @property
    def idle_parameters(self) -> int:
        """Return how many of these parameters are in experts that a token does not go to."""
        return (self.experts - self.chosen) * (self.weights + self.biases)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The sizes of one decoder layer.

    Args:
        index: its number in the full model.
        linears: its linears by their paths.
        shapes: (out_features, in_features) of each linear.
        values: how many weights of each linear are stored: all of them, or those that a sparse linear keeps.
        biases: how many values all its biases have together.
        heads, kv_heads, head_dim: the number of query heads and of key-value heads, and the width of each; no heads
            where something else mixes the tokens.
        own_keys: whether its keys and values are its own, and not an earlier layer's.
        gated: whether what each head gives is multiplied by a gate.
        channels: the width of the MLP; 0 where it has none.
        shared: the width of the experts that every token passes; 0 where it has none.
        routed: its other experts, or None where it has none.
        tensors: the shapes of its tensors that are in no linear, norm or expert, such as a router.
        bypasses: how many values the factors of all bypasses beside its blocks have together.
        values_width: the width of the tensor that the values are in: all key-value heads, and with a fused linear its
            queries and keys too; 0 where something else mixes the tokens.
        layer_input: how many values a token has in this layer beside its hidden states.
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
    own_keys: bool
    gated: bool
    channels: int
    shared: int
    routed: Routed | None
    tensors: Mapping[str, tuple[int, ...]]
    bypasses: int
    values_width: int
    layer_input: int
    norms: int
    head_norms: int
    norm_values: int
    window: int | None

    @property
    def weights(self) -> int:
        """Return how many values a token is multiplied by; the zeros of sparse linears count too.

        They are those of the linears, of bypasses, of the experts that the token goes to, and of the tensors that are
        no vectors.
        """
        routed = 0 if self.routed is None else self.routed.chosen * self.routed.weights
        return (
            self._in_linears
            + self.bypasses
            + routed
            + sum(prod(shape) for shape in self.tensors.values() if len(shape) > 1)
        )

    @property
    def _in_linears(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def mask_bytes(self) -> int:
        """The bytes of the masks of sparse linears, with one bit per place."""
        return self._in_linears // 8 if self._in_linears != sum(self.values.values()) else 0

    @property
    def largest(self) -> int:
        """Return how many values its largest tensor has; the experts' matrices of one kind are one tensor."""
        experts = [] if self.routed is None else [self.routed.experts * prod(shape) for shape in self.routed.matrices]
        return max([*map(prod, self.shapes.values()), *experts])

    @property
    def kept_whole(self) -> int:
        """Return how many values are never in 4 bits: those of biases, norms, bypasses, and what is in no matrix."""
        experts = 0 if self.routed is None else self.routed.experts * self.routed.biases
        return self.biases + self.norm_values + self.bypasses + sum(map(prod, self.tensors.values())) + experts

    @property
    def quantisable(self) -> list[tuple[int, int]]:
        """Return (values, how many there are) of the matrices that are quantised, each by itself, in 4 bits."""
        experts = [] if self.routed is None else [(prod(shape), self.routed.experts) for shape in self.routed.matrices]
        return [*((values, 1) for values in self.values.values()), *experts]

    @property
    def parameters(self) -> int:
        """Return how many parameters it has; sparse linears count those that stay."""
        experts = 0 if self.routed is None else self.routed.experts * self.routed.weights
        return sum(self.values.values()) + experts + self.kept_whole

    @property
    def active_parameters(self) -> int:
        """Return how many of its parameters a token meets: all but those of experts that it does not go to."""
        return self.parameters - (0 if self.routed is None else self.routed.idle_parameters)

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
