"""The time that chat templates read."""

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any


@contextlib.contextmanager
def clock_at(now: datetime) -> Iterator[dict[str, str]]:
    """Let chat templates that write the date, as Llama 3.2's does, write that of `now` while the block runs.

    Such a template calls `strftime_now`. transformers passes only plain data to templates, so the function itself
    cannot be handed over, and the clock that it reads is replaced.

    Yields:
        What templates have written of the time: format -> text, such as `%d %b %Y` -> `26 Jul 2024`.
    """
    from transformers.utils import chat_template_utils

    written: dict[str, str] = {}

    class Clock(datetime):
        """The class `datetime`, where it is always `now`."""

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.combine(now.date(), now.time())

        def strftime(self, format: str) -> str:
            return written.setdefault(format, super().strftime(format))

    module: Any = chat_template_utils  # Any: a class of another type takes the place of a class
    real, module.datetime = module.datetime, Clock
    try:
        yield written
    finally:
        module.datetime = real
