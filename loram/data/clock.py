"""The time that chat templates read."""

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any


@contextlib.contextmanager
def clock_at(now: datetime) -> Iterator[None]:
    """Let chat templates that write the date, as Llama 3.2's does, write that of `now` while the block runs.

    Such a template calls `strftime_now`. transformers passes only plain data to templates, so the function itself
    cannot be handed over, and the clock that it reads is replaced.
    """
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        """The class `datetime`, where it is always `now`."""

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return now

    module: Any = chat_template_utils  # Any: a class of another type takes the place of a class
    real, module.datetime = module.datetime, Clock
    try:
        yield
    finally:
        module.datetime = real
