"""safetensors files that are read in blocks of rows and written in any order.

Only the rows that are being worked on are in memory. The safetensors library maps whole files, reads whole tensors, and
writes only what is completely in memory; that is too much for a model that does not fit in memory.
"""

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from loram.base.constants import BLOCK_BYTES
from loram.base.errors import UserError
from loram.base.hashes import remember_sha256
from loram.disk.files import refuse_pointer

_MAX_HEADER, _MAX_NUMBER = 100_000_000, (1 << 63) - 1  # the safetensors library's own limits
# In the order in which a file holds them, largest first: torch needs each tensor at a multiple of its element size.
_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """The dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def dtype_name(self) -> str:
        """The name of the dtype in safetensors: F32, BF16 ..."""
        return _NAMES[self.dtype]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    @property
    def row_bytes(self) -> int:
        """The size in bytes of one row, an entry of the first dimension; a scalar is one row."""
        return math.prod(self.shape[1:]) * int(self.dtype.itemsize)

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Return the spec of a tensor."""
        return cls(dtype=tensor.dtype, shape=tuple(tensor.shape))


class TensorFile:
    """An open safetensors file. Opening reads only its header; `read` reads a tensor or some rows into new memory.

    Raises:
        UserError: the file is missing, a Git LFS pointer, or not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            refuse_pointer(path)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        try:
            self.specs, self._offsets = self._read_header()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.close()
            raise UserError(f"{path}: not a whole safetensors file: {error}") from error

    def _read_header(self) -> tuple[dict[str, TensorSpec], dict[str, int]]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"its {size} bytes do not begin with a header")
        header = json.loads(os.pread(self._descriptor, length, 8))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        specs, offsets, end = {}, {}, 0
        for name, entry in sorted(
            ((name, entry) for name, entry in header.items() if name != "__metadata__"),
            key=lambda item: item[1]["data_offsets"],
        ):
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} has dtype {entry['dtype']!r}")
            shape, (start, stop) = entry["shape"], entry["data_offsets"]
            numbers = [start, stop, *shape] if isinstance(shape, list) else [shape]
            if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers):
                raise ValueError(f"{name} has shape {shape!r} and lies from byte {start!r} to {stop!r}")
            specs[name] = TensorSpec(dtype=_DTYPES[entry["dtype"]], shape=tuple(shape))
            if start != end or stop - start != specs[name].nbytes:
                raise ValueError(f"the bytes of {name} do not fit its shape")
            offsets[name], end = 8 + length + start, stop
        if size != 8 + length + end:
            raise ValueError(f"it has {size} bytes, but its header describes {8 + length + end}")
        return specs, offsets

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read a tensor, or its rows `start` to `stop` (exclusive), into CPU memory; nothing else is read.

        Raises:
            UserError: the file ends early, because it was cut after it was opened.
        """
        spec = self.specs[name]
        shape = spec.shape
        if shape:
            shape = (len(range(*slice(start, stop).indices(shape[0]))), *shape[1:])
        tensor = torch.empty(shape, dtype=spec.dtype)
        view, offset = _bytes(tensor), self._offsets[name] + start * spec.row_bytes
        while view:
            if not (count := os.preadv(self._descriptor, [view], offset)):
                raise UserError(f"{self.path}: ends inside {name}")
            view, offset = view[count:], offset + count
        return tensor

    def blocks(self, name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the first row, rows) from the first row to the last, in blocks of about `block_bytes` bytes.

        A scalar or vector comes in one block.
        """
        spec = self.specs[name]
        if len(spec.shape) < 2 or spec.nbytes <= block_bytes:
            yield 0, self.read(name)
            return
        rows = max(1, block_bytes // spec.row_bytes)
        for start in range(0, spec.shape[0], rows):
            yield start, self.read(name, start, start + rows)

    def close(self) -> None:
        """Close the file; this also happens when the object is freed. Tensors that were read stay valid."""
        self._closing()


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of an open file, read as it is stored."""

    file: TensorFile
    name: str

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""
        return self.file.specs[self.name]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read it, or its rows `start` to `stop` (exclusive); see `TensorFile.read`."""
        return self.file.read(self.name, start, stop)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the first row, rows); see `TensorFile.blocks`."""
        return self.file.blocks(self.name)


class TensorFileWriter:
    """Writes a safetensors file whose tensors come in any order, whole or in blocks of rows.

    Use it as a context manager; it checks at the end that every tensor was written.

    The file is hashed on the way, so that its manifest needs no second reading. That goes as long as tensors come in
    the order in which they lie in the file: by dtype, the widest first, and then as in `specs`. From the first one that
    comes early on, the file is read again at the end.

    Args:
        path: the file to write; it must not exist.
        specs: name of every tensor -> its dtype and shape.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path, self.specs = path, specs
        self._missing = {name: spec.nbytes for name, spec in specs.items()}
        self._offsets: dict[str, int] = {}
        order = list(_DTYPES.values())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(
            specs, key=lambda name: order.index(specs[name].dtype)
        ):  # a stable sort: names of the same dtype keep their order
            spec = specs[name]
            offsets = [end, end + spec.nbytes]
            header[name] = {"dtype": spec.dtype_name, "shape": list(spec.shape), "data_offsets": offsets}
            self._offsets[name], end = offsets
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {name: 8 + len(text) + offset for name, offset in self._offsets.items()}
        self._sha256, self._hashed = hashlib.sha256(), 0  # of the first so many bytes
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(memoryview(len(text).to_bytes(8, "little") + text), 0)

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write a whole tensor, or some of its rows from row number `row` on."""
        spec = self.specs[name]
        assert tensor.dtype == spec.dtype, (name, tensor.dtype, spec)
        assert tensor.shape[1:] == spec.shape[1:], (name, tensor.shape, spec)
        assert not spec.shape or row + len(tensor) <= spec.shape[0], (name, row, tensor.shape, spec)
        self._missing[name] -= tensor.nbytes
        assert self._missing[name] >= 0, (name, "written twice")
        self._write(_bytes(tensor.detach().cpu().contiguous()), self._offsets[name] + row * spec.row_bytes)

    def _write(self, view: memoryview, offset: int) -> None:
        if offset == self._hashed:
            self._sha256.update(view)
            self._hashed += len(view)
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: object, *rest: object) -> None:
        os.close(self._descriptor)
        if exception is None:
            assert not any(self._missing.values()), (self.path, self._missing)
            self._hash_the_rest()
            remember_sha256(self.path, self._sha256.hexdigest())

    def _hash_the_rest(self) -> None:
        if self._hashed < self.path.stat().st_size:
            with self.path.open("rb") as file:
                file.seek(self._hashed)
                hashlib.file_digest(file, lambda: self._sha256)


def _bytes(tensor: Tensor) -> memoryview:
    """View the memory of a contiguous CPU tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data
