"""Room for activations: memory up to a budget, then memory-mapped files without a name, gone when the process is."""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class Scratch:
    """A budget of memory, and the folder for what goes beyond it.

    Args:
        memory_bytes: how much may be held in memory at a time.
        folder: where files go (default: the system's temporary folder).
    """

    def __init__(self, memory_bytes: int, folder: Path | None = None) -> None:
        self.free_bytes, self.folder = memory_bytes, folder

    def room(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> "Activations":
        """Room for one tensor of each shape."""
        return Activations(self, shapes, dtype)


class Activations:
    """A list of tensors of fixed shapes and one dtype, set and read one at a time."""

    def __init__(self, scratch: Scratch, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.shapes, self.dtype, self._scratch = shapes, dtype, scratch
        self._sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        self._held: list[Tensor | None] | None = None
        if sum(self._sizes) <= scratch.free_bytes:
            scratch.free_bytes -= sum(self._sizes)
            self._held = [None] * len(shapes)
            return
        self._starts, end = [], 0
        for size in self._sizes:
            self._starts.append(end)
            end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages, so that they can be let go one by one
        with tempfile.TemporaryFile(dir=scratch.folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(end, 1))  # a full disk is an error here, not a crash later
            self._map = mmap.mmap(file.fileno(), max(end, 1))

    def __len__(self) -> int:
        return len(self.shapes)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == self.shapes[index]
        if self._held is not None:
            self._held[index] = tensor.detach().to("cpu", self.dtype)
        elif self._sizes[index]:
            self._view(index).copy_(tensor.detach())
            self._let_go(index)

    def __getitem__(self, index: int) -> Tensor:
        if self._held is not None:
            tensor = self._held[index]
            assert tensor is not None
            return tensor
        if not self._sizes[index]:
            return torch.empty(self.shapes[index], dtype=self.dtype)
        tensor = self._view(index).clone()
        self._let_go(index)
        return tensor

    def _view(self, index: int) -> Tensor:
        count = math.prod(self.shapes[index])
        flat = torch.frombuffer(self._map, dtype=self.dtype, count=count, offset=self._starts[index])
        return flat.view(self.shapes[index])

    def _let_go(self, index: int) -> None:
        """Drop the pages from this process's memory; the file keeps them."""
        self._map.madvise(mmap.MADV_DONTNEED, self._starts[index], self._sizes[index])

    def close(self) -> None:
        """Give the room back."""
        if self._held is not None:
            self._scratch.free_bytes += sum(self._sizes)
            self._held = []
        else:
            del self._map
