"""Files as users have them: JSON objects that may not be any, and Git LFS pointers in place of what they point to."""

import json
import shutil
from pathlib import Path
from typing import Any

from loram.base.errors import UserError

_LFS = b"version https://git-lfs"

# All that a model folder holds beside its weights and its config: carried over byte for byte.
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "loram_plan.json",
    "loram_masks.safetensors",
    "modeling_loram.py",
)


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


def copy_side_files(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence and plan to another folder, byte for byte."""
    for path in side_files(source):
        shutil.copyfile(path, out / path.name)


def side_files(folder: Path) -> list[Path]:
    """The files of a model folder that are carried over byte for byte, sorted by name."""
    return sorted({path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()})
