"""Bytes that autograd keeps between forward and backward, term by term as transformers and PEFT compute.

Every term is a tensor; `tests/planner/test_planner.py` compares the sums with what autograd saves. Rows are taken to
have no padding. Experts are taken to be computed by transformers' `grouped_mm`, its default on a CPU and on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loram.model.segments import Linear
from loram.planner.layer import Layer, Routed
from loram.planner.mixers import saved_by_mixer
from loram.planner.settings import Settings
from loram.planner.shapes import Model

_FLOAT32, _INT32, _INT64 = 4, 4, 8
_OFFLOAD_STASH = 5  # tensors that TRL's offloading leaves on the device at a time


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes per value.

    Args:
        value: bytes of a value that the model computes with.
        mask: bytes of a value of dropout's mask; 0 without dropout.
        adapted: bytes of a value that an adapter reads, and of its rank-wide middle. On a GPU autocast brings both to
            16 bits.
    """

    value: int
    mask: int
    adapted: int

    @classmethod
    def of(cls, settings: Settings) -> "Sizes":
        """Return the sizes in a training."""
        if settings.device == "cuda":
            return cls(value=2, mask=1 if settings.dropout else 0, adapted=2)
        return cls(value=4, mask=settings.lora_bytes if settings.dropout else 0, adapted=settings.lora_bytes)


def saved_by_layers(model: Model, settings: Settings) -> list[int]:
    """Return what each decoder layer saves, from the bottom up, as `saved_by_layer` does."""
    saved, first = [], True
    for layer in model.layers:
        saved.append(saved_by_layer(model, layer, settings, first=first))
        first = first and not layer.targeted(settings.targets)
    return saved


def saved_by_layer(model: Model, layer: Layer, settings: Settings, *, first: bool = False) -> int:
    """Return the bytes that one decoder layer saves in a forward pass with gradients.

    Args:
        model: the model that the layer is in.
        layer: the layer's sizes.
        settings: how the model is trained.
        first: whether nothing below the layer is trained, so that its inputs need no gradient.
    """
    size, hidden, tokens = Sizes.of(settings), model.geometry.hidden_size, settings.tokens
    targets = layer.targeted(settings.targets)
    if first and not targets:
        return 0
    row, in_norm = model.architecture, _in_norm(model)
    per_token = layer.norms * in_norm + layer.head_norms * _FLOAT32
    per_token += _by_adapters(model, layer, targets, settings, size)
    per_token += (mlp_values(model, layer) + layer.layer_input) * size.value
    if row.dropout("residual_dropout", model.text_config):
        per_token += 2 * hidden * (1 if settings.device == "cuda" else size.value)  # the masks
    if first:
        readers = [linear for linear in targets if linear.reads == "layer"]
        per_token -= (in_norm if row.normed_inputs else 0) + len(readers) * hidden * size.mask
    between = _attention(model, layer, settings, size) + _router(layer.routed, settings, size)
    return tokens * per_token + between + _norm_weights(model, layer, first)


def _in_norm(model: Model) -> int:
    """Return the bytes that a norm of the hidden size saves per token: its input, and 1 / its length.

    A norm that subtracts the mean does so twice, and saves both results.
    """
    copies = 2 if model.architecture.norms_center else 1
    return (copies * model.geometry.hidden_size + model.architecture.norm_lengths) * _FLOAT32


def mlp_values(model: Model, layer: Layer) -> int:
    """Return how many values an MLP and experts keep per token: gate, act(gate), up, and what each expert gives.

    The latter is multiplied by the router's weight, whose gradient needs it.
    """
    values = 3 * (layer.channels + layer.shared)
    if (experts := model.architecture.experts) is not None and layer.routed is not None:
        each = experts.kept_values * layer.routed.channels + model.geometry.hidden_size
        values += layer.routed.chosen * each
    return values


def _router(routed: Routed | None, settings: Settings, size: Sizes) -> int:
    """Return the bytes that choosing experts keeps.

    A softmax over all experts is in float32, and the chosen ones' weights are divided by their sum. Then the pairs of a
    token and an expert are sorted by expert, which takes three tables of places, and one of where each expert's begin.
    Routers that do not divide, or choose in another way, keep a few values more or less.
    """
    if routed is None:
        return 0
    chosen = _INT64 + _FLOAT32 + size.value + 3 * _INT64  # its number, its weight before and after, its places
    offsets = 0 if settings.quantised else routed.experts * _INT32
    return settings.tokens * (routed.experts * _FLOAT32 + _FLOAT32 + routed.chosen * chosen) + offsets


def saved_by_mlp(model: Model, layer: Layer, settings: Settings) -> int:
    """Return the part of what a layer saves that backward has freed when it comes to attention."""
    size = Sizes.of(settings)
    targets = [linear for linear in layer.targeted(settings.targets) if linear.reads in ("mlp", "channels", "shared")]
    norms = (layer.norms - 1) * _in_norm(model)  # all but the one before attention
    adapters = _by_adapters(model, layer, targets, settings, size)
    kept = norms + adapters + mlp_values(model, layer) * size.value
    return settings.tokens * kept + _router(layer.routed, settings, size)


