"""Where and in which dtype loram computes, how the process allocates memory, and how much memory it took."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loram.base import processes
from loram.base.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")


def pick_device(device: str | None = None) -> torch.device:
    """Choose the device to compute on: the named one, else the first GPU, else the CPU.

    Where there are several processes, each one gets a GPU of its own.

    Raises:
        UserError: the named device cannot be used, or is one GPU for several processes.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if processes.count() > 1 and chosen.type == "cuda":
            index: Any = chosen.index  # Any: torch declares an int, but without a number in the name it is None
            if index is not None:
                raise UserError(f"device {device!r}: each of several processes takes a GPU of its own; say cuda")
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type == "cpu":
        torch.set_flush_denormal(True)
    return chosen


def join_processes(device: str | None) -> torch.device:
    """Pick the device, and meet the other processes where several work together.

    Raises:
        UserError: the device cannot be used.
    """
    chosen = pick_device(device)
    processes.join(cpu=chosen.type == "cpu")
    return chosen


def compute_dtype(device: torch.device) -> torch.dtype:
    """Choose bfloat16 on a GPU that supports it, else float32: most CPUs are many times slower in bfloat16."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def free_memory(device: torch.device | None = None) -> int | None:
    """Return how many bytes can still be allocated on a GPU, or in the memory of a Linux system; None if unknown."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMINFO.is_file():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def fits(nbytes: int, device: torch.device) -> bool:
    """Return whether weights of this many bytes, and a tenth more for computing, fit in the memory that is free now."""
    free = free_memory(device)
    return free is None or 1.1 * nbytes <= free


def return_freed_memory_() -> None:
    """Tell glibc to map each block of 64 KB or more by itself, and to return it to the system when it is freed.

    By default glibc raises this limit up to 32 MB as soon as such blocks are freed. Then holes build up between the
    blocks that stay, and weights, activations and gradients of many sizes take up to twice the memory that is in use.

    This changes the whole process. On systems other than Linux it does nothing.
    """
    _mallopt({_M_MMAP_THRESHOLD: 1 << 16})


def keep_freed_memory_() -> None:
    """Tell glibc to keep freed blocks for later instead of returning them to the system.

    A training step on a CPU allocates and frees the same large tensors again and again. New pages for them cost about a
    third of the step's time (SmolLM2, 2 cores). The price is memory, because holes build up between the blocks.

    This changes the whole process. On systems other than Linux it does nothing.
    """
    _mallopt({_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1})


def allocate_(device: torch.device, *, lean: bool) -> None:
    """Set the allocator up for a training: on a CPU for speed, or for little memory if `lean`."""
    if device.type == "cpu" and not lean:
        keep_freed_memory_()
    else:
        return_freed_memory_()


def _mallopt(settings: Mapping[int, int]) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for key, value in settings.items():
            libc.mallopt(key, value)


def rss() -> int:
    """Return the process's resident memory in bytes (Linux only)."""
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def reset_peak_rss() -> None:
    """Start a new measurement of the peak resident memory, if the system allows it (Linux only)."""
    gc.collect()
    if sys.platform == "linux":
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            return  # then the peak is measured since the process began


def peak_rss() -> int:
    """Return the peak resident memory in bytes since `reset_peak_rss`, or else since the process began."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
