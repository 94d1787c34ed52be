"""Several processes that train one model together, as `accelerate launch` and `torchrun` start them.

All of them read the same inputs and take the same steps, each on rows of its own; the first one alone writes, and
speaks to the user. Imports nothing heavy.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def count() -> int:
    """How many processes there are, by the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def first() -> bool:
    """Whether this is the one that writes."""
    return number() == 0


def join(*, cpu: bool) -> None:
    """Meet the others; accelerate, and so the Trainer, goes on with what is made here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


def wait() -> None:
    """Until all are here."""
    if count() > 1:
        from torch.distributed import barrier

        barrier()


def agreed(find: Callable[[], T]) -> T:
    """What the first process finds, in all of them; the others do not look."""
    if count() == 1:
        return find()
    from torch.distributed import broadcast_object_list

    found: list[Any] = [find() if first() else None]
    broadcast_object_list(found, src=0)
    result: T = found[0]
    return result


def leave() -> None:
    """Part from the others when all is done."""
    if count() > 1:
        from torch.distributed import destroy_process_group, is_initialized

        if is_initialized():
            destroy_process_group()
