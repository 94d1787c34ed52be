"""Rows of token ids as padded micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loram.base import processes

IGNORED = -100  # the label of a token that is not in the loss


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows of similar length. They are padded on the right, where causal attention never looks.

    Args:
        rows: the index of each row in the data that the batch was made from.
        ids: (rows, width) int64; token ids, 0 where padded.
        real: (rows, width) bool; False where padded.
        wanted: (rows, width) bool; True where the prediction of the next token is in the loss.
        targets: (number of True values in `wanted`,) int64; those next tokens, row by row.
    """

    rows: tuple[int, ...]
    ids: Tensor
    real: Tensor
    wanted: Tensor
    targets: Tensor

    @property
    def counts(self) -> bool:
        """Return whether any of its tokens is in the loss."""
        return len(self.targets) > 0


def share(input_ids: Sequence[list[int]], after: int = 0) -> Sequence[int]:
    """Return the indices of the rows that this process takes, where several share them: all of them in one process.

    They are dealt out by their lengths, so that every process has about as many tokens.

    Args:
        input_ids: the token ids of each row.
        after: how many other rows were dealt out before.
    """
    return processes.share(_by_length(range(len(input_ids)), input_ids), after)


def make_batches(
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]] | None = None,
    *,
    max_tokens: int,
    rows: Sequence[int] | None = None,
) -> list[Batch]:
    """Sort rows by length and group them into batches of at most `max_tokens` tokens, padding included.

    Args:
        input_ids: the token ids of each row.
        labels: one label per token id, `IGNORED` where the token is not in the loss; None puts all tokens in the loss.
            The first token of a row is never predicted, whatever its label.
        max_tokens: the size limit of a batch; a row that is longer becomes a batch of its own.
        rows: the indices of the rows to take; None takes all.
    """
    taken = range(len(input_ids)) if rows is None else rows
    groups = _groups(_by_length(taken, input_ids), input_ids, max_tokens)
    return [_pad(group, input_ids, labels or input_ids) for group in groups]


def at_the_ends(batch: Batch) -> Batch:
    """Return a batch whose wanted predictions are those of what follows each row; their targets are unknown, so 0."""
    places = torch.arange(batch.ids.shape[1])
    wanted = places == batch.real.sum(1, keepdim=True) - 1
    return replace(batch, wanted=wanted, targets=torch.zeros(len(batch.rows), dtype=torch.int64))


def _by_length(rows: Sequence[int], input_ids: Sequence[list[int]]) -> list[int]:
    return sorted(rows, key=lambda row: len(input_ids[row]))


def _groups(rows: Sequence[int], input_ids: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    for row in rows:
        if group and len(input_ids[row]) * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _pad(rows: list[int], input_ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Batch:
    width = max(len(input_ids[row]) for row in rows)

    def padded(values: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([values[row] + [fill] * (width - len(values[row])) for row in rows])

    next_labels = torch.nn.functional.pad(padded(labels, IGNORED)[:, 1:], (0, 1), value=IGNORED)
    wanted = next_labels != IGNORED
    lengths = torch.tensor([len(input_ids[row]) for row in rows])
    return Batch(
        rows=tuple(rows),
        ids=padded(input_ids, 0),
        real=torch.arange(width) < lengths[:, None],
        wanted=wanted,
        targets=next_labels[wanted],
    )
