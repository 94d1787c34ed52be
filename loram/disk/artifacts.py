"""Folders that are whole or absent: written beside their target, given a manifest, and renamed at the end."""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from loram.base import processes
from loram.base.errors import UserError, first_problem
from loram.base.hashes import file_sha256, file_sha256_once, take_remembered_sha256
from loram.base.paths import local
from loram.base.progress import track
from loram.disk.files import CHAT_TEMPLATE

logger = logging.getLogger(__name__)

MANIFEST_NAME = "loram_manifest.json"
# Bytes. Readers compare the SHA-256 of files up to this size, which takes about a second; `verify` compares all files.
HASHED_BYTES = 1 << 30
# What a user may change in a folder that we wrote; no other file, since weights, config and plan have to fit together.
EDITABLE = (CHAT_TEMPLATE,)
CARD_NAME = "README.md"  # for people, who edit it; a run adds figures to it, so no manifest lists it
_LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets")


class FileEntry(BaseModel):
    """The size in bytes and the SHA-256 of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """The description of a folder that loram wrote. It is written last, so its presence means that the folder is whole.

    Args:
        kind: base, pruned, teacher, adapter, model, checkpoint (of a training), recovered, merged, quantized or
            exported.
        made_from: name of an input -> its fingerprint.
        settings: the options that the stage ran with.
        versions: name of a library -> the version that was installed.
        files: path inside the folder -> size and SHA-256; the model card is not among them.
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
        """The SHA-256 of the names and contents of all files."""
        entries = {name: entry.sha256 for name, entry in self.files.items()}
        return digest(entries)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON form (keys sorted)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the installed versions of loram and of the libraries that influence what it writes."""
    versions = {}
    for name in ("loram", *_LIBRARIES):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def check_output(out: str | Path, *inputs: str | Path) -> Path:
    """Refuse an output folder that exists already or cannot be made. Stages call this before they do any work.

    Args:
        out: the folder to make.
        inputs: the folders that it is made from; names of anything else, such as hub ids, are ignored.

    Returns:
        The absolute path of `out`.

    Raises:
        UserError: `out` is a file or a folder with content, or lies below a file or inside an input.
    """
    out = local(out)
    for source in map(local, inputs):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{out}: lies inside {source}, and inputs are never written to; choose another place")
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: the output exists already; remove it or choose another name")
    existing = next(parent for parent in out.parents if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{out}: {existing} is a file, so no folder can be made below it")
    return out


@contextlib.contextmanager
def publish(
    out: Path, *, kind: str, made_from: Mapping[str, str], settings: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Write a folder so that it appears whole or not at all.

    The block writes into a new folder beside `out`, which this context manager yields. When the block succeeds, the
    folder gets a manifest, its files are synced to the disk, and it is renamed to `out`. When the block raises any
    exception, Ctrl-C included, the folder is removed, and `out` never exists.

    Where several processes work together, the first one makes the folder. The others get its path when it is there, may
    have files without a name in it, and leave the block when `out` is in place.

    Raises:
        UserError: `out` exists already, or another process is writing it.
    """
    out = local(out)
    staging = out.parent / f".{out.name}.partial"
    if not processes.first():
        processes.wait()
        yield staging
        processes.wait()
        return
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock(out):
        shutil.rmtree(staging, ignore_errors=True)  # from a killed process: the lock says that nobody writes it
        staging.mkdir()
        processes.wait()
        try:
            yield staging
            put_in_place(staging, out, kind=kind, made_from=made_from, settings=settings or {})
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    processes.wait()


