"""The door for paths: what a user writes is made absolute once, so that it means the same in every process and folder.

`~` is the home folder, and a relative path begins in the working directory, in recipes too.
"""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from loram.base.errors import UserError

_HUB_ID = re.compile(r"[^\W_][\w.-]*/[^\W_][\w.-]*")


def local(path: str | Path) -> Path:
    """Return the absolute path of a file or folder, which need not exist.

    Symbolic links stay as they are, except in a path with `..`, which means another place behind a link.

    Raises:
        UserError: it begins with `~name`, and there is no such user.
    """
    try:
        absolute = Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no home folder of that name; write the path in full") from error
    return absolute.resolve() if ".." in absolute.parts else absolute


def cache_folder() -> Path:
    """Return the folder where loram keeps what it can make again: `LORAM_CACHE`, by default ~/.cache/loram."""
    return local(os.environ.get("LORAM_CACHE") or "~/.cache/loram")


def named(name: str | Path) -> str:
    """Return the absolute path of what is on this disk, and any other name as it is: a hub id, such as `owner/name`.

    A name that only a path can have (`./x`, `../x`, `/x`, `~/x`) is made absolute whether or not it exists.

    Raises:
        UserError: as `local`.
    """
    text = str(name)
    return str(local(text)) if text.startswith((".", "/", "~")) or (text and local(text).exists()) else text


def is_hub_id(name: str) -> bool:
    """Return whether a name can be that of a model on the hub: owner/name, which is no path."""
    return _HUB_ID.fullmatch(name) is not None


def is_on_hub(name: str) -> bool:
    """Return whether a name can be that of something on the hub, and is that of nothing on this disk."""
    return is_hub_id(name) and not local(name).exists()


LocalPath = Annotated[Path, AfterValidator(local)]
Named = Annotated[str, AfterValidator(named)]
