"""Single files as users have them: JSON that may be broken, and Git LFS pointers instead of the files themselves."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loram.base.errors import UserError

_LFS = b"version https://git-lfs"

# The tokenizer's files in a model folder, and all files beside its weights and its config. They are copied byte for
# byte.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
SIDE_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "loram_plan.json",
    "loram_masks.safetensors",
    "modeling_loram.py",
)
_PROCESSORS = ("*processor_config.json",)  # how a wrapped model's towers get their inputs

CHAT_TEMPLATE = "chat_template.jinja"  # where transformers looks for it first


def refuse_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer: a clone without git-lfs has such a small text file in the place of each large file.

    Raises:
        UserError: the file is a pointer.
    """
    with path.open("rb") as handle:
        if handle.read(len(_LFS)) == _LFS:
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        UserError: the file is a Git LFS pointer, or does not hold a JSON object.
    """
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys, so that equal objects have equal bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_side_files(source: Path, out: Path, *, processors: bool = False) -> None:
    """Copy tokenizer, chat template, generation config, licence and plan to another folder, byte for byte.

    Args:
        source, out: the two folders.
        processors: copy what a wrapped model has for images or sound too.
    """
    copy_files(source, out, SIDE_FILES + _PROCESSORS if processors else SIDE_FILES)


def copy_files(source: Path, out: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of a model folder that match the patterns to another folder, byte for byte."""
    for path in side_files(source, patterns):
        shutil.copyfile(path, out / path.name)


def side_files(folder: Path, patterns: tuple[str, ...] = SIDE_FILES) -> list[Path]:
    """List the files of a model folder that match the patterns, sorted by name."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
