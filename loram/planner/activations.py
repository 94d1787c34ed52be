"""Bytes that autograd keeps between forward and backward, term by term as transformers and PEFT compute.

Every term is a tensor; `tests/test_planner.py` holds the sums against what autograd saves. Rows are taken to have no
padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loram.planner.settings import Settings
from loram.planner.shapes import Layer, Model

CHUNK_TOKENS = 512  # of the loss: `loram.compute.loss.CHUNK_TOKENS`
_FLOAT32 = 4
# linear -> what it reads
_READS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "layer"),
    "self_attn.o_proj": "attention",
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    "mlp.down_proj": "channels",
}
_OFFLOAD_STASH = 5  # tensors that TRL's offloading leaves on the device at a time


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a value of each kind, and tokens.

    Args:
        value: of what the model computes with.
        mask: of dropout's mask, if there is dropout.
        adapted: of what an adapter reads and of its rank-wide middle. On a GPU autocast brings both to 16 bits.
    """

    value: int
    mask: int
    adapted: int

    @classmethod
    def of(cls, settings: Settings) -> "Sizes":
        """Those of a training."""
        if settings.device == "cuda":
            return cls(value=2, mask=1 if settings.dropout else 0, adapted=2)
        return cls(value=4, mask=settings.lora_bytes if settings.dropout else 0, adapted=settings.lora_bytes)


def saved_by_layer(model: Model, layer: Layer, settings: Settings, *, first: bool = False) -> int:
    """What one decoder layer saves in a forward pass with gradients.

    Args:
        model: the model it is in.
        layer: its sizes.
        settings: how it is trained.
        first: whether nothing below it is trained, so that its inputs need no gradient.
    """
    size, hidden, tokens = Sizes.of(settings), model.geometry.hidden_size, settings.tokens
    targets = [name for name in layer.linears if name.split(".")[1] in settings.targets]
    per_token = layer.norms * (hidden + 1) * _FLOAT32  # the input and 1 / its length
    per_token += _by_adapters(model, layer, targets, settings, size)
    per_token += 3 * layer.channels * size.value  # gate, act(gate), up
    if layer.head_norms:
        per_token += (layer.queries + layer.heads + layer.keys + layer.kv_heads) * _FLOAT32
    if first:
        readers = [name for name in targets if _READS[name] == "layer"]
        per_token -= (hidden + 1) * _FLOAT32 + len(readers) * hidden * size.mask
    return tokens * per_token + _attention(model, layer, settings, size) + _norm_weights(model, layer, first)


def saved_by_mlp(model: Model, layer: Layer, settings: Settings) -> int:
    """The part of it that backward has freed when it comes to attention."""
    size = Sizes.of(settings)
    targets = [name for name in layer.linears if name[:4] == "mlp." and name[4:] in settings.targets]
    norms = (layer.norms - 1) * (model.geometry.hidden_size + 1) * _FLOAT32  # all but the one before attention
    adapters = _by_adapters(model, layer, targets, settings, size)
    return settings.tokens * (norms + adapters + 3 * layer.channels * size.value)


def _by_adapters(model: Model, layer: Layer, targets: Sequence[str], settings: Settings, size: Sizes) -> int:
    """A token's bytes for adapted linears: dropout's mask, what lora_A reads if it trains, what lora_B reads.

    With dropout, or cast to the adapter's dtype, what lora_A reads is a tensor of its own for every linear. Else it is
    the linear's input: one for q, k and v, one for gate and up, down's, and o's, which attention has kept already.
    """
    inputs = [layer.linears[name][1] for name in targets]
    kept = sum(inputs) * size.mask + len(targets) * settings.rank * size.adapted
    if not settings.trained_ranks[0]:
        return kept
    if settings.dropout or settings.lora_bytes != settings.compute_bytes:
        return kept + sum(inputs) * size.adapted
    shared = {_READS[name]: layer.linears[name][1] for name in targets}
    if model.architecture.model_type != "gemma2":  # which computes attention by itself and keeps less of it
        shared.pop("attention", None)
    return kept + sum(shared.values()) * size.adapted


def _attention(model: Model, layer: Layer, settings: Settings, size: Sizes) -> int:
    """Between the projections: queries, keys, values, what comes out, and what is as wide as the text is long."""
    tokens, length = settings.tokens, settings.length
    if model.architecture.model_type == "gemma2":  # computes all weights, since it squashes them: tanh and softmax
        capped = model.config.get("attn_logit_softcapping", 50.0) is not None
        weights = (size.value if capped else 0) + _FLOAT32 + (size.value if size.value != _FLOAT32 else 0)
        return tokens * 3 * layer.queries * size.value + tokens * length * layer.heads * weights
    masked = layer.window is not None and length >= layer.window
    keys = layer.queries if masked else layer.keys  # under a mask they are copied for every query head
    mask = tokens * length * size.value if masked else 0
    return tokens * ((2 * layer.queries + 2 * keys) * size.value + layer.heads * _FLOAT32) + mask


def _norm_weights(model: Model, layer: Layer, first: bool) -> int:
    """Gemma's norms multiply by 1 + weight, which is a tensor of its own."""
    if not model.architecture.model_type.startswith("gemma"):
        return 0
    return _FLOAT32 * (layer.norm_values - (model.geometry.hidden_size if first else 0))


def saved_around_layers(model: Model, settings: Settings) -> int:
    """What is saved outside the decoder layers: rotary tables, the last norm, and what the loss reads."""
    hidden, size = model.geometry.hidden_size, Sizes.of(settings)
    tables = (
        len({layer.window is None for layer in model.layers}) if model.architecture.model_type == "gemma3_text" else 1
    )
    rotary = tables * 2 * settings.length * model.geometry.head_dim * size.value
    norm = settings.tokens * (hidden + 1) * _FLOAT32
    norm += _FLOAT32 * hidden if model.architecture.model_type.startswith("gemma") else 0
    places = settings.rows * (settings.length - 1)  # the first token is never predicted
    return rotary + norm + places * hidden * size.value


def layer_input(model: Model, settings: Settings) -> int:
    """Hidden states that enter a layer: all that checkpointing keeps of it."""
    return settings.tokens * model.geometry.hidden_size * Sizes.of(settings).value


def offloaded_stash(model: Model) -> int:
    """How many layers' inputs are on the device while the others are in host memory."""
    return min(_OFFLOAD_STASH, model.geometry.num_hidden_layers)
