"""Weights in FP8 or MXFP4 as dense tensors, made a few rows at a time when they are read."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loram.base.constants import BLOCK_BYTES
from loram.base.errors import UserError
from loram.disk.tensorfile import StoredTensor, TensorSpec
from loram.model.packing import Packing

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_PACKED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[qkv])_scale(_ub)?$")
# FP4 has a sign, two bits of exponent and one of mantissa (OCP Microscaling Formats 1.0, table 5).
_FP4 = torch.tensor([sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])
# The two values of each byte, the lower four bits first, as one element of 8 bytes: so they are looked up together.
_PAIRS = torch.stack([_FP4.repeat(16), _FP4.repeat_interleave(16)], dim=1).view(torch.float64).flatten()


class PackedTensor:
    """A weight that is stored as values in few bits and scales, and is read as value times scale, in 16 or 32 bits.

    Each product is made in float32 and rounded once, as transformers and compressed-tensors do it.

    Args:
        values: the stored values.
        scales: the stored scales: one for each block, row, column or tensor. Bytes are exponents of two, less 127.
        packing: how the two are laid out.
        dtype: the dtype of the dense weight.

    Raises:
        UserError: the shapes of values and scales do not fit together.
    """

    def __init__(self, values: StoredTensor, scales: StoredTensor, packing: Packing, dtype: torch.dtype) -> None:
        self.name, self._values, self._scales, self._experts = values.name, values, scales, packing.bits == 4
        stored, grid = values.spec.shape, scales.spec.shape
        self._shape = (*stored[:2], 2 * math.prod(stored[2:])) if self._experts else stored  # one entry for each value
        self._grid = (*grid, *[1] * (len(self._shape) - len(grid)))
        blocks = (*[1] * (len(self._shape) - 2), *(packing.block or (1, 1)))
        self._block = [_shared(*sizes) for sizes in zip(self._shape, self._grid, blocks, strict=False)]
        if not (len(self._shape) == len(self._grid) == len(blocks) and all(self._block)):
            raise UserError(
                f"{scales.file.path}: {scales.name} of shape {grid} does not fit {values.name} of shape {stored} and "
                f"blocks of {packing.block or 'one row or tensor'}; fetch or make the model again"
            )
        shape = (self._shape[0], self._shape[2], self._shape[1]) if self._experts else self._shape
        self.spec = TensorSpec(dtype=dtype, shape=shape)
        self._step = max(1, BLOCK_BYTES // max(1, self.spec.row_bytes))  # what is made in float32 is larger

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the dense weight, or its rows `start` to `stop` (exclusive); only what these need is read."""
        rows = range(*slice(start, stop).indices(self.spec.shape[0]))
        dense = torch.empty((len(rows), *self.spec.shape[1:]), dtype=self.spec.dtype)
        for first in rows[:: self._step]:
            last = min(first + self._step, rows.stop)
            dense[first - rows.start : last - rows.start] = self._product(first, last)
        return dense

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the first row, rows) from the first row to the last, in blocks of about 64 MB."""
        return ((row, self.read(row, row + self._step)) for row in range(0, self.spec.shape[0], self._step))

    def _product(self, first: int, last: int) -> Tensor:
        """Return some rows of the dense weight in float32."""
        block = self._block[0]
        scales = _powers(self._scales.read(first // block, (last - 1) // block + 1)).view(-1, *self._grid[1:])
        scales = scales.index_select(0, torch.arange(first, last) // block - first // block)
        for dimension in range(1, len(self._shape)):
            if self._grid[dimension] > 1:
                repeated = scales.repeat_interleave(self._block[dimension], dimension)
                scales = repeated.narrow(dimension, 0, self._shape[dimension])  # the last block may be a part
        values = self._values.read(first, last)
        return _unpacked(values).mul_(scales).transpose(1, 2) if self._experts else values.float().mul_(scales)


def unpacked(
    stored: Mapping[str, StoredTensor], packing: Packing, dtype: torch.dtype
) -> dict[str, StoredTensor | PackedTensor]:
    """Return the tensors of a checkpoint as they are shown: a dense weight in place of its values and scales.

    What is about activations in FP8 is left out.

    Args:
        stored: the tensors in the files, by name.
        packing: how weights are stored.
        dtype: the dtype of the dense weights.

    Raises:
        UserError: values and scales do not fit together, or one of the two is missing.
    """
    shown: dict[str, StoredTensor | PackedTensor] = {
        name: tensor for name, tensor in stored.items() if not _OF_ACTIVATIONS.search(name)
    }
    for name, scales in stored.items():
        for ending in packing.scales:
            weight = name.removesuffix(ending)
            values = stored.get(f"{weight}{packing.values}")
            if weight != name and values is not None and values.spec.dtype in _PACKED:
                del shown[name], shown[values.name]
                shown[weight] = PackedTensor(values, scales, packing, dtype)
    for name, tensor in shown.items():
        if isinstance(tensor, StoredTensor) and tensor.spec.dtype in _PACKED:
            raise UserError(
                f"{tensor.file.path}: {name} is {tensor.spec.dtype}, and of its values and scales only one is there; "
                "fetch or make the model again"
            )
    return shown


def dense_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that config.json says weights have; bfloat16 where it says none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if (dtype := _DTYPES.get(str(part.get(key)))) is not None:
                return dtype
    return torch.bfloat16


def _shared(size: int, scales: int, block: int) -> int:
    """Return how many values share a scale along a dimension of `size` values; 0 if so many scales do not fit it."""
    if scales == 1:
        return max(1, size)
    if scales == size:
        return 1
    return block if scales == math.ceil(size / block) else 0


def _powers(scales: Tensor) -> Tensor:
    """Return scales in float32."""
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()


def _unpacked(values: Tensor) -> Tensor:
    """Return FP4 values in float32, two for each byte: (experts, out, groups, 16) -> (experts, out, 32 * groups)."""
    pairs = _PAIRS.index_select(0, values.flatten().int())
    return pairs.view(torch.float32).view(*values.shape[:2], -1)
