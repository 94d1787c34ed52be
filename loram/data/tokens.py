"""Rows of a data set -> token ids, with the loss mask in `labels`. Every stage reads its text through this module."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from loram.base.errors import UserError
from loram.base.progress import track
from loram.data.batches import IGNORED
from loram.data.cache import Stored, contents_of, find, key_of, store, write_rows
from loram.data.clock import clock_at
from loram.data.encode import Encoded, Encoder
from loram.data.forms import Example, normalise, pick_form
from loram.data.preferences import Labelled, Pair, read_labelled, read_pair
from loram.data.reading import Raw, Row, open_raw, read_raw
from loram.data.spec import DataSpec, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REJECTED = "rejected_"  # what the columns of the answer that is not preferred begin with
DESIRABLE = "desirable"  # the column of a label
_ANSWER = ("input_ids", "labels")
_COLUMNS: Mapping[Kind, Sequence[str]] = {
    "text": _ANSWER,
    "pairs": (*_ANSWER, *(f"{REJECTED}{name}" for name in _ANSWER)),
    "labels": (*_ANSWER, DESIRABLE),
}
_Row = Example | Pair | Labelled
PlacedRow = tuple[str, _Row | None]  # (the place of a row, for messages; the row, or None if it is empty)

_SLOW_ROWS = 5_000  # from here on tokenising takes long enough for a progress bar


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
        return len(self.raw)

    @property
    def kind(self) -> Kind:
        """Return what is learnt from the rows."""
        return "pairs" if "chosen" in self.form else "labels" if "label" in self.form else "text"

    @property
    def columns(self) -> Sequence[str]:
        """Return the columns that the rows have as tokens."""
        return _COLUMNS[self.kind]

    def __iter__(self) -> Iterator[_Row | None]:
        return (row for _, row in self.placed())

    def placed(self) -> Iterator[PlacedRow]:
        """Yield each row after its place; None for an empty one.

        Raises:
            UserError: a row cannot be used; names file and line.
        """
        read = {"text": normalise, "pairs": read_pair, "labels": read_labelled}[self.kind]
        first = None  # what the first prompt is: those of all rows have to be chats, or all plain text
        for where, row in self.raw:
            kind = self._kind_of(row)
            first = first or kind
            if kind not in (None, first):
                raise UserError(f"{where}: the prompt is {kind}, but before it is {first}; use one kind")
            yield where, read(row, self.form, where)

    @property
    def unused(self) -> dict[str, int]:
        """The columns that are not used, each with the number of rows that have a value in it."""
        used = set(self.form.values())
        return {name: count for name, count in self.raw.columns().items() if name not in used and count}

    def _kind_of(self, row: Row) -> str | None:
        prompt = row.get(self.form["prompt"]) if "prompt" in self.form else None
        return None if prompt is None else "text" if isinstance(prompt, str) else "messages"


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
        UserError: the data set does not exist, is empty, cannot be read, or has an unknown form or one of another kind;
            or it is streamed, and nothing limits the number of its rows.
    """
    if spec.streaming and spec.max_samples is None:
        raise UserError(
            f"{spec.path}: streaming: only training goes through rows without an end; here limit them by max_samples"
        )
    raw = read_raw(spec)
    form = pick_form(spec, list(raw.columns()), kinds)
    place, first = next(iter(raw))
    if "completion" in form and "label" not in form and isinstance(first.get("label"), bool):
        raise UserError(
            f"{place}: has a label, true or false, so some completions are not to be learnt; only method kto "
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
    """Read and tokenise a data set, or take its tokens from the cache; large ones are mapped from there into memory.

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
    now, length, raw = now or datetime.now(), spec.max_length or max_length, open_raw(spec)
    contents = None if raw.files is None else contents_of(raw.files)

    def write(path: Path | None) -> Stored:
        rows = load_rows(spec, kinds)
        stored = _write(rows, Pieces(tokenizer, length, vocabulary, chats=rows.chats), path)
        if raw.files is not None and contents_of(raw.files) != contents:
            raise UserError(f"{spec.path}: it changed while it was read; start again")
        return stored

    with clock_at(now) as written:
        if contents is None:
            stored = write(None)
        else:
            key = key_of(spec, contents, tokenizer, length, vocabulary, kinds)
            stored = find(key, now) or store(spec.path, key, write, written)
    return _tokens(stored, spec.path, length)


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
    return _tokens(_write(rows, Pieces(tokenizer, max_length, vocabulary, chats=rows.chats)), rows.raw.name, max_length)


class Pieces:
    """Examples -> token ids and labels, cut to a length, and what became of them.

    Args:
        tokenizer: a tokenizer of transformers.
        max_length, vocabulary: as for `tokenize`.
        chats: as for `Encoder`.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", max_length: int, vocabulary: int | None, *, chats: bool
    ) -> None:
        self.encoder = Encoder(tokenizer, chats=chats)
        self.max_length, self.vocabulary = max_length, vocabulary
        self.truncated = self.skipped = 0

    def of(self, row: _Row | None, where: str) -> Iterator[dict[str, Any]]:
        """Yield the pieces of a row, by columns, each of whose answers has a token in the loss.

        Raises:
            UserError: as in `tokenize`.
        """
        for answers in [{"": ([], [])}] if row is None else self._encode(row, where):
            columns: dict[str, Any] = {}
            for prefix, (ids, labels) in answers.items():
                if self.vocabulary is not None:
                    check_tokens(ids, self.vocabulary, self.encoder.tokenizer, where)
                columns[f"{prefix}input_ids"] = ids[: self.max_length]
                columns[f"{prefix}labels"] = labels[: self.max_length]
            self.truncated += any(len(ids) > self.max_length for ids, _ in answers.values())
            if all(_has_loss(columns[f"{prefix}labels"]) for prefix in answers):
                yield {**columns, DESIRABLE: row.desirable} if isinstance(row, Labelled) else columns
            else:
                self.skipped += 1

    def _encode(self, row: _Row, where: str) -> Iterator[Mapping[str, Encoded]]:
        """Yield the pieces of a row, as `Encoder.encode` does: what an answer's columns begin with -> its tokens."""
        if isinstance(row, Pair):
            answers = {"": row.chosen, REJECTED: row.rejected}
            yield {
                prefix: next(self.encoder.encode(answer, self.max_length, where)) for prefix, answer in answers.items()
            }
        else:
            answer = row.answer if isinstance(row, Labelled) else row
            yield from ({"": encoded} for encoded in self.encoder.encode(answer, self.max_length, where))


