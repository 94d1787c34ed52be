"""Where and in which dtype to compute, and how much memory that took."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from loram.base import processes
from loram.base.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")


def pick_device(device: str | None = None) -> torch.device:
    """The device to compute on: the one asked for, else the first GPU, else the CPU.

    Of several processes on a machine each gets a GPU of its own.

    Raises:
        UserError: the device asked for is not there, or is one GPU for several processes.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if processes.count() > 1 and chosen.type == "cuda":
            if chosen.index is not None:
                raise UserError(f"device {device!r}: each of several processes takes a GPU of its own; say cuda")
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type == "cpu":
        torch.set_flush_denormal(True)
    return chosen


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, else float32: without bf16 units a CPU is many times slower in bf16."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes that can still be taken, on a GPU or, where the system is Linux, by programs; None where nobody says."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMINFO.is_file():
        return None
    found = [line.split() for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether so many bytes of weights fit in the memory that is free now, with a tenth more for computing."""
    free = free_memory(device)
    return free is None or 1.1 * nbytes <= free


def return_freed_memory_() -> None:
    """Tell glibc to give every block of 64 KB and more pages of its own, and to hand them back when it is freed.

    By itself it raises that limit to 32 MB once such blocks were freed, and the holes between what stays pile up:
    weights, activations and gradients of many sizes then take up to twice what is in use. For the whole process;
    elsewhere than on Linux this does nothing.
    """
    _mallopt({_M_MMAP_THRESHOLD: 1 << 16})


def keep_freed_memory_() -> None:
    """Tell glibc to reuse freed blocks instead of handing them back, for the whole process.

    A training step on a CPU frees and takes the same large tensors again and again. Fresh pages for them each time cost
    about a third of the step (SmolLM2, 2 cores); holes in what is kept cost memory. Elsewhere this does nothing.
    """
    _mallopt({_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1})


def allocate_(device: torch.device, *, lean: bool) -> None:
    """Set the process up for a training: on a CPU for little memory if `lean`, else for speed."""
    if device.type == "cpu" and not lean:
        keep_freed_memory_()
    else:
        return_freed_memory_()


def _mallopt(settings: Mapping[int, int]) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for key, value in settings.items():
            libc.mallopt(key, value)


def rss() -> int:
    """Resident memory in bytes now (Linux)."""
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def reset_peak_rss() -> None:
    """Start measuring peak resident memory anew, where the system allows it (Linux)."""
    gc.collect()
    if sys.platform == "linux":
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            return  # then the peak is that of the whole process


def peak_rss() -> int:
    """Peak resident memory in bytes since `reset_peak_rss`, else since the process began."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
