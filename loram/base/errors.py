"""The one exception for a user's mistake."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


class UserError(ValueError):
    """Something the user gave cannot be used: one line that names the file, line or key, what was found and the remedy.

    The command line prints the line alone and exits with code 2; every other exception is a failure of ours (code 1).
    """


def first_problem(error: Exception) -> str:
    """The first problem of a validation error as `key.key: what is wrong`."""
    if not isinstance(error, ValidationError):
        return str(error)
    problem: Mapping[str, Any] = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else str(problem["msg"])
