"""What tests of several rooms use: counting live tensors, and stopping a training in the middle."""

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
    """Bytes of all tensors that are alive, each storage once, after every operation; and the most there were."""

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
    """What a test throws into a training."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Have the training that comes stopped in its so-manyth batch."""
    count, step = itertools.count(1), Trainer.training_step

    def training_step(self: Trainer, *args: Any, **options: Any) -> Any:
        if next(count) == number:
            raise error
        return step(self, *args, **options)

    patch.setattr(Trainer, "training_step", training_step)
