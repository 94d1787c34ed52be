"""Progress bars with the time left, on stderr."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loram.base import processes

T = TypeVar("T")

console = Console(stderr=True, quiet=not processes.first())
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate with a progress bar; where stderr is no terminal, a line at most every 30 seconds instead."""
    if console.is_terminal:
        with Progress(*_COLUMNS, console=console, transient=True) as progress:
            yield from progress.track(items, description=description)
        return
    started = shown = time.monotonic()
    for done, item in enumerate(items):
        if (now := time.monotonic()) - shown > 30:
            left = (now - started) / done * (len(items) - done)
            console.print(f"{description}: {done} of {len(items)}, about {left:.0f} s left", highlight=False)
            shown = now
        yield item


@contextlib.contextmanager
def without_library_bars() -> Iterator[None]:
    """transformers' own progress bars off for a while."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def training_progress() -> Any:
    """A callback for transformers' Trainer: a progress bar with loss and time left, or a line a log entry."""
    from transformers import TrainerCallback

    class TrainingProgress(TrainerCallback):  # type: ignore[misc]
        """Steps done, the last loss, time left; all on stderr."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.started, self.loss = time.monotonic(), ""
            self.bar = Progress(
                *_COLUMNS, TextColumn("{task.fields[loss]}"), console=console, disable=not console.is_terminal
            )
            self.task = self.bar.add_task("Training", total=state.max_steps, loss="")
            self.bar.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.bar.update(self.task, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if "loss" not in (logs or {}):
                return
            self.bar.update(self.task, loss=f"loss {logs['loss']:.4f}")
            if not console.is_terminal:
                left = (time.monotonic() - self.started) / state.global_step * (state.max_steps - state.global_step)
                line = (
                    f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}, about {left:.0f} s left"
                )
                console.print(line, highlight=False)

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.bar.stop()

    return TrainingProgress()
