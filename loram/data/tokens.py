"""Files or hub names -> rows of messages, prompt-completion or text -> token ids with the loss mask in `labels`."""

import contextlib
import csv
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets import Dataset
from jinja2 import TemplateError

from loram.base.errors import UserError
from loram.data.batches import IGNORED
from loram.data.spec import DataSpec

logger = logging.getLogger(__name__)

_SLOW_ROWS = 5_000
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_LONGEST_FIELD = 2**31 - 1  # Python's csv refuses fields above 128 KiB unless told
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row]]  # with the line of the file that a row begins on, where that can be said


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenised rows: `rows` has the columns input_ids and labels (lists of int, equally long).

    `truncated` rows lost their end to `max_length`; `skipped` ones had no token left in the loss and are not in `rows`.
    """

    rows: Dataset
    truncated: int
    skipped: int


def load_rows(spec: DataSpec) -> Dataset:
    """Read a data set into rows of one form: `messages`, `prompt` and `completion`, or `text`.

    The forms are those of TRL. An `instruction`/`input`/`output` or `question`/`answer` data set becomes
    prompt-completion; a .txt file is one text.

    Raises:
        UserError: no such data set, a row cannot be read (names file and line), it is empty, or its form is unknown.
    """
    return _load(spec)[0]


def load_tokens(spec: DataSpec, tokenizer: Any, max_length: int, *, vocabulary: int) -> Tokens:
    """Read and tokenise a data set, as every stage does it; what cannot be used is named by file and line.

    Args:
        spec: which data set; its own `max_length` wins.
        tokenizer: of the model.
        max_length: see `tokenize`.
        vocabulary: how many rows the model's embedding has; a token beyond it is refused.

    Raises:
        UserError: as `load_rows` and `tokenize`, or the tokenizer does not fit the model.
    """
    # Without added tokens: Gemma 3 has one beyond its embedding, which no text needs.
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer knows {tokenizer.vocab_size:,} tokens, but the model's embedding "
            f"has only {vocabulary:,} rows: it does not fit the model; use the tokenizer that came with it"
        )
    rows, lines = _load(spec)
    length = spec.max_length or max_length
    return tokenize(rows, tokenizer, length, name=spec.path, lines=lines, vocabulary=vocabulary)


def _load(spec: DataSpec) -> tuple[Dataset, list[int] | None]:
    """Rows as `load_rows` gives them, and the line each begins on, where the file has lines."""
    raw, lines = _read(spec)
    if not len(raw):
        raise UserError(f"{spec.path}: the data set is empty")
    if isinstance(raw, Dataset):
        form = _form(spec, raw.column_names)
        with _bar_if_slow(len(raw)):
            return raw.map(
                lambda row, index: _normalise(row, form, _where(spec.path, index)),
                with_indices=True,
                remove_columns=raw.column_names,
                load_from_cache_file=False,  # the cache's key does not know this module's code
                desc="Reading rows",
            ), None
    form = _form(spec, list(dict.fromkeys(column for row in raw for column in row)))
    rows = [_normalise(row, form, _where(spec.path, index, lines)) for index, row in enumerate(raw)]
    _check_alike(rows, spec.path, lines)
    return Dataset.from_list(rows), lines


def _where(name: str, index: int, lines: Sequence[int] | None = None) -> str:
    """`rows.jsonl:7` where rows have lines, else `rows.parquet: row 7`."""
    return f"{name}: row {index + 1}" if lines is None else f"{name}:{lines[index]}"


@contextlib.contextmanager
def _bar_if_slow(rows: int) -> Iterator[None]:
    """The progress bars of `datasets` only for work that takes a while."""
    if rows > _SLOW_ROWS or not datasets.is_progress_bar_enabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _read(spec: DataSpec) -> tuple[Dataset | list[Row], list[int] | None]:
    """The raw rows and their lines: text formats as Python reads them; `datasets` would guess dates and numbers."""
    path = Path(spec.path).expanduser()
    if not path.exists():
        return _first(_read_hub(spec), spec), None
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a data file in it")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: unknown kind of data file; known are {', '.join(_SUFFIXES)}")
    for option in ("config", "split"):
        if (value := getattr(spec, option)) is not None:
            raise UserError(f"{path}: {option} {value!r} is of hub data sets, and this is a file; leave it out")
    try:
        if path.suffix == ".parquet":
            return _first(_read_parquet(path), spec), None
        # utf-8-sig: what Excel writes begins with a byte order mark
        with path.open(encoding="utf-8-sig", newline="" if path.suffix in _DELIMITERS else None) as handle:
            parse, has_lines = _parser(handle, path)
            numbered = list(islice(parse, spec.max_samples))
            return [row for _, row in numbered], [line for line, _ in numbered] if has_lines else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text: {error}; save it in UTF-8") from error


def _first(rows: Dataset, spec: DataSpec) -> Dataset:
    return rows if spec.max_samples is None else rows.select(range(min(spec.max_samples, len(rows))))


def _read_parquet(path: Path) -> Dataset:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the data set is empty")
    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # datasets wraps whatever its readers raise
        raise UserError(f"{path}: cannot be read as parquet: {_reason(error.__cause__ or error)}") from error


def _parser(handle: TextIO, path: Path) -> tuple[Numbered, bool]:
    """The rows of a file, and whether they are numbered by its lines."""
    if path.suffix in _DELIMITERS:
        return _parse_csv(handle, path, _DELIMITERS[path.suffix]), True
    if path.suffix == ".jsonl":
        return _parse_json_lines(handle, path), True
    text = handle.read()
    if path.suffix == ".txt":
        return iter([(1, {"text": text})] if text.strip() else []), True
    if text.lstrip().startswith("["):
        return _parse_json_list(text, path), False
    return _parse_json_lines(text.split("\n"), path), True  # many a .json file is JSON lines


def _parse_json_list(text: str, path: Path) -> Numbered:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as json: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is not a JSON object")
        yield number, row


def _parse_json_lines(lines: Iterable[str], path: Path) -> Numbered:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: this row is not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: this row is not a JSON object")
        yield number, row


def _parse_csv(handle: TextIO, path: Path, delimiter: str) -> Numbered:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(handle, delimiter=delimiter, strict=True)
    columns: list[str] = []
    line = 1  # where the next row begins; it may have several
    try:
        for fields in reader:
            if fields and not columns:
                columns = fields
                if twice := next((column for column in columns if columns.count(column) > 1), None):
                    raise UserError(f"{path}: column {twice!r} stands twice")
            elif len(fields) > len(columns):
                raise UserError(f"{path}:{line}: this row has more fields than there are columns; quote them")
            elif fields:
                yield line, dict(zip_longest(columns, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: cannot be read as {path.suffix[1:]}: {error}") from error


def _read_hub(spec: DataSpec) -> Dataset:
    if Path(spec.path).suffix in _SUFFIXES or spec.path.startswith((".", "/", "~")):
        raise UserError(f"{spec.path}: no such file")
    try:
        return datasets.load_dataset(spec.path, spec.config, split=spec.split or "train")
    except Exception as error:  # the hub, the network and the builders raise all kinds
        raise UserError(f"{spec.path}: no such file, and not a data set the hub gave: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _form(spec: DataSpec, columns: list[str]) -> dict[str, str]:
    """Which of the file's columns hold what: the named ones, else the first known form that is all there."""
    if spec.columns:
        for ours, theirs in spec.columns.items():
            if theirs not in columns:
                raise UserError(f"{spec.path}: no column {theirs!r} for {ours}; there are {', '.join(columns)}")
        if set(spec.columns) not in ({"messages"}, {"text"}, {"prompt", "completion"}):
            raise UserError(f"{spec.path}: name the columns of messages, of text, or of both prompt and completion")
        return {str(ours): theirs for ours, theirs in spec.columns.items()}
    known = (
        {"messages": "messages"},
        {"messages": "conversations"},
        {"prompt": "prompt", "completion": "completion"},
        {"instruction": "instruction", "input": "input", "output": "output"},
        {"instruction": "instruction", "output": "output"},
        {"question": "question", "answer": "answer"},
        {"text": "text"},
    )
    for form in known:
        if set(form.values()) <= set(columns):
            return form
    raise UserError(
        f"{spec.path}: cannot tell which columns to use from {', '.join(columns) or 'none'}; expected messages, prompt "
        "and completion, instruction and output, question and answer, or text; or name them, as in prompt=COLUMN"
    )


