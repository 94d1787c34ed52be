"""Rows of a data set -> token ids, with the loss mask in `labels`. Every stage reads its text through this module."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from jinja2 import TemplateError

from loram.base.errors import UserError
from loram.data.batches import IGNORED
from loram.data.clock import clock_at
from loram.data.forms import check_alike, normalise, pick_form
from loram.data.reading import Row, bars_if_slow, location, read_raw
from loram.data.spec import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenised rows.

    Args:
        rows: the columns `input_ids` and `labels`, lists of int of the same length; labels are -100 where a token is
            not in the loss.
        truncated: how many rows lost their end to `max_length`.
        skipped: how many rows had no token left in the loss; they are not in `rows`.
    """

    rows: Dataset
    truncated: int
    skipped: int


def load_rows(spec: DataSpec) -> Dataset:
    """Read a data set into rows of one form: `messages`, `prompt` and `completion`, or `text`, as TRL calls them.

    A data set with the columns `instruction`, `input` and `output`, or `question` and `answer`, becomes
    prompt-completion; a .txt file is one text.

    Raises:
        UserError: the data set does not exist, is empty, or has an unknown form; or a row cannot be read, and the
            message names its file and line.
    """
    return _load(spec)[0]


def load_tokens(
    spec: DataSpec,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    vocabulary: int,
    now: datetime | None = None,
) -> Tokens:
    """Read and tokenise a data set.

    Args:
        spec: the data set; if it has a `max_length` of its own, that one counts.
        tokenizer: the tokenizer of the model.
        max_length: the limit in tokens, as in `tokenize`.
        vocabulary: how many rows the model's embedding has; a token beyond it is refused.
        now: the time for chat templates that write one; None is the time of this call.

    Raises:
        UserError: as in `load_rows` and `tokenize`, or the tokenizer does not fit the model.
    """
    # The size without added tokens: Gemma 3 has an added token beyond its embedding, which no text needs.
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer knows {tokenizer.vocab_size:,} tokens, but the model's embedding "
            f"has only {vocabulary:,} rows: it does not fit the model; use the tokenizer that came with it"
        )
    rows, lines = _load(spec)
    length = spec.max_length or max_length
    with clock_at(now or datetime.now()):
        return tokenize(rows, tokenizer, length, name=spec.path, lines=lines, vocabulary=vocabulary)


def _load(spec: DataSpec) -> tuple[Dataset, list[int] | None]:
    """Return the rows, as `load_rows` does, and the line that each begins on, if the file has lines."""
    raw, lines = read_raw(spec)
    if not len(raw):
        raise UserError(f"{spec.path}: the data set is empty")
    if isinstance(raw, Dataset):
        form = pick_form(spec, raw.column_names)
        with bars_if_slow(len(raw)):
            return raw.map(
                lambda row, index: normalise(row, form, location(spec.path, index)),
                with_indices=True,
                remove_columns=raw.column_names,
                load_from_cache_file=False,  # the cache would not notice a change of our code
                desc="Reading rows",
            ), None
    form = pick_form(spec, list(dict.fromkeys(column for row in raw for column in row)))
    rows = [normalise(row, form, location(spec.path, index, lines)) for index, row in enumerate(raw)]
    check_alike(rows, spec.path, lines)
    return Dataset.from_list(rows), lines


def tokenize(
    rows: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    name: str = "data set",
    lines: Sequence[int] | None = None,
    vocabulary: int | None = None,
) -> Tokens:
    """Turn rows from `load_rows` into token ids and labels. Training and evaluation share this function.

    - A chat goes through the tokenizer's chat template. Every assistant turn is in the loss; in a prompt-completion row
      only the completion is.
    - In a plain prompt-completion row the completion and the end-of-sequence token after it are in the loss.
    - In a text all tokens are in the loss, and a long text is cut into pieces of `max_length` tokens.
    - Question-answer and instruction rows are chats if the tokenizer has a chat template, and plain text otherwise.

    Args:
        rows: rows as `load_rows` returns them.
        tokenizer: a tokenizer of transformers.
        max_length: the limit in tokens. Longer rows lose their end, and rows that then have no token in the loss are
            skipped; both are counted.
        name: the name of the data set in error messages.
        lines: the line of the file that each row begins on, for error messages.
        vocabulary: how many tokens the model knows; None skips this check.

    Raises:
        UserError: a row needs a chat template or an end-of-sequence token and the tokenizer has none, or has a token
            that the model does not know, or no row has a token in the loss.
    """

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "truncated": []}
        for position, index in enumerate(indices):
            row = {key: column[position] for key, column in batch.items()}
            where = location(name, index, lines)
            for ids, labels in _encode(row, tokenizer, max_length, where):
                if vocabulary is not None:
                    _check_vocabulary(ids, vocabulary, tokenizer, where)
                columns["input_ids"].append(ids[:max_length])
                columns["labels"].append(labels[:max_length])
                columns["truncated"].append(len(ids) > max_length)
        return columns

    with bars_if_slow(len(rows)):
        encoded = rows.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            desc="Tokenizing",
            load_from_cache_file=False,
        )
        kept = encoded.remove_columns("truncated").filter(
            _has_loss, desc="Dropping rows without loss", load_from_cache_file=False
        )
    truncated = sum(encoded["truncated"])
    skipped = len(encoded) - len(kept)
    if not len(kept):
        raise UserError(f"{name}: no token of any row is in the loss within max_length {max_length}; make it longer")
    if truncated or skipped:
        logger.warning(
            "%s: of %d rows, max_length %d cut %d, and %d were skipped because they had no token in the loss",
            name,
            len(encoded),
            max_length,
            truncated,
            skipped,
        )
    return Tokens(rows=kept, truncated=truncated, skipped=skipped)


