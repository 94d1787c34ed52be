"""The SHA-256 of files, which need not be read again where this process hashed them while it wrote them."""

import functools
import hashlib
from pathlib import Path

# Where a file is on its device, its size and its time of change -> SHA-256; entries go when a manifest is written.
_written: dict[tuple[int, ...], str] = {}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which is read for it."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_sha256_once(path: Path) -> str:
    """Return the SHA-256 of a file; a process reads it once for as long as the file does not change."""
    return _sha256_in_state(path, _state(path))


@functools.cache
def _sha256_in_state(path: Path, state: tuple[int, ...]) -> str:
    return file_sha256(path)


def remember_sha256(path: Path, sha256: str) -> None:
    """Remember the SHA-256 of a file that has just been written whole."""
    _written[_state(path)] = sha256


def take_remembered_sha256(path: Path) -> str | None:
    """Return what is remembered of a file and forget it; None where nothing is, or where the file has changed since."""
    return _written.pop(_state(path), None)


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
