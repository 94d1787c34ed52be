"""What several steps use: clocks, the card's memory, and models of random weights that are written fast."""

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

OPTIMIZER = {"optim": "adamw_8bit"}  # the paged one takes managed memory, which can hang a card that is short of it
GIB = 1 << 30


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str, repeat: int = 5, warm: int = 2) -> float:
    """Return the median of the seconds that a call takes."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeat):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class CardPeak:
    """The most bytes in use on the card, with everything that torch does not count, looked at every 20 ms."""

    def __init__(self, device: str) -> None:
        self.peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if device == "cuda" else None

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free)

    def __enter__(self) -> "CardPeak":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()


def write_rows(folder: Path, tokens: int, rows: int) -> Path:
    """Write a text of `rows` rows of `tokens` tokens each, for a tokenizer with one token per byte."""
    path = folder / f"rows-{tokens}-{rows}.txt"
    path.write_text("".join(chr(97 + number % 26) for number in range(tokens * rows)), encoding="utf-8")
    return path


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    path = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write_model(folder: Path, config: dict[str, Any], plan: Any = None, values: int = 1 << 24) -> Path:
    """Write a LLaMA whose weights are all pieces of one random tensor: drawing 14 GB would take minutes.

    Args:
        folder: the folder to make; one that is there is left as it is.
        config: the config.json of the full model.
        plan: the plan of the pruned model to write (default: write the full one).
        values: how many values the random tensor has.
    """
    import random_models as models

    from loram.disk.tensorfile import TensorSpec
    from loram.disk.writer import ShardedWriter

    if folder.exists():
        return folder
    shapes = models.shapes_of(config, plan)
    specs = {name: TensorSpec(dtype=torch.bfloat16, shape=shape) for name, shape in shapes.items()}
    pool = (0.02 * torch.randn(values + 12345, generator=torch.Generator().manual_seed(0))).bfloat16()
    with unpublished(folder) as staging:
        models.write_all_but_weights(staging, config, plan)
        with ShardedWriter(staging, specs) as writer:
            for number, (name, shape) in enumerate(shapes.items()):
                if len(shape) == 1:
                    writer.write(name, torch.ones(shape, dtype=torch.bfloat16))
                    continue
                step = max(1, min(shape[0], values // shape[1]))
                for start in range(0, shape[0], step):
                    rows, offset = min(step, shape[0] - start), (number * 7919 + start * 13) % 12345
                    piece = pool[offset : offset + rows * shape[1]].view(rows, shape[1])
                    writer.write(name, piece, start)
    return folder


@contextmanager
def unpublished(out: Path, **_: Any) -> Iterator[Path]:
    """Do as `loram.disk.artifacts.publish` without the checksums, which here take as long as the writing."""
    staging = out.with_name(f"{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    staging.rename(out)