def _check_vocabulary(ids: list[int], vocabulary: int, tokenizer: "PreTrainedTokenizerBase", where: str) -> None:
    if (token := max(ids, default=0)) >= vocabulary:
        raise UserError(
            f"{where}: the tokenizer gives token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but the model's "
            f"embedding has only {vocabulary:,} rows: it does not fit the model; use the tokenizer that came with it"
        )


def _has_loss(row: Row) -> bool:
    return any(label != IGNORED for label in row["labels"][1:])  # the first token is never predicted


def _encode(
    row: Row, tokenizer: "PreTrainedTokenizerBase", max_length: int, where: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the (input_ids, labels) of a row; a long text gives several pieces."""
    if "text" in row:
        ids = [*_ids(tokenizer, row["text"]), _end_token(tokenizer, where)]
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            yield piece, list(piece)
        return
    if "plain_prompt" in row and tokenizer.chat_template is None:
        row = {"prompt": row["plain_prompt"], "completion": row["plain_completion"]}
    if isinstance(row.get("prompt"), str):
        ids = [*_ids(tokenizer, row["prompt"] + row["completion"]), _end_token(tokenizer, where)]
        start = _common_prefix(_ids(tokenizer, row["prompt"]), ids)
        yield ids, [IGNORED] * start + ids[start:]
        return
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: this row is a chat, but the tokenizer has no chat template; use prompt and completion"
        )
    messages, first = row.get("messages"), 0
    if messages is None:
        messages, first = row["prompt"] + row["completion"], len(row["prompt"])
    try:
        yield _encode_chat(messages, first, tokenizer)
    except TemplateError as error:
        raise UserError(f"{where}: the tokenizer's chat template refuses this chat: {error}") from error


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _end_token(tokenizer: "PreTrainedTokenizerBase", where: str) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: plain text ends with the end-of-sequence token, but the tokenizer names none")
    return int(tokenizer.eos_token_id)


def _encode_chat(messages: list[Row], first: int, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the ids and labels of a chat. The assistant turns from message `first` on are in the loss."""
    full = _template_ids(tokenizer, messages)
    labels = [IGNORED] * len(full)
    for turn in range(first, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        before = _template_ids(tokenizer, messages[:turn], add_generation_prompt=True) if turn else []
        start = _common_prefix(before, full)
        end = _end_of_turn(messages, turn, full, start, tokenizer)
        labels[start:end] = full[start:end]
    return full, labels


def _template_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Row], *, add_generation_prompt: bool = False
) -> list[int]:
    # Any: the declared type also covers calls that return text or a bare list of ids
    encoding: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )
    return list(encoding["input_ids"])


def _common_prefix(short: list[int], long: list[int]) -> int:
    """Return how many tokens two lists share at their beginning: tokens may merge across the end of a prompt."""
    return next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long)))


def _end_of_turn(
    messages: list[Row], turn: int, full: list[int], start: int, tokenizer: "PreTrainedTokenizerBase"
) -> int:
    """Return where a turn ends, behind its end-of-turn token, in the ids `full` of the whole chat.

    Usually this is where the chat that stops after this turn ends. But a template may write the last turn of a chat
    differently: Qwen3 puts an empty thought before it, so that the short and the whole chat differ from `start` on. In
    that case a full stop is added to the turn, and the ids that do not change show what follows the turn: `<|im_end|>`
    in the short chat, and `<|im_end|>` and the rest of the chat in the whole one.
    """
    short = _template_ids(tokenizer, messages[: turn + 1])
    if (end := _common_prefix(short, full)) > start:
        return end
    changed = [*messages[:turn], {**messages[turn], "content": messages[turn]["content"] + "."}]
    tail = _common_prefix(short[::-1], _template_ids(tokenizer, changed)[::-1])
    tail_and_rest = _common_prefix(full[::-1], _template_ids(tokenizer, changed + messages[turn + 1 :])[::-1])
    return len(full) - tail_and_rest + tail
