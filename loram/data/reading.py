"""Data files and hub data sets -> raw rows, exactly as they were written, with the place of each row."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset

from loram.base.errors import UserError
from loram.base.paths import local
from loram.data.files import DELIMITERS, SUFFIXES, find_files, is_saved, kind_of, open_text
from loram.data.messages import without_nulls
from loram.data.spec import DataSpec

Row = dict[str, Any]  # Any: the values are JSON
PlacedRow = tuple[str, Row]  # (the place of the row, for messages; the row)
NumberedRows = Iterator[tuple[int, Row]]  # (number of the line that the row begins on, or of the row; the row)

_LONGEST_FIELD = 2**31 - 1  # characters; by default Python's csv refuses fields above 128 KiB


@dataclass(frozen=True, kw_only=True)
class Raw:
    """Raw rows, which stay where they are: each time that somebody goes through them, they are read anew.

    Args:
        name: the name of the data set.
        source: the text files that the rows are read from, or a data set of `datasets`.
        limit: how many rows to read at most.
    """

    name: str
    source: Sequence[Path] | Dataset | IterableDataset
    limit: int | None = None

    def __iter__(self) -> Iterator[PlacedRow]:
        """Yield each row after its place, such as `rows.jsonl:7` or `rows.parquet: row 7`."""
        if isinstance(self.source, Dataset | IterableDataset):
            return islice(self._numbered(self.source), self.limit)
        return islice(_read_text_files(self.source), self.limit)

    def __len__(self) -> int:
        return self._counts[0]

    def columns(self) -> dict[str, int]:
        """Return each column and the number of rows that have a value in it."""
        return self._counts[1]

    @property
    def files(self) -> Sequence[Path] | None:
        """The files whose bytes the rows come from; None where there are none on this machine."""
        if isinstance(self.source, IterableDataset):
            return None
        if isinstance(self.source, Dataset):
            return [Path(file["filename"]) for file in self.source.cache_files] or None
        return self.source

    def _numbered(self, rows: Dataset | IterableDataset) -> Iterator[PlacedRow]:
        """Yield the rows without the nulls that a table has where a row's object lacks a key."""
        for number, row in enumerate(rows, 1):
            yield f"{self.name}: row {number}", {name: without_nulls(row[name]) for name in row}

    @cached_property
    def _counts(self) -> tuple[int, dict[str, int]]:
        """The number of rows, and of those with a value in each column."""
        if isinstance(self.source, Dataset):
            rows = self.source if self.limit is None else self.source.select(range(min(self.limit, len(self.source))))
            return len(rows), {name: len(rows) - rows.data.column(name).null_count for name in rows.column_names}
        total, counts = 0, dict[str, int]()
        for _, row in self:
            total += 1
            for name, value in row.items():
                counts[name] = counts.get(name, 0) + (value not in (None, ""))
        return total, counts


def read_raw(spec: DataSpec) -> Raw:
    """Read the raw rows of a data set, once through to the end.

    Text formats are read by Python's own parsers, because `datasets` would turn some text into dates and numbers.

    Raises:
        UserError: the data set does not exist, is empty, or a part of it cannot be read; the message names file and
            line.
    """
    raw = open_raw(spec)
    if not len(raw):
        raise UserError(f"{spec.path}: the data set is empty")
    return raw


def open_raw(spec: DataSpec) -> Raw:
    """Find the raw rows of a data set. Those of text files, and those that are streamed, are not looked at yet.

    Raises:
        UserError: the data set does not exist, or cannot be opened.
    """
    files = find_files(spec)
    source = _open_hub(spec) if files is None else _open_files(files, spec)
    return Raw(name=spec.path, source=source, limit=spec.max_samples)


def _open_files(files: Sequence[Path], spec: DataSpec) -> Sequence[Path] | Dataset | IterableDataset:
    path = local(spec.path)
    if spec.config is not None:
        raise UserError(f"{path}: config {spec.config!r} is for hub data sets, but this is a file; leave it out")
    if is_saved(path):
        return _open_saved(path, spec)
    if spec.split is not None and not path.is_dir():
        raise UserError(f"{path}: split {spec.split!r} is for hub data sets and folders; leave it out")
    if (kind := kind_of(files[0])) not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of data file; the known kinds are {', '.join(SUFFIXES)}")
    return _open_parquet(files, spec) if kind == ".parquet" else files


