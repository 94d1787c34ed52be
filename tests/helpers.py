"""Helpers for the tests of several rooms: they count live tensors, compare folders and stop trainings."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer


class Live(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of all live tensors after each operation, each storage once, and remembers the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


class Stopped(BaseException):
    """The exception that a test raises in a training."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Make the next training raise `error` in the batch with this number, counted from 1."""
    count, step = itertools.count(1), Trainer.training_step

    def training_step(self: Trainer, *args: Any, **options: Any) -> Any:
        if next(count) == number:
            raise error
        return step(self, *args, **options)

    patch.setattr(Trainer, "training_step", training_step)
