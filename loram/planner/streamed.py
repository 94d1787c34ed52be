"""What the streamed engine takes: its peak memory, and the bytes that an optimiser step reads and leaves in files."""

from loram.base.constants import BATCH_TOKENS, BLOCK_BYTES, HIDDEN_BYTES
from loram.planner.activations import layer_input, saved_by_layer
from loram.planner.settings import Settings
from loram.planner.shapes import Model
from loram.planner.weights import file_bytes, nf4_bytes

_FLOAT32 = 4


def layer_moment(model: Model, settings: Settings) -> dict[str, int]:
    """Return the bytes, by the names of `TrainingMemory`, while the backward pass is in the largest layer.

    The layer's weights are in the computing dtype, and its factors and their products in float32. On a CPU the next
    layer is being read meanwhile, and hidden states are in memory up to their budget, as is what the user keeps in RAM.
    """
    during = settings.measuring(rows=micro_batch_rows(settings))
    layer = max(model.layers, key=lambda layer: layer.parameters)
    saved = saved_by_layer(model, layer, during)
    if settings.device == "cuda":
        saved += during.tokens * _FLOAT32 * sum(layer.shapes[each.path][1] for each in layer.targeted(settings.targets))
    weights = layer.parameters * settings.compute_bytes + _embedding_bytes(model, settings)
    at_hand = settings.device == "cpu"
    return {
        "weights": weights + (kept_bytes(model, settings) if at_hand else 0),
        "activations": saved + (hidden_in_ram(model, settings) if at_hand else 0),
        "recomputation": 8 * layer_input(model, during),
        "scratch": read_ahead(model) if at_hand else 0,
    }


def head_moment(model: Model, settings: Settings) -> dict[str, int]:
    """Return the bytes while the logits are worked out, a slice of the vocabulary at a time."""
    at_hand = settings.device == "cpu"
    hidden = hidden_in_ram(model, settings) if at_hand else 0
    sums = 2 * _step_tokens(settings) * model.geometry.hidden_size * _FLOAT32  # what the head reads, and its gradient
    return {
        "weights": _embedding_bytes(model, settings) + (kept_bytes(model, settings) if at_hand else 0),
        "activations": hidden + (sums if at_hand else 0),
        "logits": 3 * BLOCK_BYTES,
        "scratch": BLOCK_BYTES + (model.vocabulary * file_bytes(model) if at_hand else 0),
    }


def host_bytes(model: Model, settings: Settings) -> int:
    """Return the bytes of RAM beside a GPU: a layer on its way, the next one, hidden states, and what is kept."""
    layer = max(layer.parameters for layer in model.layers)
    head = model.vocabulary * file_bytes(model)
    return (
        layer * file_bytes(model)
        + read_ahead(model)
        + head
        + hidden_in_ram(model, settings)
        + kept_bytes(model, settings)
    )


def read_ahead(full: Model) -> int:
    """Return the bytes of what is as in the files while a layer computes.

    That is the next layer, or what it has beside its experts, of which one tensor is read at a time.
    """
    beside = max(layer.parameters - (0 if layer.routed is None else layer.routed.parameters) for layer in full.layers)
    experts = max((layer.largest for layer in full.layers if layer.routed is not None), default=0)
    return file_bytes(full) * (beside + experts)


def hidden_bytes(model: Model, settings: Settings) -> int:
    """Return the bytes of the hidden states of a step's rows before every layer, and of one gradient."""
    layers = model.geometry.num_hidden_layers + 2
    return layers * _step_tokens(settings) * model.geometry.hidden_size * settings.compute_bytes


def hidden_in_ram(model: Model, settings: Settings) -> int:
    """Return the bytes of these that are in RAM; the others are in a file."""
    return min(HIDDEN_BYTES, hidden_bytes(model, settings))


def kept_bytes(model: Model, settings: Settings) -> int:
    """Return the bytes of the model that stay in RAM."""
    return min(settings.ram_bytes, _read_once(model, settings))


def read_per_step(model: Model, settings: Settings) -> int:
    """Return the bytes of the model that are read in an optimiser step once what is kept has been read.

    Each layer is read forward and backward, and the head once. In 4 bits these are the packed weights' bytes, as in a
    folder that `loram quantize` made.
    """
    kept = settings.ram_bytes
    total = 0
    for layer in model.layers:
        size = _layer_bytes(layer.parameters, model, settings)
        if size > kept:
            total += 2 * (size - kept)
        kept = max(0, kept - size)
    return total + max(0, _head_bytes(model, settings) - kept)


def _read_once(model: Model, settings: Settings) -> int:
    layers = (_layer_bytes(layer.parameters, model, settings) for layer in model.layers)
    return sum(layers) + _head_bytes(model, settings)


def _layer_bytes(parameters: int, model: Model, settings: Settings) -> int:
    return sum(nf4_bytes(parameters)) if settings.quantised else parameters * file_bytes(model)


def _head_bytes(model: Model, settings: Settings) -> int:
    if settings.quantised and model.geometry.tie_word_embeddings:
        return 0  # the embedding, which stays on the device
    return _layer_bytes(model.vocabulary, model, settings)


def _embedding_bytes(model: Model, settings: Settings) -> int:
    """Return the bytes of the packed embedding, which stays on the device; in 16 bits only its used rows are read."""
    return sum(nf4_bytes(model.vocabulary)) if settings.quantised else 0


def _step_tokens(settings: Settings) -> int:
    return settings.tokens * settings.micro_batches


def micro_batch_rows(settings: Settings) -> int:
    """Return how many of the longest rows pass a layer together."""
    return min(settings.rows * settings.micro_batches, max(1, BATCH_TOKENS // settings.length))
