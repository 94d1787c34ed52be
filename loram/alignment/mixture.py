"""Rows of several data sets or teacher caches as one, by weights; and the batches that alignment trains on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loram.alignment.teacher import TeacherCache, TeacherRow
from loram.base.errors import UserError
from loram.data.batches import IGNORED
from loram.data.spec import CacheSpec, WeightedSpec
from loram.data.tokens import load_tokens
from loram.model.plan import BaseReference

Item = dict[str, Tensor]
_PADDING = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}


def draw(lengths: Sequence[int], weights: Sequence[float | None], seed: int) -> list[tuple[int, int]]:
    """(source, row) of every row of a mixture, in the sources' order.

    Without weights, all rows of all sources. With them every source gives its share of the rows, drawn without
    repetition, and the mixture is as large as that allows: one source gives all it has.

    Raises:
        UserError: some sources have a weight and some have none.

    Example: lengths (10, 90) and weights (0.5, 0.5) draw all of the first, and 10 rows of the second.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [(source, row) for source, length in enumerate(lengths) for row in range(length)]
    if len(given) < len(weights):
        raise UserError("weights: give every data set one (FILE=0.7), or none")
    size = min(length / weight for length, weight in zip(lengths, given, strict=True))
    generator = torch.Generator().manual_seed(seed)
    places = []
    for source, (length, weight) in enumerate(zip(lengths, given, strict=True)):
        count = min(length, max(1, round(size * weight)))
        chosen = torch.randperm(length, generator=generator)[:count]
        places += [(source, row) for row in sorted(chosen.tolist())]
    return places


def read_rows(specs: Sequence[WeightedSpec], tokenizer: Any, max_length: int, vocabulary: int, seed: int) -> "Rows":
    """The rows of data sets, tokenised.

    Raises:
        UserError: as `loram.data.tokens.load_tokens`.
    """
    found = [load_tokens(spec, tokenizer, max_length, vocabulary=vocabulary).rows for spec in specs]
    return Rows(found, draw([len(rows) for rows in found], [spec.weight for spec in specs], seed))


def cached_rows(specs: Sequence[CacheSpec], base: BaseReference, seed: int) -> "Rows":
    """The rows of teacher caches, with what the teacher predicts in them.

    Raises:
        UserError: a folder is no teacher cache, or one of another model than `base`.
    """
    caches = [TeacherCache(Path(spec.path)) for spec in specs]
    for spec, cache in zip(specs, caches, strict=True):
        taught_by = cache.info.base
        if taught_by.fingerprint != base.fingerprint:
            raise UserError(
                f"{spec.path}: the teacher was {taught_by.name}, but the pruned model was made from {base.name} "
                f"(fingerprint {taught_by.fingerprint[:12]} instead of {base.fingerprint[:12]}); "
                "run `loram teach` on that one"
            )
    return Rows(caches, draw([len(cache) for cache in caches], [spec.weight for spec in specs], seed))


class Rows(torch.utils.data.Dataset):  # type: ignore[misc]
    """Rows of a mixture, each as `item` gives it.

    Args:
        sources: data sets of `input_ids` and `labels`, or teacher caches.
        places: (source, row) of each row, as `draw` gives them.
    """

    def __init__(self, sources: Sequence[Any], places: Sequence[tuple[int, int]]) -> None:
        self.sources, self.places = sources, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        source, row = self.places[index]
        return item(self.sources[source][row])

    def lists(self) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and labels of all rows."""
        ids, labels = [], []
        for source, row in self.places:
            found = self.sources[source][row]
            taught = isinstance(found, TeacherRow)
            ids.append(found.input_ids.tolist() if taught else list(found["input_ids"]))
            labels.append(found.labels.tolist() if taught else list(found["labels"]))
        return ids, labels


def item(row: TeacherRow | Mapping[str, list[int]]) -> Item:
    """A row as tensors; what a teacher predicts stands where its prediction is made: (tokens, k) and (tokens,)."""
    if not isinstance(row, TeacherRow):
        return {"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"])}
    wanted = (pad(row.labels[1:], (0, 1), value=IGNORED) != IGNORED).nonzero()[:, 0]
    taught = {"teacher_ids": row.ids, "teacher_log_probs": row.log_probs, "teacher_log_rest": row.log_rest}
    spread = {
        name: tensor.new_zeros(len(row.labels), *tensor.shape[1:]).index_copy(0, wanted, tensor)
        for name, tensor in taught.items()
    }
    return {"input_ids": row.input_ids, "labels": row.labels, **spread}


def collate(items: Sequence[Item]) -> Item:
    """Items as one batch, padded on the right; the first token of a row is never in the loss."""
    width = max(len(one["input_ids"]) for one in items)
    batch = {}
    for name in (*items[0], "attention_mask"):
        tensors = [one.get(name, torch.ones_like(one["input_ids"])) for one in items]
        batch[name] = torch.stack(
            [
                pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, width - len(tensor)), value=_PADDING.get(name, 0))
                for tensor in tensors
            ]
        )
    batch["labels"][:, 0] = IGNORED
    return batch
