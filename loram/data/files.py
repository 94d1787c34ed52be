"""Which files a data set lies in, and how each is opened: one file, several by a pattern, a folder of shards."""

import glob
import importlib
from pathlib import Path
from typing import TextIO, cast

from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

from loram.base.errors import UserError
from loram.base.paths import local
from loram.data.spec import DataSpec

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", *DELIMITERS, ".parquet", ".txt")
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard"}  # suffix -> module with an `open`
_SAVED = ("state.json", "dataset_dict.json")  # one of them is in each folder that `save_to_disk` made


def find_files(spec: DataSpec) -> list[Path] | None:
    """Return the files that a data set on this machine lies in; None if the name has to be on the hub.

    Returns:
        The file itself, the files that match a pattern, in order, or the files of the chosen split of a folder. The
        name of a folder that `save_to_disk` made is returned as it is.

    Raises:
        UserError: no file matches, the folder has no such split, or the files are of several kinds.
    """
    path = local(spec.path)
    if path.is_file() or is_saved(path):
        return [path]
    if path.is_dir():
        return _of_one_kind(_shards(path, spec.split or "train"), spec)
    if glob.has_magic(spec.path):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise UserError(f"{spec.path}: no file matches this pattern")
        return _of_one_kind(files, spec)
    if kind_of(path) in SUFFIXES or spec.path.startswith((".", "/", "~")):
        raise UserError(f"{spec.path}: no such file")
    return None


def is_saved(path: Path) -> bool:
    """Return whether a folder was made by the `save_to_disk` of `datasets`."""
    return any((path / name).is_file() for name in _SAVED)


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds, in lower case and without the one of its compression."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix


def open_text(path: Path) -> TextIO:
    """Open a file of text in UTF-8, compressed or not.

    Raises:
        UserError: the library that this compression needs is not installed.
    """
    newline = "" if kind_of(path) in DELIMITERS else None
    try:
        opener = importlib.import_module(_COMPRESSED.get(path.suffix.lower(), "io"))
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading it needs {error.name}; install that, or decompress the file") from error
    # utf-8-sig: files that Excel writes begin with a byte order mark
    return cast(TextIO, opener.open(path, "rt", encoding="utf-8-sig", newline=newline))


def _shards(folder: Path, split: str) -> list[Path]:
    """Return the files of a split of a folder, by the rules by which `datasets` reads names such as `train-00001`."""
    try:
        every = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except EmptyDatasetError:
        every = DataFilesDict()
    readable = {
        str(name): [path for path in map(Path, paths) if kind_of(path) in SUFFIXES] for name, paths in every.items()
    }
    splits = {name: paths for name, paths in readable.items() if paths}
    if not splits:
        raise UserError(f"{folder}: this folder has no data file; the known kinds are {', '.join(SUFFIXES)}")
    if split not in splits:
        raise UserError(f"{folder}: no files of the split {split!r}; there are {', '.join(splits)}; choose one of them")
    return sorted(set(splits[split]))


def _of_one_kind(files: list[Path], spec: DataSpec) -> list[Path]:
    if len(kinds := sorted({kind_of(path) for path in files})) > 1:
        raise UserError(f"{spec.path}: there are files of several kinds ({', '.join(kinds)}); name those of one kind")
    return files