def put_in_place(
    staging: Path, out: Path, *, kind: str, made_from: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
    """Give a finished folder its manifest, sync its files to the disk, and rename it to `out`.

    Raises:
        UserError: `out` exists already.
    """
    _seal(staging, kind=kind, made_from=dict(made_from), settings=dict(settings))
    check_output(out)
    staging.rename(out)
    sync(out.parent)


def discard(folder: Path) -> None:
    """Remove a folder so that no reader can take a half of it for the whole: it is renamed first, then deleted."""
    doomed = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Let only one process write `out` at a time. The kernel frees the lock when the process ends in any way.

    Raises:
        UserError: another process holds the lock.
    """
    path = out.parent / f".{out.name}.lock"
    while True:
        with path.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{out}: another process is writing this folder") from error
            if not path.exists() or not os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                continue  # the last holder removed the file after we had opened it and before we locked it
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _seal(folder: Path, *, kind: str, made_from: dict[str, str], settings: dict[str, Any]) -> None:
    files = {}
    for path in track(sorted(folder.rglob("*")), "Checksums"):
        if path.is_file():
            path.chmod(0o666 & ~_umask())  # safetensors writes files with mode 0600, whatever the umask
            if path != folder / CARD_NAME:
                sha256 = take_remembered_sha256(path) or file_sha256(path)
                files[str(path.relative_to(folder))] = FileEntry(size=path.stat().st_size, sha256=sha256)
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


def sync(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that readers see the whole of the old text or of the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


def find_manifest(folder: Path, *, hashed_bytes: int | None = HASHED_BYTES, edits: bool = True) -> Manifest | None:
    """Read a folder's manifest and check the files against it; return None if the folder has no manifest.

    Args:
        folder: the folder.
        hashed_bytes: for files up to this size the SHA-256 is compared, for larger files only the size; None compares
            the SHA-256 of all files.
        edits: accept other contents of the files in `EDITABLE`, with one warning per process.

    Raises:
        UserError: the manifest cannot be read, or a file is missing or has changed since it was written.
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
        if edits and name in EDITABLE:
            _warn_of_edit(file, entry.sha256)
        elif (size := file.stat().st_size) != entry.size:
            raise UserError(f"{file}: {size} bytes, but the manifest says {entry.size}; {_remedy(name)}")
    checked = [
        name
        for name, entry in manifest.files.items()
        if (hashed_bytes is None or entry.size <= hashed_bytes) and not (edits and name in EDITABLE)
    ]
    for name in track(checked, "Verifying"):
        actual = file_sha256_once(folder / name)
        if actual != manifest.files[name].sha256:
            raise UserError(
                f"{folder / name}: not the content that the manifest says was written (SHA-256 {actual[:12]} instead "
                f"of {manifest.files[name].sha256[:12]}); {_remedy(name)}, or, if you changed it on purpose, "
                f"remove {MANIFEST_NAME}"
            )
    return manifest


def _remedy(name: str) -> str:
    """Return what to do about a file that is not as it was written."""
    given = "; another chat template is given by --chat-template, or in a recipe by chat_template_path"
    return f"make the folder again{given if name in (CHAT_TEMPLATE, 'tokenizer_config.json') else ''}"


def edited_template(folder: Path) -> Path | None:
    """Return the chat template that a user put into a folder of ours, or changed there; None where it is ours."""
    manifest, path = find_manifest(folder), folder / CHAT_TEMPLATE
    if manifest is None or not path.is_file():
        return None
    entry = manifest.files.get(CHAT_TEMPLATE)
    return None if entry is not None and entry.sha256 == file_sha256(path) else path


@functools.cache
def _warn_of_edit(file: Path, expected: str) -> None:
    """Say once that a file of `EDITABLE` is not as it was written."""
    if file_sha256(file) != expected:
        logger.warning("%s: changed since the folder was written; it is used as it is now", file)


def verify(folder: str | Path) -> dict[str, Manifest]:
    """Compare every byte of a folder, and of the folders inside it, with their manifests.

    Returns:
        The path of each folder that has a manifest -> the manifest.

    Raises:
        UserError: there is no manifest, or a file is missing or has changed.
    """
    folder = local(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    manifests = {}
    for path in sorted(folder.rglob(MANIFEST_NAME)):
        if (manifest := find_manifest(path.parent, hashed_bytes=None, edits=False)) is not None:
            manifests[str(path.parent)] = manifest
    if not manifests:
        raise UserError(f"{folder}: no {MANIFEST_NAME} here or below, so there is nothing to compare with")
    return manifests


def difference(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "", *, ignored: Collection[str] = ()
) -> str | None:
    """Describe the first value that changed as `key.key: before -> after`; return None if no value changed.

    Args:
        before, after: the values.
        prefix: what stands before the keys.
        ignored: keys that do not count, on whatever level.
    """
    for key in {**before, **after}:
        if key in ignored:
            continue
        place, old, new = f"{prefix}{key}", before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = difference(old, new, f"{place}.", ignored=ignored)
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            inner = difference(_numbered(old), _numbered(new), f"{place}.", ignored=ignored)
        elif old != new and _is_digest(old) and _is_digest(new):
            name = after.get("path") or after.get("name")
            inner = f"{place}: {f'the content of {name}' if name else 'its content'} is not what it was"
        else:
            inner = f"{place}: {old!r} -> {new!r}" if old != new else None
        if inner is not None:
            return inner
    return None


def _numbered(values: list[Any]) -> dict[str, Any]:
    return {str(number): value for number, value in enumerate(values)}


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
