"""The type of a family's row: what LoRAM has to know about a family of models. Nothing here touches a weight."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from loram.model.segments import Argument, Experts, Linear, Norm, Parameter, Segment, Space


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Which layers attend only to the last few tokens (a sliding window).

    Args:
        slides: (layer, config) -> whether the layer does, for a config.json without `layer_types`.
        switch: a key of config.json that has to be true for any layer to do so.
        default: the window, in tokens, where config.json leaves `sliding_window` out; None is no window.
    """

    slides: Callable[[int, Mapping[str, Any]], bool]
    switch: str | None = None
    default: int | None = 4096

    def of(self, layer: int, config: Mapping[str, Any]) -> int | None:
        """Return how many tokens a layer looks back, or None if it sees all of them."""
        if self.switch is not None and not config.get(self.switch):
            return None
        window: int | None = config.get("sliding_window", self.default)
        if window is None:
            return None
        kinds = config.get("layer_types")
        return window if (kinds[layer] == "sliding_attention" if kinds else self.slides(layer, config)) else None


@dataclass(frozen=True, kw_only=True)
class Softcap:
    """A soft limit cap * tanh(x / cap) on scores.

    Args:
        key: the key of config.json with the cap; null is no cap.
        default: transformers' default where config.json leaves the key out.
    """

    key: str
    default: float | None

    def of(self, config: Mapping[str, Any]) -> float | None:
        """Return the cap that a config sets, or None."""
        cap: float | None = config.get(self.key, self.default)
        return cap


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A factor on the logits, which comes before any softcap.

    Args:
        key: the key of config.json with the factor.
        default: transformers' default where config.json leaves the key out.
        divides: whether logits are divided by it, and not multiplied.
    """

    key: str
    default: float
    divides: bool = False

    def of(self, config: Mapping[str, Any]) -> float:
        """Return what a config makes the logits be multiplied by."""
        factor: float = config.get(self.key, self.default)
        return 1 / factor if self.divides else factor


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family of models: where its tensors are, how they hang together, and transformers' defaults.

    Args:
        model_type: transformers' name of the family.
        model_class: transformers' class of its causal language models.
        config_key: the key of config.json that holds the text model's config, where it is nested.
        decoder: the path of the decoder inside the model: `model`, or `model.language_model` where it is wrapped.
        embedding, layers, final_norm: the names of these modules inside the decoder.
        head: the path of the linear that gives the logits.
        linears: the linears of a decoder layer, those of attention first, each of them before what it feeds.
        norms: the norms of a decoder layer.
        parameters: the other tensors of a decoder layer.
        outside: the decoder's other tensors, which are in no layer; a model has those that any of its layers needs.
        second_embedding: the name of the module among these whose rows are looked up by token, as the embedding's are.
        layer_input: the argument with the values of its own that each token has in a layer beside its hidden states;
            None where tokens have none.
        shared_states: the argument with the keys and values that earlier layers share with later ones, by names that
            the layers choose; None where the family's layers have no such argument.
        blocks: the modules of a decoder layer whose outputs are added to the hidden states; a layer has those of them
            that its kind has.
        kinds: the content of a text model's config.json -> the kind of every layer, where layers differ in what they
            have. A kind is one word, or several with spaces between them; a part is of a kind if it names one of these.
        sizes: the content of a text model's config.json -> fields of `Geometry` that are under other keys there, or
            that have a default.
        unfit: the content of a text model's config.json -> why such a model is not supported, or None.
        experts: the experts of its layers, where it has some.
        recurrent: whether some layers pass a state, or what a convolution sees, from each token to the next, so that
            rows of text cannot be put together into one.
        unused: how the names of tensors begin that files may hold and the model has not, such as a layer that predicts
            the token after the next; {} stands for the number of layers.
        unused_in: a kind of layers -> how the names of tensors inside such a layer begin that files may hold too.
        biases: a switch of config.json -> the paths of the modules that it gives a bias; `always` is no switch.
        on_by_default: the switches among them that are on where config.json leaves them out.
        kv_heads: transformers' default of num_key_value_heads where config.json leaves it out; None is
            num_attention_heads, which is also what a null in config.json means.
        head_dim: transformers' default where config.json leaves it out; None is hidden_size / num_attention_heads.
        tied: transformers' default of tie_word_embeddings where config.json leaves it out.
        tied_keys: the keys of config.json that say whether the head is tied; the first that is there counts.
        windows: its sliding windows.
        attention_softcap: the softcap of attention scores. transformers computes all attention weights of such a
            family itself, since its fused kernels know no softcap.
        logit_softcap: the softcap of logits.
        logit_scale: the factor on logits.
        norms_add_one: whether its norms multiply by 1 + weight.
        norms_center: whether its norms subtract the mean first.
        norm_lengths: how many values beside their inputs its norms keep per vector for the backward pass.
        norms_values: whether values are normed too, head by head, without a weight.
        adds_only: whether all that a layer does is to add to the hidden states, so that layers may be dropped.
        normed_inputs: whether attention reads normed hidden states, and not the hidden states themselves.
        rotary_by_window: whether layers with and without a window have rotary tables of their own.
        rotary_by_layer: whether every layer makes rotary tables of its own from the model's.
        rotary_in_float32: whether rotary tables are in float32, whatever the model computes in.
        queries_scaled: whether queries are also multiplied by a factor that depends on their place.
        dropouts: the dropouts that the family knows, and their defaults where config.json leaves them out:
            `attention_dropout` on attention weights, `residual_dropout` on what attention and MLP give.
        partial_rotary: transformers' default of partial_rotary_factor, the share of a head that is rotated; None where
            the family has no such option and rotates whole heads.
    """

    model_type: str
    model_class: str
    decoder: str
    embedding: str
    layers: str
    final_norm: str
    head: str
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    blocks: tuple[str, ...]
    parameters: tuple[Parameter, ...] = ()
    outside: tuple[Parameter, ...] = ()
    second_embedding: str | None = None
    layer_input: Argument | None = None
    shared_states: Argument | None = None
    config_key: str | None = None
    kinds: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    sizes: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    unfit: Callable[[Mapping[str, Any]], str | None] | None = None
    experts: Experts | None = None
    recurrent: bool = False
    unused: tuple[str, ...] = ()
    unused_in: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    on_by_default: tuple[str, ...] = ()
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    tied_keys: tuple[str, ...] = ("tie_word_embeddings",)
    windows: Windows | None = None
    attention_softcap: Softcap | None = None
    logit_softcap: Softcap | None = None
    logit_scale: Scale | None = None
    norms_add_one: bool = False
    norms_center: bool = False
    norm_lengths: int = 1
    norms_values: bool = False
    adds_only: bool = True
    normed_inputs: bool = True
    rotary_by_window: bool = False
    rotary_by_layer: bool = False
    rotary_in_float32: bool = False
    queries_scaled: bool = False
    dropouts: Mapping[str, float] = field(default_factory=lambda: {"attention_dropout": 0.0})
    partial_rotary: float | None = None

    @property
    def layers_path(self) -> str:
        """The path of the list of decoder layers: `model.layers`."""
        return f"{self.decoder}.{self.layers}"

    @property
    def final_norm_path(self) -> str:
        """The path of the norm before the head: `model.norm`."""
        return f"{self.decoder}.{self.final_norm}"

    @property
    def embedding_weight(self) -> str:
        """The name of the embedding's tensor: `model.embed_tokens.weight`."""
        return f"{self.decoder}.{self.embedding}.weight"

    @property
    def embedding_weights(self) -> tuple[str, ...]:
        """The names of the tensors whose rows are looked up by token: the embedding's, and a second one's."""
        return tuple(f"{path}.weight" for path in self.embeddings)

    @property
    def weights_before_layers(self) -> tuple[str, ...]:
        """The names of the tensors that make what the layers get: those of embeddings, and others outside layers."""
        return tuple(
            dict.fromkeys((*self.embedding_weights, *(f"{self.decoder}.{part.name}" for part in self.outside)))
        )

    @property
    def head_weight(self) -> str:
        """The name of the head's own tensor, which a model with tied embeddings may lack: `lm_head.weight`."""
        return f"{self.head}.weight"

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The paths of the modules whose rows are looked up by token: `model.embed_tokens`, and a second one."""
        names = (self.embedding, *([self.second_embedding] if self.second_embedding else []))
        return tuple(f"{self.decoder}.{name}" for name in names)

    def layer_path(self, layer: int) -> str:
        """Return the path of a decoder layer: `model.layers.3`."""
        return f"{self.layers_path}.{layer}"

    def split(self, name: str) -> tuple[int, str] | None:
        """Return the layer that a tensor or module is in, and its name inside that layer; None where it is in no layer.

        A name may have a prefix, as PEFT's names do, or begin at any part of the layers' path.

        Example: `base_model.model.model.layers.3.mlp.up_proj.lora_A.weight` -> (3, `mlp.up_proj.lora_A.weight`).
        """
        match = self._in_layer.match(name)
        return None if match is None else (int(match["layer"]), match["rest"])

    @cached_property
    def _in_layer(self) -> re.Pattern[str]:
        parts = self.layers_path.split(".")
        tails = "|".join(re.escape(".".join(parts[start:])) for start in range(len(parts)))
        return re.compile(rf"(?:(?:.*\.)?{re.escape(self.layers_path)}|{tails})\.(?P<layer>\d+)\.(?P<rest>.+)")

    def leaves_unused(self, name: str, config: Mapping[str, Any]) -> bool:
        """Return whether the model has no tensor of this name, although files may hold it."""
        layers = self.text_config(config).get("num_hidden_layers")
        if name.startswith(tuple(prefix.format(layers) for prefix in self.unused)):
            return True
        place, kinds = self.split(name), self.layer_kinds(config) if self.unused_in else ()
        if place is None or place[0] >= len(kinds):
            return False
        words = kinds[place[0]].split()
        return place[1].startswith(tuple(prefix for word in words for prefix in self.unused_in.get(word, ())))

    @cached_property
    def linear_spaces(self) -> tuple[Space, ...]:
        """Return what can be pruned of a decoder layer's linears, in the order in which they name it."""
        segments = [segment for linear in self.linears for side in linear.sides for segment in side]
        return tuple(dict.fromkeys(segment.space for segment in segments if segment.space is not None))

    @cached_property
    def spaces(self) -> tuple[Space, ...]:
        """Return what can be pruned in a decoder layer: what its linears name, and then what only parameters name."""
        segments = [segment for parameter in self.parameters for axis in parameter.axes for segment in axis]
        others = (segment.space for segment in segments if segment.space is not None)
        return tuple(dict.fromkeys((*self.linear_spaces, *others)))

    @cached_property
    def expert_tensors(self) -> tuple[Parameter, ...]:
        """Return the tensors that hold the experts; not the router."""
        path = None if self.experts is None else f"{self.experts.path}."
        return tuple(part for part in self.parameters if path is not None and part.name.startswith(path))

    @cached_property
    def expert_matrices(self) -> tuple[Parameter, ...]:
        """Return the 3-D tensors among them, which an adapter can be on, in the order of their module."""
        return tuple(part for part in self.expert_tensors if len(part.axes) == 3)

    @property
    def adapter_targets(self) -> tuple[str, ...]:
        """The names of the linears of decoder layers, as PEFT's `target_modules` lists them."""
        return tuple(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The names among them that get an adapter where nobody says which should."""
        return tuple(dict.fromkeys(linear.name for linear in self.linears if linear.adapted))

    @property
    def experts_transposed(self) -> bool:
        """Return whether the tensors of experts are (experts, inputs, outputs), and not (experts, outputs, inputs)."""
        return self.experts is not None and self.experts.transposed

    def expert_sides(self, tensor: Parameter) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """Return the segments of the outputs and of the inputs of a tensor of experts."""
        _, first, second = tensor.axes
        return (second, first) if self.experts_transposed else (first, second)

    def linear(self, path: str) -> Linear:
        """Return the linear at a path inside the layer."""
        return next(linear for linear in self.linears if linear.path == path)

    def linear_with(self, segment: Segment) -> Linear:
        """Return the linear among whose outputs a segment is."""
        return next(linear for linear in self.linears if segment in linear.rows)

    def of_kind(self, kind: str | None) -> "Architecture":
        """Return the row without what this kind of layer lacks. None stands for layers that are all of one kind."""
        if kind is None:
            return self
        return self._with(kind.split())

    def of_model(self, kinds: Iterable[str]) -> "Architecture":
        """Return the row without what none of a model's layers has; `kinds` are theirs, as `layer_kinds` gives them."""
        words = [word for kind in dict.fromkeys(kinds) for word in kind.split()]
        return self._with(words) if words else self

    def _with(self, words: Iterable[str]) -> "Architecture":
        """Return the row with the parts that one of these words names, and those that every layer has."""
        words = frozenset(words)
        parameters = tuple(part for part in self.parameters if not part.kinds or words & set(part.kinds))
        routed = self.experts is not None and any(part.name == self.experts.router for part in parameters)
        outside = tuple(part for part in self.outside if not part.kinds or words & set(part.kinds))
        return replace(
            self,
            experts=self.experts if routed else None,
            linears=tuple(part for part in self.linears if not part.kinds or words & set(part.kinds)),
            norms=tuple(part for part in self.norms if not part.kinds or words & set(part.kinds)),
            parameters=parameters,
            outside=outside,
            second_embedding=self.second_embedding if outside else None,
            layer_input=_read_in(words, self.layer_input),
            shared_states=_read_in(words, self.shared_states),
        )

    @property
    def without_parts(self) -> "Architecture":
        """Return the row of a layer that was dropped, which has no tensors."""
        return replace(self, linears=(), norms=(), parameters=())

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the part of a config.json that describes the text model."""
        nested: Mapping[str, Any] = config if self.config_key is None else config[self.config_key]
        return nested

    def ties(self, config: Mapping[str, Any]) -> bool:
        """Return whether a text model's config says that the head shares the embedding's weight."""
        said = (config[key] for key in self.tied_keys if config.get(key) is not None)
        return bool(next(said, self.tied))

    def dropout(self, key: str, config: Mapping[str, Any]) -> float:
        """Return a dropout that a text model's config sets; 0 where the family does not know it."""
        return float(config.get(key, self.dropouts[key])) if key in self.dropouts else 0.0

    def layer_kinds(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the kind of every layer from a config.json; empty if all layers have the same parts."""
        return () if self.kinds is None else self.kinds(self.text_config(config))


def _read_in(words: frozenset[str], argument: Argument | None) -> Argument | None:
    """Return an argument with those of its readers that some words name."""
    return argument and replace(argument, readers=tuple(kind for kind in argument.readers if kind in words))