def _has_loss(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])  # the first token is never predicted


def _write(rows: Rows, pieces: Pieces, path: Path | None = None) -> Stored:
    """Tokenise rows, a row at a time, into a file or into memory.

    Raises:
        UserError: as in `tokenize`.
    """
    placed = rows.placed() if len(rows) <= _SLOW_ROWS else track(rows.placed(), "Tokenizing", len(rows))
    every = ({**piece, "source": index} for index, (where, row) in enumerate(placed) for piece in pieces.of(row, where))
    written = write_rows(every, (*rows.columns, "source"), path)
    if not len(written):
        remedy = (
            f" within max_length {pieces.max_length}; make it longer"
            if pieces.truncated
            else ": they are empty, or nobody answers"
        )
        raise UserError(f"{rows.raw.name}: no token of any row is in the loss{remedy}")
    facts = {
        "truncated": pieces.truncated,
        "skipped": pieces.skipped,
        "columns": dict(rows.form),
        "unused": {**rows.unused, **pieces.encoder.unused},
        "templated": "text" not in rows.form and pieces.encoder.chats,
    }
    return Stored(rows=written, facts=facts)


def _tokens(stored: Stored, name: str, max_length: int) -> Tokens:
    """Return tokens as everybody reads them, and say what was not used, cut or skipped."""
    tokens = Tokens(rows=stored.rows.remove_columns("source"), sources=stored.rows["source"], **stored.facts)
    if tokens.unused:
        named = ", ".join(f"{key} ({count} rows)" for key, count in tokens.unused.items())
        logger.info("%s: not used: %s", name, named)
    if tokens.truncated or tokens.skipped:
        logger.warning(
            "%s: of %d rows, max_length %d cut %d, and %d were skipped because %s",
            name,
            len(tokens.rows) + tokens.skipped,
            max_length,
            tokens.truncated,
            tokens.skipped,
            "an answer had no token in the loss, or both were the same"
            if len(tokens.answers) > 1
            else "they had no token in the loss",
        )
    return tokens


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
