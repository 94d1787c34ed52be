"""The bytes of what is held from the first step to the last: frozen weights, adapter, optimiser."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from loram.base.constants import NF4_BLOCK, NF4_NESTED_BLOCK
from loram.planner.settings import Settings
from loram.planner.shapes import Model

# Every weight in NF4 has these tables, in float32: 16 values, 256 values of the constants' own code, and a mean.
_TABLES = 4 * (16 + 256 + 1)
_SMALLEST_8BIT, _OPTIMIZER_BLOCK = 4096, 256
_SMALLEST_PAGED = 100_000  # values
_CODES = 2 * 4 * 256  # the codes of both moments, once per optimiser


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """The bytes of a frozen model.

    Args:
        weights: the weights themselves, with the masks of sparse ones.
        constants: the constants of weights in NF4.
        host: what is in host memory.
    """

    weights: int
    constants: int
    host: int

    @property
    def total(self) -> int:
        """Return the bytes on the device and in host memory together."""
        return self.weights + self.constants + self.host


def nf4_bytes(parameters: int) -> tuple[int, int]:
    """Return (bytes of the values, bytes of their constants) of one weight in NF4 with double quantisation.

    A value takes half a byte; a block of 64 values has an 8-bit constant, and 256 of these have one in float32; and
    there are tables. Together that is 0.516 bytes per value. This is bitsandbytes' layout, which rounds every block up.
    """
    blocks = ceil(parameters / NF4_BLOCK)
    return ceil(parameters / 2), blocks + 4 * ceil(blocks / NF4_NESTED_BLOCK) + _TABLES


def frozen_bytes(model: Model, settings: Settings) -> WeightBytes:
    """Return the bytes of the frozen weights; a tied head is the embedding, in 4 bits too."""
    geometry, size = model.geometry, settings.compute_bytes
    masks = sum(layer.mask_bytes for layer in model.layers)
    if not settings.quantised:
        return WeightBytes(weights=model.parameters * size + masks, constants=0, host=0)
    tables = 1 if settings.embedding_in_host or geometry.tie_word_embeddings else 2
    second = 0 if settings.embedding_in_host else 1
    quantised = [
        (model.vocabulary, tables),
        *((size, second if looked_up else 1) for size, looked_up in model.matrices_outside),
        *(matrices for layer in model.layers for matrices in layer.quantisable),
    ]
    kept = sum(layer.kept_whole for layer in model.layers) + geometry.hidden_size + model.vectors_outside
    packed = [
        (count * values, count * constants) for size, count in quantised for values, constants in [nf4_bytes(size)]
    ]
    looked_up = model.vocabulary + sum(size for size, looked_up in model.matrices_outside if looked_up)
    host = looked_up * 2 if settings.embedding_in_host else 0  # as in the file, which is usually in 16 bits
    return WeightBytes(
        weights=sum(values for values, _ in packed) + kept * size + masks,
        constants=sum(constants for _, constants in packed),
        host=host,
    )


def adapted(model: Model, settings: Settings) -> Iterator[tuple[int, int]]:
    """Yield (out_features, in_features) of every linear that has an adapter."""
    for layer in model.layers:
        for linear in layer.targeted(settings.targets):
            yield layer.shapes[linear.path]
    if model.architecture.head in settings.targets:
        yield model.geometry.vocab_size, model.geometry.hidden_size


def factors(model: Model, settings: Settings) -> Iterator[int]:
    """Yield how many parameters each tensor of the adapter has: lora_A and lora_B of each adapted linear."""
    for rows, columns in adapted(model, settings):
        yield settings.rank * columns
        yield settings.rank * rows


def trained(model: Model, settings: Settings) -> Iterator[int]:
    """Yield how many parameters of each tensor of the adapter train, in the order of `factors`."""
    in_a, in_b = settings.trained_ranks
    for rows, columns in adapted(model, settings):
        yield in_a * columns
        yield in_b * rows


def optimizer_bytes(model: Model, settings: Settings) -> int:
    """Return the bytes of AdamW's two moments, in the adapter's dtype or 8 bits; small tensors are never in 8 bits."""
    if not settings.optimizer[0]:
        return 2 * settings.lora_bytes * sum(trained(model, settings))
    total, any_8bit = 0, False
    for parameters in trained(model, settings):
        if parameters < _SMALLEST_8BIT:
            total += 2 * 4 * parameters
        else:
            total += 2 * (parameters + 4 * ceil(parameters / _OPTIMIZER_BLOCK))
            any_8bit = True
    return total + (_CODES if any_8bit else 0)


def pageable_bytes(model: Model, settings: Settings) -> int:
    """Return the bytes of the two moments that may go to host memory; bitsandbytes leaves small tensors on the GPU."""
    in_8bit, paged = settings.optimizer
    if not paged:
        return 0
    value = 1 if in_8bit else settings.lora_bytes
    return 2 * value * sum(count for count in trained(model, settings) if count >= _SMALLEST_PAGED)


def file_bytes(model: Model) -> int:
    """Return the bytes of a stored value: as config.json says, or else 2."""
    dtype = model.config.get("dtype", model.config.get("torch_dtype"))
    return 4 if dtype == "float32" else 2