def _read_text_files(files: Sequence[Path]) -> Iterator[PlacedRow]:
    """Yield the place of each row, and the row."""
    for path in files:
        try:
            with open_text(path) as handle:
                parser, has_lines = _parser(handle, path)
                for number, row in parser:
                    yield (f"{path}:{number}" if has_lines else f"{path}: row {number}"), row
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: cannot be read as text: {error}; save it in UTF-8") from error
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read: {reason}") from error


def _open_parquet(files: Sequence[Path], spec: DataSpec) -> Dataset | IterableDataset:
    try:
        full = [str(path) for path in files if path.stat().st_size and pq.read_metadata(path).num_rows]
        if not full:
            raise UserError(f"{spec.path}: the data set is empty")
        return datasets.load_dataset("parquet", data_files=full, split="train", streaming=spec.streaming)
    except UserError:
        raise
    except Exception as error:  # datasets wraps whatever its readers raise
        raise UserError(f"{spec.path}: cannot be read as parquet: {_reason(error.__cause__ or error)}") from error


def _open_saved(path: Path, spec: DataSpec) -> Dataset:
    """Open a folder that `save_to_disk` made."""
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        raise UserError(f"{path}: cannot be read as a saved data set: {_reason(error)}") from error
    if not isinstance(data, DatasetDict):
        if spec.split is not None:
            raise UserError(f"{path}: split {spec.split!r}: this folder has one data set without splits; leave it out")
        return data
    if (split := spec.split or "train") not in data:
        raise UserError(f"{path}: no split {split!r}; there are {', '.join(map(str, data))}; choose one of them")
    return data[split]


def _open_hub(spec: DataSpec) -> Dataset | IterableDataset:
    try:
        return datasets.load_dataset(spec.path, spec.config, split=spec.split or "train", streaming=spec.streaming)
    except Exception as error:  # the hub, the network and the builders raise exceptions of many types
        raise UserError(
            f"{spec.path}: no such file, and the hub has no such data set or did not send it: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _parser(handle: TextIO, path: Path) -> tuple[NumberedRows, bool]:
    """Return the rows of a text file, and whether their numbers are line numbers."""
    kind = kind_of(path)
    if kind in DELIMITERS:
        return _parse_csv(handle, path, DELIMITERS[kind]), True
    if kind == ".jsonl":
        return _parse_json_lines(handle, path), True
    text = handle.read()
    if kind == ".txt":
        return iter([(1, {"text": text})] if text.strip() else []), True
    if text.lstrip().startswith("["):
        return _parse_json_list(text, path), False
    return _parse_json_lines(text.split("\n"), path), True  # many .json files hold JSON lines


def _parse_json_list(text: str, path: Path) -> NumberedRows:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as json: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is not a JSON object")
        yield number, row


def _parse_json_lines(lines: Iterable[str], path: Path) -> NumberedRows:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            lists = (
                "; a .json file is a list of objects, or has one object per line" if kind_of(path) == ".json" else ""
            )
            raise UserError(f"{path}:{number}: this row is not valid JSON ({error}){lists}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: this row is not a JSON object")
        yield number, row


def _parse_csv(handle: TextIO, path: Path, delimiter: str) -> NumberedRows:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(handle, delimiter=delimiter, strict=True)
    columns: list[str] = []
    line = 1  # where the next row begins; a row can have several lines
    try:
        for fields in reader:
            if fields and not columns:
                columns = fields
                if twice := next((column for column in columns if columns.count(column) > 1), None):
                    raise UserError(f"{path}: column {twice!r} stands twice in the header")
            elif len(fields) > len(columns):
                raise UserError(f"{path}:{line}: this row has more fields than there are columns; quote them")
            elif fields:
                yield line, dict(zip(columns, fields, strict=False))  # a short row lacks its last columns
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: cannot be read as {kind_of(path)[1:]}: {error}") from error
