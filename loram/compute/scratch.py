"""Storage for activations: in memory up to a budget, beyond it in memory-mapped files that have no name.

Such a file disappears when the process ends, in whatever way it ends.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_LARGE = Path("/var/tmp")  # file-hierarchy(7): for larger and longer-lived files than /tmp


class Scratch:
    """A memory budget that several lists of activations share, and the folder for the lists beyond it.

    Args:
        memory_bytes: how many bytes may be held in memory at a time.
        folder: the folder for the files (default: `$TMPDIR`, or /var/tmp, which is on a disk where /tmp may be RAM).
    """

    def __init__(self, memory_bytes: int, folder: Path | None = None) -> None:
        self.free_bytes, self.folder = memory_bytes, folder or _on_disk()

    def room(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> "Activations":
        """Reserve room for one tensor of each shape."""
        return Activations(self, shapes, dtype)


def _on_disk() -> Path | None:
    """Return the system's folder for large temporary files; None where only `tempfile` knows one."""
    wanted = "TMPDIR" not in os.environ and os.access(_LARGE, os.W_OK | os.X_OK)
    return _LARGE if wanted else None


class Activations:
    """A list of tensors with fixed shapes and one dtype. They are set and read one at a time, on the CPU."""

    def __init__(self, scratch: Scratch, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.shapes, self.dtype, self._scratch = shapes, dtype, scratch
        self._sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]  # bytes
        self._tensors: list[Tensor | None] | None = None  # None if they are in a file
        if sum(self._sizes) <= scratch.free_bytes:
            scratch.free_bytes -= sum(self._sizes)
            self._tensors = [None] * len(shapes)
            return
        self._starts, end = [], 0
        for size in self._sizes:
            self._starts.append(end)
            end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages, so that each tensor's can be released alone
        with tempfile.TemporaryFile(dir=scratch.folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(end, 1))  # a full disk is an error here and not a crash later
            self._map = mmap.mmap(file.fileno(), max(end, 1))

    def __len__(self) -> int:
        return len(self.shapes)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == self.shapes[index]
        if self._tensors is not None:
            self._tensors[index] = tensor.detach().to("cpu", self.dtype)
        elif self._sizes[index]:
            self._view(index).copy_(tensor.detach())
            self._release_pages(index)

    def __getitem__(self, index: int) -> Tensor:
        if self._tensors is not None:
            tensor = self._tensors[index]
            assert tensor is not None
            return tensor
        if not self._sizes[index]:
            return torch.empty(self.shapes[index], dtype=self.dtype)
        tensor = self._view(index).clone()
        self._release_pages(index)
        return tensor

    def _view(self, index: int) -> Tensor:
        count = math.prod(self.shapes[index])
        flat = torch.frombuffer(self._map, dtype=self.dtype, count=count, offset=self._starts[index])
        return flat.view(self.shapes[index])

    def _release_pages(self, index: int) -> None:
        """Release a tensor's pages from this process's memory; the file keeps their content."""
        self._map.madvise(mmap.MADV_DONTNEED, self._starts[index], self._sizes[index])

    def close(self) -> None:
        """Release the room."""
        if self._tensors is not None:
            self._scratch.free_bytes += sum(self._sizes)
            self._tensors = []
        else:
            del self._map
