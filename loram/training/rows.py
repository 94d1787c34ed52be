"""The rows of a training: where they come from, their fingerprint, their order, and how they become batches."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loram.data.mixture import load_mixture
from loram.data.spec import Kind, WeightedSpec
from loram.data.stream import content_of_stream, first_rows, stream_tokens
from loram.data.tokens import DESIRABLE, REJECTED
from loram.disk.artifacts import digest
from loram.trainer.arguments import as_user_error, check_batches
from loram.training.preference import PreferenceCollator

Collator = Callable[[list[Any]], dict[str, Any]]
_PREFERENCES = (f"{REJECTED}input_ids", f"{REJECTED}labels", DESIRABLE)  # the columns that other rows do not have


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """The tokenised rows of a training.

    Args:
        rows: the rows; those of streamed data sets have no end.
        digest: the fingerprint of the rows; of streamed ones that of their first rows and of what is in the files.
        counts: how many rows there are, were cut and were skipped, as manifests have it; None where they are streamed.
    """

    rows: Dataset | IterableDataset
    digest: str
    counts: Mapping[str, int | None]


def read_rows(
    specs: Sequence[WeightedSpec],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    vocabulary: int,
    seed: int,
    now: datetime,
    kind: Kind,
) -> TrainingRows:
    """Read the rows of a training: all of them, or the first ones of streams, which are read on while it goes on.

    Args:
        specs, tokenizer, max_length, vocabulary, seed, now: as in `loram.data.mixture.load_mixture`.
        kind: what is learnt from the rows.

    Raises:
        UserError: as in `loram.data.mixture.load_mixture`.
    """
    known: dict[str, Any] = {"vocabulary": vocabulary, "seed": seed, "now": now, "kinds": (kind,)}
    mixture = load_mixture([first_rows(spec) for spec in specs], tokenizer, max_length, **known)
    hashed = rows_digest(mixture.rows)
    if not specs[0].streaming:
        counts = {
            "rows": len(mixture.rows),
            "rows_truncated": sum(tokens.truncated for tokens in mixture.sources),
            "rows_skipped": sum(tokens.skipped for tokens in mixture.sources),
        }
        return TrainingRows(rows=mixture.rows, digest=hashed, counts=counts)
    contents = [content_of_stream(spec) for spec in specs]
    return TrainingRows(
        rows=stream_tokens(specs, tokenizer, max_length, **known),
        digest=digest([hashed, contents, [spec.buffer_size for spec in specs], [spec.weight for spec in specs]]),
        counts=dict.fromkeys(("rows", "rows_truncated", "rows_skipped")),
    )


def rows_digest(rows: Dataset) -> str:
    """Return the SHA-256 of the rows' token ids and labels, and of what they prefer, in order."""
    hashed = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(1000):
        for column in ("input_ids", "labels", *(name for name in _PREFERENCES if name in batch)):
            for value in batch[column]:
                row = np.atleast_1d(value)
                hashed.update(len(row).to_bytes(8, "little") + np.asarray(row, dtype="<i8").tobytes())
    return hashed.hexdigest()


def arrange(
    rows: Dataset | IterableDataset,
    arguments: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    kind: Kind = "text",
) -> tuple[Dataset | IterableDataset, Collator]:
    """Return the rows, shuffled and packed as the arguments say, and what makes batches of them.

    That is TRL's collator, and ours for rows of preferences.

    Where the tokenizer has no token for padding, or one that is beyond the model's `vocabulary`, token 0 takes its
    place: padding is neither attended to nor in the loss, so any token will do.

    Raises:
        UserError: TRL has no such packing strategy.
    """
    token, multiple = tokenizer.pad_token_id, arguments.pad_to_multiple_of
    padding = token if token is not None and token < vocabulary else 0
    if kind != "text":
        assert arguments.max_length is not None
        collator = PreferenceCollator(padding=padding, max_length=arguments.max_length, multiple=multiple)
        return _in_order(rows, arguments), collator
    plain = DataCollatorForLanguageModeling(
        pad_token_id=padding,
        padding_free=arguments.padding_free or (arguments.packing and arguments.packing_strategy != "wrapped"),
        pad_to_multiple_of=multiple,
    )
    return _in_order(rows, arguments), plain


def check_packed(rows: Dataset | IterableDataset, arguments: SFTConfig) -> None:
    """Refuse rows that make no batch, as `check_batches` does, after they are packed."""
    if arguments.dataloader_drop_last and isinstance(rows, Dataset):
        check_batches(len(_in_order(rows, arguments)), arguments)


def _in_order(rows: Dataset | IterableDataset, arguments: SFTConfig) -> Dataset | IterableDataset:
    """Return the rows, packed, and shuffled where they are not streamed: streams are shuffled as they are read."""
    if arguments.shuffle_dataset and isinstance(rows, Dataset):
        rows = rows.shuffle(seed=arguments.seed, keep_in_memory=True)  # which are the indices alone
    if not arguments.packing:
        return rows
    try:
        return pack_dataset(rows, arguments.max_length, arguments.packing_strategy)
    except ValueError as error:
        raise as_user_error(error) from error


def first_batches(
    rows: Dataset | IterableDataset, collator: Collator, size: int, count: int
) -> list[Mapping[str, Tensor]]:
    """Return the first `count` batches of `size` rows, or as many as there are."""
    items = list(islice(iter(rows), size * count))
    return [collator(items[start : start + size]) for start in range(0, len(items), size)]
