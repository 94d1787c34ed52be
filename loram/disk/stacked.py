"""Experts in checkpoint files: often one tensor per expert there, and one 3-D tensor for all of them in the model."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from loram.base.errors import UserError
from loram.model.architecture import Architecture

Stack = tuple[tuple[str, ...], ...]  # expert -> the names of its parts in the files, which are joined along their rows


def names_in_model(
    names: Iterable[str], architecture: Architecture | None, folder: Path
) -> tuple[dict[str, str], dict[str, Stack]]:
    """Return what the tensors of files are in the model.

    Args:
        names: the names in the files.
        architecture: the model's family, or None where it is not known.
        folder: the model's folder, for error messages.

    Returns:
        The names in the files of tensors that are in the model as they are, and those of the parts of 3-D tensors; both
        by the name in the model.

    Raises:
        UserError: a part of an expert is missing, or the expert is there twice.
    """
    if architecture is None or (experts := architecture.experts) is None:
        return {name: name for name in names}, {}
    patterns = [
        (path, number, re.compile(re.escape(part).replace(re.escape("{}"), r"(\d+)")))
        for path, parts in experts.in_files.items()
        for number, part in enumerate(parts)
    ]
    single: dict[str, str] = {}
    parts: dict[str, dict[tuple[int, int], str]] = {}  # 3-D tensor -> (expert, number of the part) -> name in the files
    for stored in names:
        if (place := architecture.split(stored)) is None:
            single[stored] = stored
            continue
        prefix, rest = architecture.layer_path(place[0]), place[1]
        for old, new in experts.renamed.items():
            rest = new + rest.removeprefix(old) if rest.startswith(old) else rest
        for path, number, pattern in patterns:
            if match := pattern.fullmatch(rest):
                parts.setdefault(f"{prefix}.{path}", {})[int(match[1]), number] = stored
                break
        else:
            single[f"{prefix}.{rest}"] = stored
    for name in parts:
        if name in single:
            raise UserError(f"{folder}: has {name} as a whole and one tensor per expert too; remove one of the two")
    return single, {name: _stack(name, stored, folder) for name, stored in parts.items()}


def _stack(name: str, stored: Mapping[tuple[int, int], str], folder: Path) -> Stack:
    """Return the parts of a 3-D tensor in order."""
    experts, parts = (1 + max(numbers) for numbers in zip(*stored, strict=True))
    for expert in range(experts):
        for part in range(parts):
            if (expert, part) not in stored:
                raise UserError(f"{folder}: {name} lacks a part of expert {expert}, though there are {experts} experts")
    return tuple(tuple(stored[expert, part] for part in range(parts)) for expert in range(experts))