def _normalise(row: Row, form: Mapping[str, str], where: str) -> Row:
    values: Row = {ours: row.get(theirs) for ours, theirs in form.items()}
    if "input" in values:
        values["input"] = values["input"] or ""  # the one that may be missing
    for ours, value in values.items():
        name = repr(form[ours])
        if ours == "messages" or (ours in ("prompt", "completion") and isinstance(value, list)):
            values[ours] = _messages(value, name, where)
        elif ours != "input" and not value:
            raise UserError(f"{where}: {name} is {value!r}, where text is needed")
        elif not isinstance(value, str):
            raise UserError(f"{where}: {name} should be text, but is {value!r}")
        else:
            _check_text(value, name, where)
    if "question" in values:
        return _turn(f"Question: {values['question']}\nAnswer:", values["question"], values["answer"])
    if "instruction" in values:
        return _instruction(values)
    if "prompt" in values and isinstance(values["prompt"], str) != isinstance(values["completion"], str):
        raise UserError(f"{where}: prompt and completion should both be text or both be messages")
    return values


def _messages(value: Any, name: str, where: str) -> list[Row]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name} should be a list of messages, but is {value!r}")
    return [_message(message, where) for message in value]


def _message(message: Any, where: str) -> Row:
    known = message if isinstance(message, dict) else {}
    role = known.get("role") or known.get("from")
    content = known.get("content") if "content" in known else known.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{where}: a message needs a role and a content, but this is {message!r}")
    _check_text(role + content, "a message", where)
    return {"role": _ROLES.get(role, role), "content": content}


