"""The rows of a training: their fingerprint, their order, and how they become batches."""

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loram.trainer.arguments import as_user_error, check_batches


def rows_digest(rows: Dataset) -> str:
    """Return the SHA-256 of the rows' token ids and labels, in order."""
    digest = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(1000):
        for column in ("input_ids", "labels"):
            for row in batch[column]:
                digest.update(len(row).to_bytes(8, "little") + np.asarray(row, dtype="<i8").tobytes())
    return digest.hexdigest()


def arrange(
    rows: Dataset, arguments: SFTConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> tuple[Dataset, DataCollatorForLanguageModeling]:
    """Return the rows, shuffled and packed as the arguments say, and TRL's collator, which makes batches of them.

    Where the tokenizer has no token for padding, or one that is beyond the model's `vocabulary`, token 0 takes its
    place: padding is neither attended to nor in the loss, so any token will do.

    Raises:
        UserError: TRL has no such packing strategy.
    """
    padding = tokenizer.pad_token_id
    collator = DataCollatorForLanguageModeling(
        pad_token_id=padding if padding is not None and padding < vocabulary else 0,
        padding_free=arguments.padding_free or (arguments.packing and arguments.packing_strategy != "wrapped"),
        pad_to_multiple_of=arguments.pad_to_multiple_of,
    )
    return _in_order(rows, arguments), collator


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


def first_batches(
    rows: Dataset, collator: DataCollatorForLanguageModeling, size: int, count: int
) -> list[Mapping[str, Tensor]]:
    """Yield the first `count` batches of `size` rows, or as many as there are."""

    def batches() -> Iterator[Any]:
        for start in range(0, len(rows), size):
            yield collator(list(rows.select(range(start, min(start + size, len(rows))))))

    return list(islice(batches(), count))
