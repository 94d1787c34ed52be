"""Ctrl-C and SIGTERM in a training: the step is finished, a checkpoint is written, and then the training stops."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from loram.base import processes

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The request to stop a training.

    The same signal a second time, or one that comes before the first step, stops at once. A launcher of several
    processes sends the signal to each of them, and again where the terminal has sent it already, so there only the
    first one counts; the launcher itself ends processes that take too long.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.stepping = False  # whether a step has begun, so that there is something to keep

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Catch the signals while the block runs; signals that are ignored stay so.

        Raises:
            KeyboardInterrupt, SystemExit: a signal came after the last checkpoint.
        """
        if threading.current_thread() is not threading.main_thread():  # Python lets only that one set handlers
            yield
            return
        process, before = os.getpid(), {number: signal.getsignal(number) for number in _SIGNALS}

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() == process:  # else it is a worker that reads rows
                self._handle(number)

        caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in caught:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number in caught:
                signal.signal(number, before[number])
        if self.signal is not None:
            stop_by(self.signal)

    def _handle(self, number: int) -> None:
        again = self.signal == number and processes.count() == 1
        if again or not self.stepping:
            stop_by(number)
        if self.signal is None:
            self.signal = number
            logger.warning("stopping after this step, with a checkpoint; the same signal again stops at once")


def stop_by(number: int) -> NoReturn:
    """Stop as a signal does: by KeyboardInterrupt, or by SystemExit with the exit code that shells give it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
