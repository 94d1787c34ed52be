"""Rows of several data sets or teacher caches as one mixture, and the batches that alignment trains on."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from loram.alignment.teacher import TeacherCache, TeacherRow
from loram.base.errors import UserError
from loram.data.batches import IGNORED
from loram.data.mixture import draw, load_mixture
from loram.data.spec import CacheSpec, WeightedSpec
from loram.model.plan import BaseReference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = dict[str, Tensor]
SourceRow = TeacherRow | Mapping[str, list[int]]
_PADDING = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}


class Source(Protocol):
    """A sequence of rows: a data set with the columns `input_ids` and `labels`, or a `TeacherCache`."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> SourceRow: ...


def read_rows(
    specs: Sequence[WeightedSpec],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    vocabulary: int,
    seed: int,
    *,
    now: datetime,
) -> "Rows":
    """Read and tokenise data sets, and mix their rows.

    Args:
        specs: the data sets, with their weights.
        tokenizer, max_length, vocabulary: as in `loram.data.mixture.load_mixture`.
        seed: the seed of the draw.
        now: the time for chat templates that write one.

    Raises:
        UserError: as in `loram.data.mixture.load_mixture`.
    """
    mixture = load_mixture(specs, tokenizer, max_length, vocabulary=vocabulary, seed=seed, now=now)
    return Rows([tokens.rows for tokens in mixture.sources], places(mixture.shares))


def places(shares: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return (index of the source, index of the row in it) of each row of a mixture, in the order of the sources."""
    return [(source, row) for source, rows in enumerate(shares) for row in rows]


def cached_rows(specs: Sequence[CacheSpec], base: BaseReference, seed: int) -> "Rows":
    """Open teacher caches and mix their rows, which include the teacher's predictions.

    Args:
        specs: the caches, with their weights.
        base: the full model that must have been the teacher.
        seed: the seed of the draw.

    Raises:
        UserError: a folder is not a teacher cache, or its teacher was another model than `base`.
    """
    caches = [TeacherCache(spec.path) for spec in specs]
    for spec, cache in zip(specs, caches, strict=True):
        teacher = cache.info.base
        if teacher.fingerprint != base.fingerprint:
            raise UserError(
                f"{spec.path}: the teacher was {teacher.name}, but the pruned model was made from {base.name} "
                f"(fingerprint {teacher.fingerprint[:12]} instead of {base.fingerprint[:12]}); "
                "run `loram teach` on that one"
            )
    shares = draw([len(cache) for cache in caches], [spec.weight for spec in specs], seed)
    return Rows(caches, places(shares))


class Rows(torch.utils.data.Dataset[Item]):
    """The rows of a mixture, as tensors; see `to_tensors`.

    Args:
        sources: the sources of the rows.
        places: (index of the source, index of the row in it) of each row, as `places` returns them.
    """

    def __init__(self, sources: Sequence[Source], places: Sequence[tuple[int, int]]) -> None:
        self.sources, self.places = sources, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        source, row = self.places[index]
        return to_tensors(self.sources[source][row])

    def lists(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the token ids and the labels of all rows."""
        input_ids, labels = [], []
        for source, index in self.places:
            row = self.sources[source][index]
            if isinstance(row, TeacherRow):
                input_ids.append(row.input_ids.tolist())
                labels.append(row.labels.tolist())
            else:
                input_ids.append(list(row["input_ids"]))
                labels.append(list(row["labels"]))
        return input_ids, labels


def to_tensors(row: SourceRow) -> Item:
    """Turn a row into tensors.

    Returns:
        `input_ids` and `labels`, (tokens,) int64. A row of a teacher cache has also `teacher_ids` and
        `teacher_log_probs`, (tokens, k), and `teacher_log_rest`, (tokens,): each prediction stands at the position
        before the predicted token, and the positions without a prediction hold zeros.
    """
    if not isinstance(row, TeacherRow):
        return {"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"])}
    positions = (pad(row.labels[1:], (0, 1), value=IGNORED) != IGNORED).nonzero()[:, 0]
    predictions = {"teacher_ids": row.ids, "teacher_log_probs": row.log_probs, "teacher_log_rest": row.log_rest}
    spread = {
        name: tensor.new_zeros(len(row.labels), *tensor.shape[1:]).index_copy(0, positions, tensor)
        for name, tensor in predictions.items()
    }
    return {"input_ids": row.input_ids, "labels": row.labels, **spread}


def collate(items: Sequence[Item]) -> Item:
    """Stack items into one batch with an `attention_mask`, padded on the right.

    The labels of the first tokens become -100, because a first token is never predicted.
    """
    width = max(len(item["input_ids"]) for item in items)
    batch = {}
    for name in (*items[0], "attention_mask"):
        tensors = [item.get(name, torch.ones_like(item["input_ids"])) for item in items]
        batch[name] = torch.stack(
            [
                pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, width - len(tensor)), value=_PADDING.get(name, 0))
                for tensor in tensors
            ]
        )
    batch["labels"][:, 0] = IGNORED
    return batch
