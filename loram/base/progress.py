"""Progress bars on stderr that show the time left."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loram.base import processes

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar. If stderr is not a terminal, print a line every 30 seconds at most instead.

    Args:
        items: what to iterate over.
        description: what the bar is called.
        total: how many items there are, where they have no length.
    """
    total = len(items) if isinstance(items, Sized) else total
    assert total is not None
    if console.is_terminal:
        # else what is printed meanwhile would go to the terminal, too, where standard output is a file
        redirect = sys.stdout.isatty()
        with Progress(*_COLUMNS, console=console, transient=True, redirect_stdout=redirect) as progress:
            yield from progress.track(items, total=total, description=description)
        return
    started = shown = time.monotonic()
    for done, item in enumerate(items):
        if (now := time.monotonic()) - shown > 30:
            left = (now - started) / done * (total - done)
            console.print(f"{description}: {done} of {total}, about {left:.0f} s left", highlight=False)
            shown = now
        yield item


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress of ours while the block runs."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


@contextlib.contextmanager
def without_library_bars() -> Iterator[None]:
    """Switch off the progress bars of transformers while the block runs."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def training_progress() -> "TrainerCallback":
    """Make a callback for transformers' Trainer that shows the steps, the loss and the time left.

    On a terminal it is a progress bar; elsewhere it prints one line per log entry.
    """
    from transformers import TrainerCallback

    class TrainingProgress(TrainerCallback):
        """Show the number of steps taken, the last loss and the time left on stderr."""

        def on_train_begin(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **rest: Any
        ) -> None:
            self.started = time.monotonic()
            self.bar = Progress(
                *_COLUMNS, TextColumn("{task.fields[loss]}"), console=console, disable=not console.is_terminal
            )
            self.task = self.bar.add_task("Training", total=state.max_steps, loss="")
            self.bar.start()

        def on_step_end(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **rest: Any
        ) -> None:
            self.bar.update(self.task, completed=state.global_step)

        def on_log(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            logs: dict[str, float] | None = None,
            **rest: Any,
        ) -> None:
            if logs is None or "loss" not in logs:
                return
            loss = f"loss {logs['loss']:.4f}"
            self.bar.update(self.task, loss=loss)
            if not console.is_terminal:
                left = (time.monotonic() - self.started) / state.global_step * (state.max_steps - state.global_step)
                line = f"step {state.global_step} of {state.max_steps}: {loss}, about {left:.0f} s left"
                console.print(line, highlight=False)

        def on_train_end(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **rest: Any
        ) -> None:
            self.bar.stop()

    return TrainingProgress()
