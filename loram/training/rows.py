"""The rows of a training: their fingerprint, their order, and how they become batches."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loram.data.tokens import DESIRABLE, REJECTED
from loram.trainer.arguments import as_user_error, check_batches
from loram.training.preference import PreferenceCollator

Collator = Callable[[list[Any]], dict[str, Any]]
_PREFERENCES = (f"{REJECTED}input_ids", f"{REJECTED}labels", DESIRABLE)  # the columns that other rows do not have


def rows_digest(rows: Dataset) -> str:
    """Return the SHA-256 of the rows' token ids and labels, and of what they prefer, in order."""
    digest = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(1000):
        for column in ("input_ids", "labels", *(name for name in _PREFERENCES if name in batch)):
            for value in batch[column]:
                row = np.atleast_1d(value)
                digest.update(len(row).to_bytes(8, "little") + np.asarray(row, dtype="<i8").tobytes())
    return digest.hexdigest()


def arrange(
    rows: Dataset, arguments: SFTConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> tuple[Dataset, Collator]:
    """Return the rows, shuffled and packed as the arguments say, and what makes batches of them.

    That is TRL's collator, and ours for rows of preferences.

    Where the tokenizer has no token for padding, or one that is beyond the model's `vocabulary`, token 0 takes its
    place: padding is neither attended to nor in the loss, so any token will do.

    Raises:
        UserError: TRL has no such packing strategy.
    """
    token, multiple = tokenizer.pad_token_id, arguments.pad_to_multiple_of
    padding = token if token is not None and token < vocabulary else 0
    if set(_PREFERENCES) & set(rows.column_names):
        assert arguments.max_length is not None
        collator = PreferenceCollator(padding=padding, max_length=arguments.max_length, multiple=multiple)
        return _in_order(rows, arguments), collator
    plain = DataCollatorForLanguageModeling(
        pad_token_id=padding,
        padding_free=arguments.padding_free or (arguments.packing and arguments.packing_strategy != "wrapped"),
        pad_to_multiple_of=multiple,
    )
    return _in_order(rows, arguments), plain


def check_packed(rows: Dataset, arguments: SFTConfig) -> None:
    """Refuse rows that make no batch, as `check_batches` does, after they are packed."""
    if arguments.dataloader_drop_last:
        check_batches(len(_in_order(rows, arguments)), arguments)


def _in_order(rows: Dataset, arguments: SFTConfig) -> Dataset:
    """Return the rows, shuffled and packed."""
    if arguments.shuffle_dataset:
        rows = rows.shuffle(seed=arguments.seed)
    if not arguments.packing:
        return rows
    try:
        return pack_dataset(rows, arguments.max_length, arguments.packing_strategy)
    except ValueError as error:
        raise as_user_error(error) from error


def first_batches(rows: Dataset, collator: Collator, size: int, count: int) -> list[Mapping[str, Tensor]]:
    """Yield the first `count` batches of `size` rows, or as many as there are."""

    def batches() -> Iterator[Any]:
        for start in range(0, len(rows), size):
            yield collator(list(rows.select(range(start, min(start + size, len(rows))))))

    return list(islice(batches(), count))
