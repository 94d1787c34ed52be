"""Experts in checkpoint files: often one tensor per expert there, and one 3-D tensor for all of them in the model."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loram.base.constants import BLOCK_BYTES
from loram.base.errors import UserError
from loram.disk.packed import PackedTensor
from loram.disk.tensorfile import StoredTensor, TensorSpec
from loram.model.architecture import Architecture

Stack = tuple[tuple[str, ...], ...]  # expert -> the names of its parts in the files, which are joined along their rows


class StackedTensor:
    """A 3-D tensor whose experts are single tensors in files: (experts, rows, columns).

    Args:
        experts: expert -> its parts, which are joined along their rows.
        name: what error messages call the tensor.

    Raises:
        UserError: experts differ in shape or dtype.
    """

    def __init__(self, experts: Sequence[Sequence[StoredTensor | PackedTensor]], name: str) -> None:
        self._experts, self.name = experts, experts[0][0].name
        if len(set(specs := [tuple(part.spec for part in parts) for parts in experts])) > 1:
            raise UserError(f"{name}: its experts differ in shape or dtype")
        if not specs[0][0].dtype.is_floating_point:
            raise UserError(f"{name}: its experts are in 4 bits; start from the weights in 16 or 32 bits")
        rows, first = sum(spec.shape[0] for spec in specs[0]), specs[0][0]
        self.spec = TensorSpec(dtype=first.dtype, shape=(len(experts), rows, *first.shape[1:]))

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the tensor, or its experts `start` to `stop` (exclusive); only these are read."""
        return torch.stack([torch.cat([part.read() for part in parts]) for parts in self._experts[start:stop]])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the first expert, experts) from the first expert to the last, in blocks of about 64 MB."""
        step = max(1, BLOCK_BYTES // self.spec.row_bytes)
        return ((row, self.read(row, row + step)) for row in range(0, self.spec.shape[0], step))

    def places(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name in the files, expert, first row) of each part."""
        for expert, parts in enumerate(self._experts):
            row = 0
            for part in parts:
                yield part.name, expert, row
                row += part.spec.shape[0]


def names_in_model(
    names: Iterable[str], architecture: Architecture | None, folder: Path
) -> tuple[dict[str, str], dict[str, Stack]]:
    """Return what the tensors of files are in the model.

    Args:
        names: the names in the files.
        architecture: the model's family, or None where it is not known.
        folder: the model's folder, for error messages.

    Returns:
        The names in the files of tensors that are in the model as they are, and those of the parts of 3-D tensors; both
        by the name in the model.

    Raises:
        UserError: a part of an expert is missing, or the expert is there twice.
    """
    if architecture is None or (experts := architecture.experts) is None:
        return {name: name for name in names}, {}
    patterns = [
        (path, number, re.compile(re.escape(part).replace(re.escape("{}"), r"(\d+)")))
        for path, parts in experts.in_files.items()
        for number, part in enumerate(parts)
    ]
    single: dict[str, str] = {}
    parts: dict[str, dict[tuple[int, int], str]] = {}  # 3-D tensor -> (expert, number of the part) -> name in the files
    for stored in names:
        if (place := architecture.split(stored)) is None:
            single[stored] = stored
            continue
        prefix, rest = architecture.layer_path(place[0]), place[1]
        for old, new in experts.renamed.items():
            rest = new + rest.removeprefix(old) if rest.startswith(old) else rest
        for path, number, pattern in patterns:
            if match := pattern.fullmatch(rest):
                parts.setdefault(f"{prefix}.{path}", {})[int(match[1]), number] = stored
                break
        else:
            single[f"{prefix}.{rest}"] = stored
    for name in parts:
        if name in single:
            raise UserError(f"{folder}: has {name} as a whole and one tensor per expert too; remove one of the two")
    return single, {name: _stack(name, stored, folder) for name, stored in parts.items()}


def _stack(name: str, stored: Mapping[tuple[int, int], str], folder: Path) -> Stack:
    """Return the parts of a 3-D tensor in order."""
    experts, parts = (1 + max(numbers) for numbers in zip(*stored, strict=True))
    for expert in range(experts):
        for part in range(parts):
            if (expert, part) not in stored:
                raise UserError(f"{folder}: {name} lacks a part of expert {expert}, though there are {experts} experts")
    return tuple(tuple(stored[expert, part] for part in range(parts)) for expert in range(experts))
