"""Rows that are read and tokenised while a training goes on, so that it begins at once whatever their number.

What can be known before is known of the first rows alone: which columns are used, and that rows can be tokenised.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from datasets import IterableDataset, interleave_datasets

from loram.base.errors import UserError
from loram.data.cache import contents_of
from loram.data.clock import clock_at
from loram.data.files import find_files
from loram.data.reading import open_raw
from loram.data.spec import DataSpec, Kind, WeightedSpec
from loram.data.tokens import Pieces, Rows, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_ROWS = 1_000
AnySpec = TypeVar("AnySpec", bound=DataSpec)
_BATCH_ROWS = 16  # rows that are tokenised together


def first_rows(spec: AnySpec) -> AnySpec:
    """Return what is looked at of a data set before a training: the first rows of a stream, or all rows."""
    rows = min(FIRST_ROWS, spec.max_samples or FIRST_ROWS)
    return spec.model_copy(update={"max_samples": rows}) if spec.streaming else spec


def check_streams(specs: Sequence[WeightedSpec], trainer: Mapping[str, Any]) -> None:
    """Refuse streamed data sets for which something is missing.

    Args:
        specs: the data sets of a training.
        trainer: the options of its Trainer.

    Raises:
        UserError: the training does not say how many steps it takes, only some data sets are streamed, or several are
            without weights.
    """
    streamed = [spec for spec in specs if spec.streaming]
    if not streamed:
        return
    if (trainer.get("max_steps") or -1) < 1:
        raise UserError(
            f"{streamed[0].path}: streaming: how many rows there are is not known, so say how many steps to take: "
            "max_steps (--max-steps)"
        )
    if len(streamed) < len(specs):
        raise UserError(f"{streamed[0].path}: streaming: stream every data set of a mixture, or none")
    if len(specs) > 1 and None in [spec.weight for spec in specs]:
        raise UserError(f"{streamed[0].path}: streaming: several streams need a weight each, which is their share")


def stream_tokens(
    specs: Sequence[WeightedSpec],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    vocabulary: int,
    seed: int,
    now: datetime,
    kinds: Sequence[Kind] = ("text",),
) -> IterableDataset:
    """Return the tokens of streamed data sets, without an end: what is read through begins again.

    Rows are drawn from `buffer_size` rows that are read ahead, and each next row comes from one of the data sets by
    chance, in proportion to the weights. The order follows from the seed alone.

    Args:
        specs, tokenizer, max_length, vocabulary, kinds: as in `loram.data.mixture.load_mixture`.
        seed: the seed of the order.
        now: the time for chat templates that write one.

    Raises:
        UserError: as in `loram.data.tokens.load_rows`; and while rows are taken, as in `tokenize`.
    """
    streams = []
    for spec in specs:
        rows = replace(load_rows(first_rows(spec), kinds), raw=open_raw(spec))
        examples = IterableDataset.from_generator(_examples, gen_kwargs={"rows": rows})
        if spec.buffer_size > 1:
            examples = examples.shuffle(seed=seed, buffer_size=spec.buffer_size)
        pieces = Pieces(tokenizer, spec.max_length or max_length, vocabulary, chats=rows.chats)
        streams.append(
            examples.map(
                _encode,
                batched=True,
                batch_size=_BATCH_ROWS,
                fn_kwargs={"pieces": pieces, "columns": rows.columns, "now": now},
                remove_columns=["where", "example"],
            ).repeat(None)
        )
    if len(streams) == 1:
        return streams[0]
    weights = [spec.weight or 0.0 for spec in specs]
    return interleave_datasets(streams, [weight / sum(weights) for weight in weights], seed=seed)


def content_of_stream(spec: DataSpec) -> list[str]:
    """Return what a stream is told from others by: what is in its files, or its name on the hub."""
    files = open_raw(spec).files or find_files(spec)
    return [spec.path, str(spec.config), str(spec.split)] if files is None else contents_of(files)


def _examples(rows: Rows) -> Iterator[dict[str, Any]]:
    for where, example in rows.placed():
        yield {"where": where, "example": example}


def _encode(
    batch: Mapping[str, Sequence[Any]], *, pieces: Pieces, columns: Sequence[str], now: datetime
) -> dict[str, list[Any]]:
    with clock_at(now):
        encoded = [
            piece
            for where, example in zip(batch["where"], batch["example"], strict=True)
            for piece in pieces.of(example, where)
        ]
    return {name: [piece[name] for piece in encoded] for name in columns}
