"""Data files and hub data sets -> raw rows, exactly as they were written, with the place of each row."""

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from loram.base.errors import UserError
from loram.base.paths import local
from loram.data.files import DELIMITERS, SUFFIXES, find_files, is_saved, kind_of, open_text
from loram.data.messages import without_nulls
from loram.data.spec import DataSpec

Row = dict[str, Any]  # Any: the values are JSON
NumberedRows = Iterator[tuple[int, Row]]  # (number of the line that the row begins on, or of the row; the row)

_SLOW_ROWS = 5_000
_LONGEST_FIELD = 2**31 - 1  # characters; by default Python's csv refuses fields above 128 KiB


@dataclass(frozen=True, kw_only=True)
class Raw:
    """Raw rows.

    Args:
        name: the name of the data set.
        rows: the rows; a `Dataset` where they stay on disk.
        places: where each row stands, such as `rows.jsonl:7`; None where rows have numbers only.
    """

    name: str
    rows: Sequence[Row] | Dataset
    places: Sequence[str] | None = None

    def row(self, index: int) -> Row:
        """Return a row, without the nulls that a table has where a row's object lacks a key."""
        row: Row = self.rows[index]
        return {name: without_nulls(row[name]) for name in row} if isinstance(self.rows, Dataset) else row

    def place(self, index: int) -> str:
        """Return where a row stands, for messages: `rows.jsonl:7` or `rows.parquet: row 7`."""
        return f"{self.name}: row {index + 1}" if self.places is None else self.places[index]

    def columns(self) -> dict[str, int]:
        """Return each column and the number of rows that have a value in it."""
        if isinstance(self.rows, Dataset):
            table = self.rows.data
            return {name: len(table) - table.column(name).null_count for name in self.rows.column_names}
        counts: dict[str, int] = {}
        for row in self.rows:
            for name, value in row.items():
                counts[name] = counts.get(name, 0) + (value not in (None, ""))
        return counts


def read_raw(spec: DataSpec) -> Raw:
    """Read the raw rows of a data set.

    Text formats are read by Python's own parsers, because `datasets` would turn some text into dates and numbers.

    Raises:
        UserError: the data set does not exist, is empty, or a part of it cannot be read; the message names file and
            line.
    """
    files = find_files(spec)
    raw = Raw(name=spec.path, rows=_limit(_read_hub(spec), spec)) if files is None else _read_files(files, spec)
    if not len(raw.rows):
        raise UserError(f"{spec.path}: the data set is empty")
    return raw


@contextlib.contextmanager
def bars_if_slow(rows: int) -> Iterator[None]:
    """Show the progress bars of `datasets` only if the rows are many enough to take a while."""
    if rows > _SLOW_ROWS or not datasets.is_progress_bar_enabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _limit(rows: Dataset, spec: DataSpec) -> Dataset:
    return rows if spec.max_samples is None else rows.select(range(min(spec.max_samples, len(rows))))


def _read_files(files: list[Path], spec: DataSpec) -> Raw:
    path = local(spec.path)
    if spec.config is not None:
        raise UserError(f"{path}: config {spec.config!r} is for hub data sets, but this is a file; leave it out")
    if is_saved(path):
        return Raw(name=spec.path, rows=_limit(_read_saved(path, spec), spec))
    if spec.split is not None and not path.is_dir():
        raise UserError(f"{path}: split {spec.split!r} is for hub data sets and folders; leave it out")
    if (kind := kind_of(files[0])) not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of data file; the known kinds are {', '.join(SUFFIXES)}")
    if kind == ".parquet":
        return Raw(name=spec.path, rows=_limit(_read_parquet(files, spec), spec))
    numbered = list(islice(_read_text_files(files), spec.max_samples))
    return Raw(name=spec.path, rows=[row for _, row in numbered], places=[place for place, _ in numbered])


def _read_text_files(files: list[Path]) -> Iterator[tuple[str, Row]]:
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


def _read_parquet(files: list[Path], spec: DataSpec) -> Dataset:
    try:
        full = [str(path) for path in files if path.stat().st_size and pq.read_metadata(path).num_rows]
        if not full:
            raise UserError(f"{spec.path}: the data set is empty")
        return datasets.load_dataset("parquet", data_files=full, split="train")
    except UserError:
        raise
    except Exception as error:  # datasets wraps whatever its readers raise
        raise UserError(f"{spec.path}: cannot be read as parquet: {_reason(error.__cause__ or error)}") from error


def _read_saved(path: Path, spec: DataSpec) -> Dataset:
    """Read a folder that `save_to_disk` made."""
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


def _read_hub(spec: DataSpec) -> Dataset:
    try:
        return datasets.load_dataset(spec.path, spec.config, split=spec.split or "train")
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
