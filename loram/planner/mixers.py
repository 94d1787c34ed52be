"""Bytes that autograd keeps of layers that mix tokens by a state or a convolution, and not by attention.

The terms are those of transformers' own PyTorch code, which computes where no kernels for these mixers are installed.
Kernels keep less.
"""

from math import ceil

from loram.model.geometry import Geometry
from loram.planner.settings import Settings

_FLOAT32 = 4
_CHUNK = 64  # tokens that a state is updated with at a time


def saved_by_mixer(geometry: Geometry, settings: Settings, value: int) -> int:
    """Return the bytes between the linears of a mixer, for a micro-batch; `value` is the bytes of a computed value."""
    delta_net = geometry.linear_num_value_heads > 0
    return _delta_net(geometry, settings, value) if delta_net else _short_convolution(geometry, settings, value)


def _short_convolution(geometry: Geometry, settings: Settings, value: int) -> int:
    """Return the bytes of LFM2's mixer: its three inputs, the product of two, and the padded convolution of that."""
    padded = settings.rows * (settings.length + geometry.linear_conv_kernel_dim - 1)
    return geometry.hidden_size * value * (4 * settings.tokens + padded)


def _delta_net(geometry: Geometry, settings: Settings, value: int) -> int:
    """Return the bytes of Qwen's Gated DeltaNet (arXiv 2412.06464), whose rows are padded to whole chunks.

    They are the convolution's input and padded output; queries, keys and their lengths, the gates, and the gated norm;
    then, in float32, what the tokens of a chunk are to each other (five times), what they are to the state, and the
    state after every chunk. Rows that are whole chunks are not copied to be padded, and so lie in memory in an order in
    which queries and keys have to be copied for each product.
    """
    heads, values = geometry.linear_num_value_heads, geometry.linear_value_head_dim
    keys, chunks = geometry.linear_key_head_dim, ceil(settings.length / _CHUNK)
    convolved = 2 * geometry.linear_num_key_heads * keys + heads * values
    padded = settings.rows * (settings.length + geometry.linear_conv_kernel_dim - 1)
    padded_copies = 6 * chunks if chunks > 1 else 5  # the first chunk reads no state
    copies = padded_copies if settings.length % _CHUNK else 10 * chunks - 1
    in_chunks = settings.rows * _CHUNK * heads * (chunks * (5 * _CHUNK + 3 * values + 4) + copies * keys)
    by_token = settings.tokens * heads * (2 * (keys + 1) + 2 + 4 * values + 1)
    states = settings.rows * chunks * heads * (keys * values + 1) + heads
    mask = _CHUNK * _CHUNK
    return convolved * (settings.tokens + padded) * value + (in_chunks + by_token + states) * _FLOAT32 + mask
