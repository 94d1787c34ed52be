"""Rows of a data set -> token ids, with the loss mask in `labels`. Every stage reads its text through this module."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from datasets import Dataset

from loram.base.errors import UserError
from loram.data.batches import IGNORED
from loram.data.clock import clock_at
from loram.data.encode import Encoded, Encoder
from loram.data.forms import Example, normalise, pick_form
from loram.data.preferences import Labelled, Pair, read_labelled, read_pair
from loram.data.reading import Raw, Row, bars_if_slow, read_raw
from loram.data.spec import DataSpec, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REJECTED = "rejected_"  # what the columns of the answer that is not preferred begin with
DESIRABLE = "desirable"  # the column of a label
_Row = Example | Pair | Labelled


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a data set in one form.

    Args:
        raw: the rows as they were read.
        form: our name of each column that is used -> its name in the data.
        chats: whether rows that can be a chat or plain text are to be chats, where the tokenizer has a chat template.
    """

    raw: Raw
    form: Mapping[str, str]
    chats: bool = True

    def __len__(self) -> int:
        return len(self.raw.rows)

    @property
    def kind(self) -> Kind:
        """Return what is learnt from the rows."""
        return "pairs" if "chosen" in self.form else "labels" if "label" in self.form else "text"

    def __iter__(self) -> Iterator[_Row | None]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> _Row | None:
        """Return a row, or None if it is empty.

        Raises:
            UserError: the row cannot be used; names file and line.
        """
        if index >= len(self):
            raise IndexError(index)
        row, where = self.raw.row(index), self.raw.place(index)
        self._check_prompt(row, where)
        if self.kind == "text":
            return normalise(row, self.form, where)
        return (read_pair if self.kind == "pairs" else read_labelled)(row, self.form, where)

    @cached_property
    def unused(self) -> dict[str, int]:
        """The columns that are not used, each with the number of rows that have a value in it."""
        used = set(self.form.values())
        return {name: count for name, count in self.raw.columns().items() if name not in used and count}

    @cached_property
    def _prompts(self) -> str | None:
        """What the first prompt is."""
        return next((kind for row in self.raw.rows if (kind := self._kind_of(row))), None)

    def _kind_of(self, row: Row) -> str | None:
        prompt = row.get(self.form["prompt"])
        return None if prompt is None else "text" if isinstance(prompt, str) else "messages"

    def _check_prompt(self, row: Row, where: str) -> None:
        """Check that the prompts of all rows are chats, or that all are plain text."""
        if "prompt" in self.form and (kind := self._kind_of(row)) not in (None, self._prompts):
            raise UserError(f"{where}: the prompt is {kind}, but before it is {self._prompts}; use one kind")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenised rows.

    Args:
        rows: the columns `input_ids` and `labels`, lists of int of the same length; labels are -100 where a token is
            not in the loss. Of a pair these are the chosen answer's, and the other's are in `rejected_input_ids` and
            `rejected_labels`. Of an answer with a label, that is in `desirable`, a bool.
        truncated: how many rows lost their end to `max_length`.
        skipped: how many rows had no token left in the loss, such as empty ones; they are not in `rows`.
        columns: our name of each column that was used -> its name in the data.
        unused: the columns, and keys of messages, that were not used -> how many rows, or messages, have a value there.
        templated: whether the rows went through the tokenizer's chat template.
        sources: the index in the data set that each of `rows` was made from.
    """

    rows: Dataset
    truncated: int
    skipped: int
    columns: Mapping[str, str]
    unused: Mapping[str, int]
    templated: bool
    sources: Sequence[int]

    @property
    def answers(self) -> tuple[str, ...]:
        """Return what the columns of each answer begin with: one answer per row, or two."""
        return ("", REJECTED) if f"{REJECTED}labels" in self.rows.column_names else ("",)

    def sequences(self, column: str) -> list[list[int]]:
        """Return `input_ids` or `labels` of every answer: of all rows, and then of the rejected answers."""
        return [sequence for prefix in self.answers for sequence in self.rows[f"{prefix}{column}"]]


def load_rows(spec: DataSpec, kinds: Sequence[Kind] = ("text",)) -> Rows:
    """Read a data set. Its rows are checked when they are taken.

    Args:
        spec: the data set.
        kinds: what may be learnt from the rows.

    Raises:
        UserError: the data set does not exist, is empty, cannot be read, or has an unknown form or one of another kind.
    """
    raw = read_raw(spec)
    form = pick_form(spec, list(raw.columns()), kinds)
    if "completion" in form and "label" not in form and isinstance(raw.row(0).get("label"), bool):
        raise UserError(
            f"{raw.place(0)}: has a label, true or false, so some completions are not to be learnt; only method kto "
            "reads labels: take it, or leave the column out"
        )
    return Rows(raw=raw, form=form, chats=spec.apply_chat_template)


def check_rows(spec: DataSpec, kinds: Sequence[Kind] = ("text",)) -> None:
    """Check that a data set can be read, row by row; as `load_rows`.

    Raises:
        UserError: names the file and the line of the first row that cannot be used.
    """
    for _ in load_rows(spec, kinds):
        pass


def load_tokens(
    spec: DataSpec,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    vocabulary: int,
    now: datetime | None = None,
    kinds: Sequence[Kind] = ("text",),
) -> Tokens:
    """Read and tokenise a data set.

    Args:
        spec: the data set; if it has a `max_length` of its own, that one counts.
        tokenizer: the tokenizer of the model.
        max_length: the limit in tokens, as in `tokenize`.
        vocabulary: how many rows the model's embedding has; a token beyond it is refused.
        now: the time for chat templates that write one; None is the time of this call.
        kinds: what may be learnt from the rows.

    Raises:
        UserError: as in `load_rows` and `tokenize`, or the tokenizer does not fit the model.
    """
    check_tokenizer(tokenizer, vocabulary)
    with clock_at(now or datetime.now()):
        return tokenize(load_rows(spec, kinds), tokenizer, spec.max_length or max_length, vocabulary=vocabulary)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> None:
    """Refuse a tokenizer that does not fit a model, whose embedding has `vocabulary` rows.

    Raises:
        UserError: the tokenizer knows more tokens.
    """
    # The size without added tokens: Gemma 3 has an added token beyond its embedding, which no text needs.
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer knows {tokenizer.vocab_size:,} tokens, but the model's embedding "
            f"has only {vocabulary:,} rows: it does not fit the model; use the tokenizer that came with it"
        )


def tokenize(
    rows: Rows, tokenizer: "PreTrainedTokenizerBase", max_length: int, *, vocabulary: int | None = None
) -> Tokens:
    """Turn rows into token ids and labels. Training and evaluation share this function.

    - A chat goes through the tokenizer's chat template. Every assistant turn is in the loss; in a prompt-completion row
      only the completion is.
    - Rows of a prompt and a completion, a question and an answer, or an instruction and an output are chats if the
      tokenizer has a chat template and `rows.chats` is true. Otherwise they are plain text: the answer and the
      end-of-sequence token after it are in the loss.
    - In a text all tokens are in the loss, and a long text is cut into pieces of `max_length` tokens.
    - Each answer of a pair, and an answer with a label, is a prompt-completion row.

    Args:
        rows: the rows.
        tokenizer: a tokenizer of transformers.
        max_length: the limit in tokens. Longer rows lose their end, and rows that then have no token in the loss are
            skipped, and so are pairs with such an answer; both are counted.
        vocabulary: how many tokens the model knows; None skips this check.

    Raises:
        UserError: a row cannot be used, needs a chat template or an end-of-sequence token and the tokenizer has none,
            or has a token that the model does not know, or no row has a token in the loss.
    """
    name, encoder = rows.raw.name, Encoder(tokenizer, chats=rows.chats)
    nothing: Mapping[str, Encoded] = {
        prefix: ([], []) for prefix in ("", *([REJECTED] if rows.kind == "pairs" else []))
    }

    def encode(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        columns: defaultdict[str, list[Any]] = defaultdict(list)
        for index in batch["index"]:
            where, row = rows.raw.place(index), rows[index]
            pieces = [nothing] if row is None else _encode(row, encoder, max_length, where)
            for answers in pieces:
                for prefix, (ids, labels) in answers.items():
                    if vocabulary is not None:
                        check_tokens(ids, vocabulary, tokenizer, where)
                    columns[f"{prefix}input_ids"].append(ids[:max_length])
                    columns[f"{prefix}labels"].append(labels[:max_length])
                if rows.kind == "labels":
                    columns[DESIRABLE].append(isinstance(row, Labelled) and row.desirable)
                columns["truncated"].append(any(len(ids) > max_length for ids, _ in answers.values()))
                columns["source"].append(index)
        return columns

    with bars_if_slow(len(rows)):
        encoded = Dataset.from_dict({"index": range(len(rows))}).map(
            encode,
            batched=True,
            remove_columns=["index"],
            desc="Tokenizing",
            new_fingerprint=uuid4().hex,  # otherwise `datasets` hashes all rows for a cache that is not used
        )
        kept = encoded.remove_columns("truncated").filter(
            _has_loss, desc="Dropping rows without loss", load_from_cache_file=False
        )
    if unused := {**rows.unused, **encoder.unused}:
        logger.info("%s: not used: %s", name, ", ".join(f"{key} ({count} rows)" for key, count in unused.items()))
    truncated = sum(encoded["truncated"])
    skipped = len(encoded) - len(kept)
    if not len(kept):
        remedy = (
            f" within max_length {max_length}; make it longer" if truncated else ": they are empty, or nobody answers"
        )
        raise UserError(f"{name}: no token of any row is in the loss{remedy}")
    if truncated or skipped:
        logger.warning(
            "%s: of %d rows, max_length %d cut %d, and %d were skipped because %s",
            name,
            len(encoded),
            max_length,
            truncated,
            skipped,
            "an answer had no token in the loss, or both were the same"
            if rows.kind == "pairs"
            else "they had no token in the loss",
        )
    return Tokens(
        rows=kept.remove_columns("source"),
        truncated=truncated,
        skipped=skipped,
        columns=rows.form,
        unused=unused,
        templated="text" not in rows.form and encoder.chats,
        sources=kept["source"][:],
    )


def _encode(row: _Row, encoder: Encoder, max_length: int, where: str) -> Iterator[Mapping[str, Encoded]]:
    """Yield the pieces of a row, as `Encoder.encode` does: what an answer's columns begin with -> ids and labels."""
    if isinstance(row, Pair):
        answers = {"": row.chosen, REJECTED: row.rejected}
        yield {prefix: next(encoder.encode(answer, max_length, where)) for prefix, answer in answers.items()}
    else:
        for encoded in encoder.encode(row.answer if isinstance(row, Labelled) else row, max_length, where):
            yield {"": encoded}


def check_tokens(ids: list[int], vocabulary: int, tokenizer: "PreTrainedTokenizerBase", where: str) -> None:
    """Refuse a row with an added token that the model, whose embedding has `vocabulary` rows, does not know.

    Raises:
        UserError: names the token; `where` begins the message.
    """
    if (token := max(ids, default=0)) >= vocabulary:
        raise UserError(
            f"{where}: the tokenizer gives token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but the model's "
            f"embedding has only {vocabulary:,} rows: it does not fit the model; use the tokenizer that came with it"
        )


def _has_loss(row: Row) -> bool:
    """Return whether every answer of a row has a token in the loss; its first token is never predicted."""
    answers = (labels for name, labels in row.items() if name.endswith("labels"))
    return all(any(label != IGNORED for label in labels[1:]) for labels in answers)
