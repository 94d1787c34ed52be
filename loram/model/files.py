"""Files as users have them: JSON objects that may not be any, and Git LFS pointers in place of what they point to."""

import json
from pathlib import Path
from typing import Any

from loram.errors import UserError

_LFS = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer, which is what a clone without git-lfs has in a large file's place.

    Raises:
        UserError: the file is a pointer.
    """
    with path.open("rb") as handle:
        if handle.read(len(_LFS)) == _LFS:
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it is a Git LFS pointer, or not a JSON object.
    """
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