def _by_adapters(model: Model, layer: Layer, targets: Sequence[Linear], settings: Settings, size: Sizes) -> int:
    """Return the bytes that adapted linears save per token: dropout's mask, and the inputs of trained factors.

    With dropout, or cast to the adapter's dtype, what lora_A reads is a tensor of its own for every linear. Without,
    it is the linear's input, which several linears share: one tensor for q, k and v, one for gate and up, one for down.
    What o reads is attention's output, which attention has kept already, unless o reads a copy of it.
    """
    inputs = [layer.shapes[linear.path][1] for linear in targets]
    kept = sum(inputs) * size.mask + len(targets) * settings.rank * size.adapted
    if not settings.trained_ranks[0]:
        return kept
    if settings.dropout or settings.lora_bytes != settings.compute_bytes:
        return kept + sum(inputs) * size.adapted
    shared = {linear.reads: layer.shapes[linear.path][1] for linear in targets}
    # Attention that is computed term by term keeps no output. Where heads are rotated in part, joining the parts puts
    # the queries head by head in memory; the output is laid out as they are, and copied to be token by token.
    if not kept_per_weight(model, settings) and model.architecture.partial_rotary is None:
        shared.pop("attention", None)
    return kept + sum(shared.values()) * size.adapted


def _attention(model: Model, layer: Layer, settings: Settings, size: Sizes) -> int:
    """Return the bytes between the projections: queries, keys, values, the output, and tensors as wide as the text.

    The values are a view of what their linear gives, so all of that is kept, unless they are copied.
    """
    if not layer.heads:
        return saved_by_mixer(model.geometry, settings, size.value)
    tokens, length = settings.tokens, settings.length
    row, tables = model.architecture, 0
    if row.rotary_by_layer:
        tables += 2 * length * model.rotated(layer.head_dim) * _rotary_bytes(model, size)
    if row.queries_scaled:
        tables += length * size.value
    if weight := kept_per_weight(model, settings):
        sinks = size.value + _INT64 if model.sinks else 0  # a column for them, and where each row's maximum is
        return tokens * (3 * layer.queries * size.value + layer.heads * (length * weight + sinks)) + tables
    masked = layer.window is not None and length >= layer.window
    copied = masked and layer.heads != layer.kv_heads  # under a mask keys and values are copied for every query head
    keys, values = (layer.keys, layer.values_width) if layer.own_keys else (0, 0)
    if copied:
        keys = values = layer.queries
    mask = tokens * length * size.value if masked else 0
    # gates of heads lie between the queries, and what the heads give is kept before and after it is multiplied by them
    gated = 3 * layer.queries if layer.gated else 0
    per_token = (2 * layer.queries + keys + values + gated) * size.value + layer.heads * _FLOAT32
    return tokens * per_token + mask + tables


def kept_per_weight(model: Model, settings: Settings) -> int:
    """Return the bytes that are kept per attention weight; 0 where a fused kernel keeps none of them.

    With a softcap these are tanh and softmax; heads with sinks keep the softmax. A CPU has no fused kernel with
    dropout: softmax, mask, and their product.
    """
    row, value = model.architecture, Sizes.of(settings).value
    if row.attention_softcap is not None:
        capped = row.attention_softcap.of(model.text_config) is not None
        return (value if capped else 0) + _FLOAT32 + (value if value != _FLOAT32 else 0)
    if model.sinks:
        return value
    return 3 * value if settings.device == "cpu" and row.dropout("attention_dropout", model.text_config) else 0


def _rotary_bytes(model: Model, size: Sizes) -> int:
    """Return the bytes of one value of the rotary tables."""
    return _FLOAT32 if model.architecture.rotary_in_float32 else size.value


def _norm_weights(model: Model, layer: Layer, first: bool) -> int:
    """Return the bytes of 1 + weight, which is a tensor of its own where norms multiply by it."""
    if not model.architecture.norms_add_one:
        return 0
    return _FLOAT32 * (layer.norm_values - (model.geometry.hidden_size if first else 0))


def saved_around_layers(model: Model, settings: Settings) -> int:
    """Return the bytes saved outside the decoder layers: rotary tables, the final norm, and the loss's inputs."""
    hidden, size = model.geometry.hidden_size, Sizes.of(settings)
    row = model.architecture
    heads = {layer.window is None if row.rotary_by_window else True: layer.head_dim for layer in model.layers}
    rotated = sum(map(model.rotated, heads.values()))
    rotary = 0 if row.rotary_by_layer else 2 * settings.length * rotated * _rotary_bytes(model, size)
    inputs = settings.tokens * sum(layer.layer_input for layer in model.layers) * size.value
    norm = settings.tokens * _in_norm(model) + (_FLOAT32 * hidden if row.norms_add_one else 0)
    places = settings.rows * (settings.length - 1)  # the first token is never predicted
    return rotary + inputs + norm + places * hidden * size.value


def layer_input(model: Model, settings: Settings) -> int:
    """Return the bytes of the hidden states that enter a layer, which is all that checkpointing keeps of it."""
    return settings.tokens * model.geometry.hidden_size * Sizes.of(settings).value


def offloaded_stash(model: Model) -> int:
    """Return how many layers' inputs are on the device while the others are in host memory."""
    return min(_OFFLOAD_STASH, len(model.layers))
