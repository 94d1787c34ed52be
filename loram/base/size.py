"""Sizes of memory as people write them."""

import re

from loram.base.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str, flag: str = "--memory") -> int:
    """Return the bytes of `12GiB`, `24 GB` or `800MiB`. A GiB has 1024 MiB, and a GB has 1000 MB.

    Raises:
        UserError: it is no size, or zero; the message begins with `flag`.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise UserError(f"{flag} {text!r}: should be a number with a unit, as 12GiB, 24GB or 800MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def show_size(count: int) -> str:
    """Return bytes for people, in the unit that graphics cards are measured in: `9.53 GiB`."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    return f"{count / (1 << 20):.1f} MiB" if count else "0"
