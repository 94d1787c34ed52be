"""How much is read from the disk when several processes of one machine read the same weights in step?

A file that is not in the page cache is read by one process, and then by several that wait for each other after every
piece, as processes do that stream the layers of one model. What each takes from the disk is what the kernel counts.

    python benchmarks/readers.py models/SmolLM2-135M-Instruct/model.safetensors

It prints a line per number of readers, and takes some seconds. Linux only; the file has to lie on a disk.
"""

import argparse
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

PIECE = 16 << 20  # bytes


def from_disk() -> int:
    """Return how many bytes this process has had read from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def read(path: Path, barrier: Any, results: Any) -> None:
    """Read a file piece by piece, and hand over (bytes from the disk, seconds)."""
    piece, file = bytearray(PIECE), os.open(path, os.O_RDONLY)
    before, started = from_disk(), time.monotonic()
    for start in range(0, os.path.getsize(path), PIECE):
        barrier.wait()
        os.preadv(file, [piece], start)
    results.put((from_disk() - before, time.monotonic() - started))


def measure(path: Path, readers: int) -> str:
    """Let several processes read a file that is not in the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    barrier = multiprocessing.Barrier(readers)
    results: Any = multiprocessing.Queue()
    processes = [multiprocessing.Process(target=read, args=(path, barrier, results)) for _ in range(readers)]
    for process in processes:
        process.start()
    taken = [results.get() for _ in processes]
    for process in processes:
        process.join()
    total, seconds = sum(nbytes for nbytes, _ in taken), max(seconds for _, seconds in taken)
    return f"{readers} readers of {os.path.getsize(path) / 1e6:.1f} MB: {total / 1e6:.1f} MB from disk, {seconds:.1f} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    for count in arguments.readers:
        print(measure(arguments.file, count))
