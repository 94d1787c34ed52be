"""Several processes that do one work together, as `accelerate launch` and `torchrun` start them.

All processes read the same inputs and take the same steps, each on its own rows. Only the first one writes files and
prints messages. This module imports nothing heavy at the top.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# How long a process waits for the others. The first one writes, refits and computes checksums meanwhile, and the
# launcher ends all processes when one has failed.
_PATIENCE = timedelta(hours=3)


def count() -> int:
    """Return the number of processes, according to the launcher's environment variables."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Return the number of this process, counted from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def first() -> bool:
    """Return whether this is the first process, the one that writes."""
    return number() == 0


def join(*, cpu: bool) -> None:
    """Connect to the other processes; accelerate, and therefore the Trainer, reuses this connection."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu, timeout=_PATIENCE)


def share(items: Sequence[T], after: int = 0) -> Sequence[T]:
    """Return the items that this process takes: every n-th of them in n processes.

    Args:
        items: what is dealt out, in the same order in every process.
        after: how many other items were dealt out before.
    """
    return items[(number() - after) % count() :: count()]


def merge(own: Sequence[T]) -> list[T]:
    """Return what all processes made of their shares, in the order of what was dealt out; the inverse of `share`."""
    shares = gather(own)
    merged: list[T] = [shares[place % count()][place // count()] for place in range(sum(map(len, shares)))]
    return merged


def wait() -> None:
    """Wait until all processes have reached this line."""
    if count() > 1:
        from torch.distributed import barrier

        barrier()


def broadcast(compute: Callable[[], T]) -> T:
    """Call `compute` in the first process alone and return its result in every process."""
    if count() == 1:
        return compute()
    from torch.distributed import broadcast_object_list

    objects: list[Any] = [compute() if first() else None]  # Any: torch replaces the None by an object of type T
    broadcast_object_list(objects, src=0)
    result: T = objects[0]
    return result


def gather(value: T) -> list[T]:
    """Return the values of all processes, in the order of their numbers."""
    if count() == 1:
        return [value]
    from torch.distributed import all_gather_object

    values: list[Any] = [None] * count()  # Any: torch replaces each None by an object of type T
    all_gather_object(values, value)
    return values


def send_to_first(value: T) -> list[T]:
    """Return the values of all processes in the first one, in the order of their numbers, and nothing in the others."""
    if count() == 1:
        return [value]
    from torch.distributed import gather_object

    values: list[Any] | None = [None] * count() if first() else None  # Any: as in `gather`
    gather_object(value, values)
    return values or []


def sum_(tensor: "Tensor") -> "Tensor":
    """Add to a tensor those of the other processes, in place, and return it; it is on the device that computes."""
    if count() > 1:
        from torch.distributed import all_reduce

        all_reduce(tensor)
    return tensor


def leave() -> None:
    """Disconnect from the other processes at the end."""
    if count() > 1:
        from torch.distributed import destroy_process_group, is_initialized

        if is_initialized():
            destroy_process_group()
