"""Data files and hub data sets -> raw rows, exactly as they were written, with the line that each row begins on."""

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets import Dataset

from loram.base.errors import UserError
from loram.data.spec import DataSpec

Row = dict[str, Any]  # Any: the values are JSON
NumberedRows = Iterator[tuple[int, Row]]  # (number of the line that the row begins on, or of the row; the row)

_SLOW_ROWS = 5_000
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_LONGEST_FIELD = 2**31 - 1  # characters; by default Python's csv refuses fields above 128 KiB


def read_raw(spec: DataSpec) -> tuple[Dataset | list[Row], list[int] | None]:
    """Read the raw rows of a data set, and the line that each row begins on (None if the format has no lines).

    Text formats are read by Python's own parsers, because `datasets` would turn some text into dates and numbers.

    Raises:
        UserError: the data set does not exist, or a part of it cannot be read; the message names file and line.
    """
    path = Path(spec.path).expanduser()
    if not path.exists():
        return _limit(_read_hub(spec), spec), None
    if path.is_dir():
        raise UserError(f"{path}: this is a folder; name a data file in it")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: unknown kind of data file; the known kinds are {', '.join(_SUFFIXES)}")
    for option in ("config", "split"):
        if (value := getattr(spec, option)) is not None:
            raise UserError(f"{path}: {option} {value!r} is for hub data sets, but this is a file; leave it out")
    try:
        if path.suffix == ".parquet":
            return _limit(_read_parquet(path), spec), None
        # utf-8-sig: files that Excel writes begin with a byte order mark
        with path.open(encoding="utf-8-sig", newline="" if path.suffix in _DELIMITERS else None) as handle:
            parser, has_lines = _parser(handle, path)
            numbered = list(islice(parser, spec.max_samples))
            return [row for _, row in numbered], [line for line, _ in numbered] if has_lines else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text: {error}; save it in UTF-8") from error


def location(name: str, index: int, lines: Sequence[int] | None = None) -> str:
    """Name a row in a message: `rows.jsonl:7` if the rows have lines, else `rows.parquet: row 7`."""
    return f"{name}: row {index + 1}" if lines is None else f"{name}:{lines[index]}"


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


def _read_parquet(path: Path) -> Dataset:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the data set is empty")
    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # datasets wraps whatever its readers raise
        raise UserError(f"{path}: cannot be read as parquet: {_reason(error.__cause__ or error)}") from error


def _read_hub(spec: DataSpec) -> Dataset:
    if Path(spec.path).suffix in _SUFFIXES or spec.path.startswith((".", "/", "~")):
        raise UserError(f"{spec.path}: no such file")
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
    if path.suffix in _DELIMITERS:
        return _parse_csv(handle, path, _DELIMITERS[path.suffix]), True
    if path.suffix == ".jsonl":
        return _parse_json_lines(handle, path), True
    text = handle.read()
    if path.suffix == ".txt":
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
            raise UserError(f"{path}:{number}: this row is not valid JSON ({error})") from error
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
                yield line, dict(zip_longest(columns, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: cannot be read as {path.suffix[1:]}: {error}") from error