def _check_text(text: str, name: str, where: str) -> None:
    """JSON can write half a character (\\ud83d alone), which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name} is not valid text: {error}") from error


def _check_alike(rows: list[Row], path: str, lines: list[int] | None) -> None:
    """Chats and plain text do not mix in one column."""
    kinds = [isinstance(row.get("prompt"), str) for row in rows]
    if len(set(kinds)) > 1:
        first, other = ("text", "messages") if kinds[0] else ("messages", "text")
        where = _where(path, kinds.index(not kinds[0]), lines)
        raise UserError(f"{where}: the prompt is {other}, but above it is {first}; use one kind")


def _turn(plain: str, user: str, answer: str) -> Row:
    """A prompt-completion row, both as a chat and as plain text; the tokenizer decides which is used."""
    chat = {"prompt": [{"role": "user", "content": user}], "completion": [{"role": "assistant", "content": answer}]}
    return {**chat, "plain_prompt": plain, "plain_completion": f" {answer}"}


def _instruction(values: Row) -> Row:
    instruction, extra = values["instruction"], values.get("input", "")
    plain = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{extra}\n\n" if extra else "") + "### Response:"
    return _turn(plain, f"{instruction}\n\n{extra}" if extra else instruction, values["output"])


def tokenize(
    rows: Dataset,
    tokenizer: Any,
    max_length: int,
    *,
    name: str = "data set",
    lines: Sequence[int] | None = None,
    vocabulary: int | None = None,
) -> Tokens:
    """Token ids and labels of rows from `load_rows`; training and evaluation share this, so they see the same tokens.

    Chats go through the tokenizer's chat template, and every assistant turn (of a prompt-completion row only the
    completion) is in the loss; of a plain prompt-completion row the completion and an end-of-sequence token are; of a
    text all tokens are, and a long text is cut into pieces of `max_length`. Question-answer and instruction rows are
    chats where the tokenizer has a template, else plain.

    Args:
        rows: as `load_rows` gives them.
        tokenizer: a transformers tokenizer.
        max_length: in tokens; longer rows lose their end (counted), rows left without loss are skipped (counted).
        name: what error messages call the data set.
        lines: the line of the file that each row begins on, for the messages.
        vocabulary: how many tokens the model knows; None does not check.

    Raises:
        UserError: a row needs a chat template or an end-of-sequence token that the tokenizer lacks, or has a token that
            the model does not know, or no row has a token left in the loss.
    """

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"input_ids": [], "labels": [], "truncated": []}
        for position, index in enumerate(indices):
            row = {key: column[position] for key, column in batch.items()}
            where = _where(name, index, lines)
            for ids, labels in _encode(row, tokenizer, max_length, where):
                if vocabulary is not None:
                    _check_known(ids, vocabulary, tokenizer, where)
                out["input_ids"].append(ids[:max_length])
                out["labels"].append(labels[:max_length])
                out["truncated"].append(len(ids) > max_length)
        return out

    with _bar_if_slow(len(rows)):
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
            "%s: %d of %d rows cut to max_length %d, %d skipped for having no loss left",
            name,
            truncated,
            len(encoded),
            max_length,
            skipped,
        )
    return Tokens(rows=kept, truncated=truncated, skipped=skipped)


def _check_known(ids: list[int], vocabulary: int, tokenizer: Any, where: str) -> None:
    if (token := max(ids, default=0)) >= vocabulary:
        raise UserError(
            f"{where}: the tokenizer gives token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but the model's "
            f"embedding has only {vocabulary:,} rows: it does not fit the model; use the tokenizer that came with it"
        )


def _has_loss(row: Row) -> bool:
    return any(label != IGNORED for label in row["labels"][1:])  # the first token is never predicted


def _encode(row: Row, tokenizer: Any, max_length: int, where: str) -> Iterator[tuple[list[int], list[int]]]:
    """(input_ids, labels) of one row, or of each piece of a text."""
    if "text" in row:
        ids = [*tokenizer(row["text"])["input_ids"], _end_token(tokenizer, where)]
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            yield piece, list(piece)
        return
    if "plain_prompt" in row and tokenizer.chat_template is None:
        row = {"prompt": row["plain_prompt"], "completion": row["plain_completion"]}
    if isinstance(row.get("prompt"), str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], _end_token(tokenizer, where)]
        start = _common_prefix(prompt, ids)
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


def _end_token(tokenizer: Any, where: str) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: plain text ends in the tokenizer's end-of-sequence token, but it names none")
    return int(tokenizer.eos_token_id)


def _encode_chat(messages: list[Row], first: int, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of a chat; the assistant turns from message `first` on are in the loss."""
    full = _template(tokenizer, messages)
    labels = [IGNORED] * len(full)
    for turn in range(first, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:turn], add_generation_prompt=True) if turn else []
        start = _common_prefix(before, full)
        end = _end_of(messages, turn, full, start, tokenizer)
        labels[start:end] = full[start:end]
    return full, labels


def _template(tokenizer: Any, messages: list[Row], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def _common_prefix(short: list[int], long: list[int]) -> int:
    """Length of the common beginning: tokens may merge across the end of a prompt."""
    return next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long)))


def _end_of(messages: list[Row], turn: int, full: list[int], start: int, tokenizer: Any) -> int:
    """Where in `full`, the ids of the whole chat, a turn ends that begins at `start`: behind its end-of-turn token.

    That is where the chat up to this turn ends, unless the template writes a last turn differently: Qwen3's puts an
    empty thought before it, and the two part at `start`. Then another full stop in the turn shows what follows it,
    `<|im_end|>` in the short chat, `<|im_end|>` and all the rest in the whole one.
    """
    short = _template(tokenizer, messages[: turn + 1])
    if (end := _common_prefix(short, full)) > start:
        return end
    changed = [*messages[:turn], {**messages[turn], "content": messages[turn]["content"] + "."}]
    tail = _common_prefix(short[::-1], _template(tokenizer, changed)[::-1])
    tail_and_rest = _common_prefix(full[::-1], _template(tokenizer, changed + messages[turn + 1 :])[::-1])
    return len(full) - tail_and_rest + tail
