"""The teacher cache: a full model's predictions on a text, stored for alignment.

With a cache, the full model need not be in memory beside the student, the pruned model that is aligned. A cache is a
folder with `teacher.json` and files `part-*.safetensors`, which are read through memory maps. A part holds some rows:

| tensor | shape | dtype | meaning |
|---|---|---|---|
| `input_ids`, `labels` | (tokens,) | int32 | the rows one after the other; labels are -100 where not in the loss |
| `row_starts` | (rows + 1,) | int64 | where each row begins in `input_ids` and `labels` |
| `ids` | (wanted, k) | uint16, or int32 for a large vocabulary | the likeliest next tokens, likeliest first |
| `log_probs` | (wanted, k) | float16 | their log-probabilities over the whole vocabulary, in nats |
| `log_rest` | (wanted,) | float16 | the log of the probability of all other tokens |
| `wanted_starts` | (rows + 1,) | int64 | where each row begins in `ids`, `log_probs` and `log_rest` |

`wanted` is the number of positions whose next token is in the loss; they are stored in order.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import safe_open
from torch import Tensor

from loram.base.errors import UserError, first_problem
from loram.base.paths import local
from loram.compute.head import TopK
from loram.data.batches import Batch
from loram.disk.artifacts import find_manifest
from loram.disk.tensorfile import TensorFileWriter, TensorSpec
from loram.model.plan import BaseReference

INFO_NAME = "teacher.json"
_UINT16 = 1 << 16


class TeacherInfo(BaseModel):
    """The content of `teacher.json`.

    Args:
        base: the full model that made the predictions.
        rows_digest: the SHA-256 of the rows' token ids and labels.
        top_k: how many next tokens are stored per position.
        vocab_size: how many tokens the model knows.
        part_rows: how many rows each part has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: BaseReference
    rows_digest: str
    top_k: PositiveInt
    vocab_size: PositiveInt
    part_rows: tuple[PositiveInt, ...]


@dataclass(frozen=True, kw_only=True)
class TeacherRow:
    """One row and the teacher's predictions at its `wanted` positions, those whose next token is in the loss.

    Args:
        input_ids, labels: (tokens,) int64; labels are -100 where a token is not in the loss.
        ids: (wanted, k) int64, the likeliest next tokens.
        log_probs: (wanted, k) float32, their log-probabilities in nats.
        log_rest: (wanted,) float32, the log of the probability of all other tokens.
    """

    input_ids: Tensor
    labels: Tensor
    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor


class TeacherCache:
    """A sequence of `TeacherRow`, read from memory-mapped files.

    Args:
        folder: a folder that `teach` wrote.

    Raises:
        UserError: the folder is not a complete teacher cache.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = local(folder)
        path = folder / INFO_NAME
        if not path.is_file():
            raise UserError(f"{folder}: no {INFO_NAME} here, so this is not a folder that `loram teach` wrote")
        try:
            self.info = TeacherInfo.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a valid description of a teacher cache: {first_problem(error)}") from error
        find_manifest(folder)
        self._ends = list(accumulate(self.info.part_rows))
        self._parts: list[Any] = [
            safe_open(folder / part_name(number), framework="pt") for number in range(len(self.info.part_rows))
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> TeacherRow:
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = bisect_right(self._ends, row)
        part, row = self._parts[number], row - ([0, *self._ends][number])
        start, stop = part.get_slice("row_starts")[row : row + 2].tolist()
        first, last = part.get_slice("wanted_starts")[row : row + 2].tolist()
        return TeacherRow(
            input_ids=part.get_slice("input_ids")[start:stop].long(),
            labels=part.get_slice("labels")[start:stop].long(),
            ids=part.get_slice("ids")[first:last].long(),
            log_probs=part.get_slice("log_probs")[first:last].float(),
            log_rest=part.get_slice("log_rest")[first:last].float(),
        )


def part_name(number: int) -> str:
    """Return the file name of a part."""
    return f"part-{number:05d}.safetensors"


def write_part(
    path: Path,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
    predictions: Sequence[tuple[Batch, TopK]],
    vocab_size: int,
) -> None:
    """Write a part of a teacher cache.

    Args:
        path: the file to write.
        input_ids, labels: the rows of the part.
        predictions: the batches that the rows were put into, each with what the teacher predicts there.
        vocab_size: how many tokens the model knows.
    """
    by_row: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # row -> its ids, log_probs, log_rest
    for batch, top in predictions:
        counts = batch.wanted.sum(1).tolist()
        pieces = (part.split(counts) for part in (top.ids, top.log_probs, top.log_rest))
        by_row.update(zip(batch.rows, zip(*pieces, strict=True), strict=True))
    ids, log_probs, log_rest = (torch.cat([by_row[row][i] for row in range(len(input_ids))]) for i in range(3))
    lengths = [len(row) for row in input_ids]
    wanted = [len(by_row[row][2]) for row in range(len(input_ids))]
    tensors = {
        "input_ids": torch.tensor([token for row in input_ids for token in row], dtype=torch.int32),
        "labels": torch.tensor([label for row in labels for label in row], dtype=torch.int32),
        "row_starts": torch.tensor([0, *accumulate(lengths)]),
        "ids": ids.to(torch.uint16 if vocab_size <= _UINT16 else torch.int32),
        "log_probs": log_probs.half(),
        "log_rest": log_rest.half(),
        "wanted_starts": torch.tensor([0, *accumulate(wanted)]),
    }
    with TensorFileWriter(path, {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
