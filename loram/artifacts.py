"""Folders that are whole or absent: written beside their target, described by a manifest, moved in place at the end."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from loram.errors import UserError, first_problem
from loram.progress import track

MANIFEST_NAME = "loram_manifest.json"
_LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets")


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file of a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a folder of ours holds and what it was made from; written last, so it is the mark of completion.

    Args:
        kind: the stage that made the folder: base, pruned, adapter, recovered, merged, evaluation.
        made_from: name of an input -> its fingerprint.
        settings: the options that the stage was run with.
        versions: of the libraries that made it.
        files: path inside the folder -> size and SHA-256.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    kind: str
    made_from: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileEntry]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the files."""
        entries = {name: entry.sha256 for name, entry in self.files.items()}
        return digest(entries)


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Installed versions of loram and the libraries whose behaviour reaches our files."""
    found = {}
    for name in ("loram", *_LIBRARIES):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_output(out: Path) -> None:
    """Refuse an output that exists already, or that cannot be made; called before any work is done.

    Raises:
        UserError: `out` is a file, a folder with something in it, or below a file.
    """
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: the output exists already; remove it or choose another name")
    for parent in out.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"{out}: {parent} is a file, so no folder can be made below it")
            return


@contextlib.contextmanager
def publish(
    out: Path, *, kind: str, made_from: Mapping[str, str], settings: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Write a folder so that it appears whole or not at all.

    Yields a new folder beside `out` to write into. On success the files get a manifest, are synced, and the folder is
    renamed to `out`; on any exception, Ctrl-C included, it is removed and `out` never exists.

    Raises:
        UserError: `out` exists already, or another process is writing it.
    """
    out = out.absolute()
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock(out):
        staging = out.parent / f".{out.name}.partial"
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process; the lock says nobody is writing it now
        staging.mkdir()
        try:
            yield staging
            _finish(staging, kind=kind, made_from=dict(made_from), settings=dict(settings or {}))
            check_output(out)
            staging.rename(out)
            sync(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """One writer of `out` at a time; the kernel frees the lock when the process ends, however it ends."""
    path = out.parent / f".{out.name}.lock"
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another process is writing this folder") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _finish(folder: Path, *, kind: str, made_from: dict[str, str], settings: dict[str, Any]) -> None:
    files = {}
    for path in track(sorted(folder.rglob("*")), "Checksums"):
        if path.is_file():
            path.chmod(0o666 & ~_umask())  # safetensors writes 0600 whatever the umask
            files[str(path.relative_to(folder))] = FileEntry(size=path.stat().st_size, sha256=_sha256(path))
            sync(path)
    manifest = Manifest(kind=kind, made_from=made_from, settings=settings, versions=library_versions(), files=files)
    path = folder / MANIFEST_NAME
    path.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    sync(path)
    sync(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make sure that a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_manifest(folder: Path) -> Manifest | None:
    """A folder's manifest, or None where it has none; file sizes are checked against it.

    Raises:
        UserError: the manifest cannot be read, or a file is missing or of another size.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a valid manifest: {first_problem(error)}") from error
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: the manifest lists this file, but it is missing; make the folder again")
        if (size := file.stat().st_size) != entry.size:
            raise UserError(f"{file}: {size} bytes, but the manifest says {entry.size}; make the folder again")
    return manifest
