"""What a decoder layer is made of: the types of the parts in a family's row. Nothing here touches a weight.

Four words recur in the whole project:

- A *unit* is the smallest thing that structured pruning removes: an MLP channel, a key-value head together with all
  query heads that read it (a *group*), an expert, or a channel of one expert.
- A *space* is a dimension of a decoder layer that can lose units: `kv_groups`, `channels`, and in a mixture of experts
  `experts` and `expert_channels`.
- A *segment* is a run of neighbouring rows or columns that mean one thing. Most linears have one segment per side; a
  fused `qkv_proj` has three segments of rows: queries, keys, values.
- A *path* is the name of a module inside its decoder layer, such as `mlp.up_proj`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["channel", "pair", "head", "group", "gated_group", "query", "hidden", "shared"]
MixerUnit = Literal["mixer_keys", "mixer_values", "mixer_heads", "mixer_head", "kernel"]
WholeUnit = Literal["queries", "keys", "layer_input", "layer_inputs", "layer_input_vocabulary"]
Reads = Literal["layer", "attention", "mixer", "mlp", "channels", "shared", "hidden", "layer_input"]


@dataclass(frozen=True, kw_only=True)
class Space:
    """A dimension of a decoder layer that can be pruned.

    Args:
        name: its name in plans and reports.
        size: the `Geometry` field that holds how many units a full layer has.
        config_keys: the keys of transformers' config that are smaller in a narrowed layer, in proportion to its units.
        rounding: whether a number of kept units that is not whole is rounded `up` or `down`.
        multiple: what the number of kept units is a multiple of, after rounding.
        within: the space each of whose units has `size` units of this one: an expert has channels of its own. Every
            unit that stays of that space keeps as many of this one.
        least: the `Geometry` field that holds how many units have to stay; None is one unit.
        attributes: the names under which the modules that hold these units keep their number (of a space that is
            `within` another: the number in each unit of that).
    """

    name: str
    size: str
    config_keys: tuple[str, ...] = ()
    rounding: Literal["up", "down"]
    multiple: int = 1
    within: "Space | None" = None
    least: str | None = None
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Neighbouring rows or columns of a tensor that mean one thing.

    Args:
        name: what they are; segments that differ only in their name (keys and values) are pruned alike.
        unit: what one unit owns: a `channel` is 1 row, a `pair` is the 2 rows of a channel whose gate and up are
            neighbours, a `head` is `head_dim` rows, a `group` is the rows of all query heads of one key-value head, and
            a `gated_group` twice as many, since each head has a gate behind its queries; `hidden` is `hidden_size`
            rows, `shared` is one row per channel of the experts that every token passes, and `query` is one row per
            query head of one key-value head. In a layer that mixes tokens by a state or a convolution, and not by
            attention, `mixer_keys` and `mixer_values` are the rows of all its key heads and of all its value heads,
            `mixer_heads` is one row per value head, `mixer_head` is the rows of one value head, and `kernel` is one row
            per token that its convolution sees. `queries` and `keys` are the rows of all query heads and of all
            key-value heads, where they are never cut. `layer_input` is what a layer gets of each token beside the
            hidden states, `layer_inputs` that of all layers, and `layer_input_vocabulary` is one row per token that has
            some.
        space: the space whose units these are. A segment without a space is one unit, and is never cut.
    """

    name: str
    unit: Unit | MixerUnit | WholeUnit
    space: Space | None = None


HIDDEN = Segment(name="hidden", unit="hidden")
ONE = Segment(name="one", unit="channel")
SHARED = Segment(name="shared", unit="shared")
ONE_HEAD = Segment(name="one head", unit="head")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear of a decoder layer.

    Args:
        path: the module's path inside the layer.
        reads: which input it gets: the `layer`'s normed hidden states, what `attention` or another `mixer` of tokens
            gives, the `mlp`'s normed hidden states, the MLP's `channels`, those of the `shared` experts, the `hidden`
            states themselves, or the `layer_input` that a layer gets beside them. Linears that read the same see the
            same tensor.
        rows: the segments of its outputs: rows of the weight, bias and lora_B.
        columns: the segments of its inputs: columns of the weight and lora_A.
        kinds: the kinds of layers that have it; empty where every layer does.
        adapted: whether it gets an adapter where nobody says which linears should.
    """

    path: str
    reads: Reads
    rows: tuple[Segment, ...] = (HIDDEN,)
    columns: tuple[Segment, ...] = (HIDDEN,)
    kinds: tuple[str, ...] = ()
    adapted: bool = True

    @property
    def name(self) -> str:
        """The last part of the path, which is what PEFT's `target_modules` lists."""
        return self.path.rpartition(".")[2]

    @property
    def block(self) -> str:
        """The path of the module that it is in: `self_attn`, `mlp`."""
        return self.path.rpartition(".")[0]

    @property
    def sides(self) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """The segments by axis of the weight: rows at 0, columns at 1."""
        return self.rows, self.columns

    @property
    def has_units(self) -> bool:
        """Return whether pruning can make it smaller."""
        return any(segment.space is not None for side in self.sides for segment in side)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm of a decoder layer.

    Args:
        path: the module's path inside the layer.
        width: what its weight is as wide as: the hidden size, one head, or a segment of a space (all heads).
        kinds: the kinds of layers that have it; empty where every layer does.
    """

    path: str
    width: Segment = HIDDEN
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A tensor of a decoder layer that is neither in a linear nor in a norm, such as stacked experts.

    Args:
        name: the tensor's name inside the layer. One that ends with `.bias` is there only where the row's `biases` say
            that its module has a bias.
        axes: the segments of each of its dimensions.
        kinds: the kinds of layers that have it; empty where every layer does.
        buffer: whether it is a buffer, which is stored as parameters are but does not count as one.
    """

    name: str
    axes: tuple[tuple[Segment, ...], ...]
    kinds: tuple[str, ...] = ()
    buffer: bool = False


@dataclass(frozen=True, kw_only=True)
class Argument:
    """What decoder layers get beside the hidden states, and what depends on the text.

    Args:
        name: the name of the layers' argument.
        readers: the kinds of layers that read it.
    """

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a layer, of which a router sends each token to a few.

    Args:
        path: the path of the module inside the layer that holds them all as 3-D tensors. It is called with the hidden
            states, (tokens, hidden), and the numbers and the weights of each token's experts, (tokens, k) both.
        router: the name of the router's weight inside the layer, (experts, hidden).
        in_files: a tensor's name inside the layer -> the names of its parts in checkpoints that have one tensor per
            expert, where {} stands for the expert's number. Parts are joined along their rows, and experts are stacked.
        renamed: the beginning of a name inside the layer in such checkpoints -> what it is in the model.
        transposed: whether its tensors are (experts, inputs, outputs), and not (experts, outputs, inputs).
        groups: the key of config.json with the number of groups that the router first chooses among, each of which has
            as many experts; 1 where config.json leaves it out.
        kept_values: how many values per channel an expert keeps for its backward pass: gate, act(gate), up; more where
            these are clamped and scaled.
        balanced_by_loss: whether transformers trains the router with a loss of its own for even use of the experts.
            Where it does not, a bias is set that steers the choice.
    """

    path: str
    router: str
    in_files: Mapping[str, tuple[str, ...]]
    renamed: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    groups: str | None = None
    kept_values: int = 3
    balanced_by_loss: bool = True
