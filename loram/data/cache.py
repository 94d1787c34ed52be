"""Tokens on disk, so that a data set that takes a while is tokenised once and never has to be in memory.

An entry is a folder: `tokens.arrow`, which is mapped into memory, and `tokens.json`, which says what it holds. Its name
is a digest of everything that decides the tokens, so what has changed is tokenised anew.
"""

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset

from loram.base.errors import UserError
from loram.base.hashes import file_sha256_once
from loram.base.paths import cache_folder
from loram.data.files import kind_of
from loram.data.spec import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ROWS_NAME, FACTS_NAME = "tokens.arrow", "tokens.json"
SMALLEST = 4 << 20  # bytes; smaller data sets are tokenised again, which takes seconds
_BATCH_ROWS = 1000
_ELSEWHERE = "the environment variable LORAM_CACHE chooses another place"
_STALE_SECONDS = 24 * 3600  # a staging folder that is older belongs to a process that was killed
_TYPES = {"source": pa.int64(), "desirable": pa.bool_()}  # of columns that hold no lists of tokens
# What a tokenizer was made with, and where its files lay: what is in these files counts, not where they are.
_PLACES = ("name_or_path", "tokenizer_object", "tokenizer_file", "vocab_file", "merges_file")

Columns = dict[str, Any]  # column -> its value in one row: a list of tokens or labels, or a number


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Tokenised rows as they are stored.

    Args:
        rows: the columns of `loram.data.tokens.Tokens`, and `source`: the index in the data set of its row.
        facts: all else that is known of them, as JSON values.
    """

    rows: Dataset
    facts: Mapping[str, Any]


def write_rows(rows: Iterator[Columns], names: Sequence[str], path: Path | None) -> Dataset:
    """Write tokenised rows into a file, some at a time, and map it into memory; without a path they stay in memory.

    Args:
        rows: the rows.
        names: their columns.
        path: the file to make.
    """
    schema = pa.schema({name: _TYPES.get(name, pa.list_(pa.int32())) for name in names})
    memory = pa.BufferOutputStream()
    with pa.ipc.new_stream(memory if path is None else str(path), schema) as writer:
        while batch := list(islice(rows, _BATCH_ROWS)):
            writer.write_batch(pa.record_batch([[row[name] for row in batch] for name in names], schema))
    return Dataset.from_buffer(memory.getvalue()) if path is None else Dataset.from_file(str(path))


def key_of(
    spec: DataSpec,
    contents: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    vocabulary: int,
    kinds: Sequence[str],
) -> str:
    """Return a digest of everything that decides a data set's tokens, except the time that a template writes.

    Args:
        spec: how the data set is read; what it is called does not count.
        contents: as `contents_of` returns them.
        tokenizer: the tokenizer, with its chat template.
        max_length, vocabulary, kinds: as for `loram.data.tokens.load_tokens`.
    """
    parts = [
        _code(),
        {name: version(name) for name in ("transformers", "tokenizers", "datasets")},
        list(contents),
        [spec.reading(), list(kinds)],
        [max_length, vocabulary, type(tokenizer).__qualname__, tokenizer.chat_template],
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else "",
        {key: repr(value) for key, value in tokenizer.init_kwargs.items() if key not in _PLACES},
        {key: repr(value) for key, value in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def contents_of(files: Sequence[Path]) -> list[str]:
    """Return what is in the files of a data set: for each its kind, which says how it is read, and its SHA-256."""
    return [f"{kind_of(path)} {file_sha256_once(path)}" for path in files]


@functools.cache
def _code() -> str:
    """Return a digest of the code that reads and tokenises rows."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def tokens_folder() -> Path:
    """Return the folder of the cache."""
    return cache_folder() / "tokens"


def find(key: str, now: datetime) -> Stored | None:
    """Return what is stored under a key, if it is whole and templates would write the same time into it."""
    for folder in sorted(tokens_folder().glob(f"{key}-*")):
        try:
            entry = json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))
            if any(now.strftime(format) != text for format, text in entry["written"].items()):
                continue
            if file_sha256_once(folder / ROWS_NAME) != entry["sha256"]:
                raise ValueError("its bytes are not those that were written")
            logger.info("%s: the tokens are read from the cache, %s", entry["name"], folder)
            return Stored(rows=Dataset.from_file(str(folder / ROWS_NAME)), facts=entry["facts"])
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s: this entry of the cache cannot be used, and is made anew (%s)", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    return None


def store(name: str, key: str, write: Callable[[Path | None], Stored], written: Mapping[str, str]) -> Stored:
    """Write tokens into the cache, if they are many.

    Args:
        name: the name of the data set, for messages.
        key: as `key_of` returns it.
        write: writes the rows into a file, or keeps them in memory if there is no path.
        written: what templates have written of the time when `write` is done: format -> text.

    Raises:
        UserError: the disk is full.
    """
    root = tokens_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        staging = tempfile.TemporaryDirectory(prefix=".partial-", dir=root, ignore_cleanup_errors=True)
    except OSError as error:
        logger.warning("%s: no tokens can be kept here (%s); %s", root, error.strerror or error, _ELSEWHERE)
        return write(None)
    with staging:
        path = Path(staging.name) / ROWS_NAME
        try:
            stored = write(path)
            if path.stat().st_size < SMALLEST:
                return Stored(rows=Dataset.from_file(str(path), in_memory=True), facts=stored.facts)
            entry = {"name": name, "written": written, "sha256": file_sha256_once(path), "facts": stored.facts}
            path.with_name(FACTS_NAME).write_text(json.dumps(entry), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{root}: tokens cannot be written: {error.strerror or error}; {_ELSEWHERE}") from error
        folder = root / f"{key}-{hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:8]}"
        with contextlib.suppress(OSError):  # another process was faster, and its entry holds the same
            path.parent.rename(folder)
    logger.info("%s: the tokens are kept in %s; %s", name, folder, _ELSEWHERE)
    return Stored(rows=Dataset.from_file(str(folder / ROWS_NAME)), facts=stored.facts)


def _sweep(root: Path) -> None:
    """Remove what processes that were killed have left."""
    for folder in root.glob(".partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
