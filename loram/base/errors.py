"""The exception for a user's mistake, and a short form of validation errors for its message."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


class UserError(ValueError):
    """An input cannot be used. The message is one line with the file, line or key, what is wrong, and the remedy.

    The command line prints only this line and exits with code 2. Every other exception is a failure of loram itself
    and exits with code 1.
    """


def in_one_line(error: Exception) -> str:
    """Return an exception of a library as one line: `KeyError: 'magic'`."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_problem(error: Exception) -> str:
    """Describe the first problem of a validation error as `key.key: what is wrong`; other errors as they are."""
    if not isinstance(error, ValidationError):
        return str(error)
    problem: Mapping[str, Any] = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else str(problem["msg"])
