"""Files or hub names -> rows of messages, prompt-completion or text -> token ids with the loss mask in `labels`."""

import contextlib
import csv
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets import Dataset
from jinja2 import TemplateError

from loram.data_spec import DataSpec
from loram.errors import UserError
from loram.model.batches import IGNORED

logger = logging.getLogger(__name__)

_SLOW_ROWS = 5_000
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_LONGEST_FIELD = 2**31 - 1  # Python's csv refuses fields above 128 KiB unless told
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names

Row = dict[str, Any]


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
    raw = _read(spec)
    if not len(raw):
        raise UserError(f"{spec.path}: the data set is empty")
    if isinstance(raw, Dataset):
        form = _form(spec, raw.column_names)
        with _bar_if_slow(len(raw)):
            return raw.map(
                lambda row, index: _normalise(row, index, form, spec.path),
                with_indices=True,
                remove_columns=raw.column_names,
                load_from_cache_file=False,  # the cache's key does not know this module's code
                desc="Reading rows",
            )
    form = _form(spec, list(dict.fromkeys(column for row in raw for column in row)))
    rows = [_normalise(row, index, form, spec.path) for index, row in enumerate(raw)]
    _check_alike(rows, spec.path)
    return Dataset.from_list(rows)


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


def _read(spec: DataSpec) -> Dataset | list[Row]:
    """The raw rows: of text formats as Python reads them, since `datasets` guesses dates and numbers out of text."""
    path = Path(spec.path).expanduser()
    if not path.exists():
        return _first(_read_hub(spec), spec)
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a data file in it")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: unknown kind of data file; known are {', '.join(_SUFFIXES)}")
    for option in ("config", "split"):
        if (value := getattr(spec, option)) is not None:
            raise UserError(f"{path}: {option} {value!r} is of hub data sets, and this is a file; leave it out")
    try:
        if path.suffix == ".parquet":
            return _first(_read_parquet(path), spec)
        # utf-8-sig: what Excel writes begins with a byte order mark
        with path.open(encoding="utf-8-sig", newline="" if path.suffix in _DELIMITERS else None) as handle:
            return list(islice(_parse(handle, path), spec.max_samples))
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


def _parse(handle: TextIO, path: Path) -> Iterator[Row]:
    if path.suffix in _DELIMITERS:
        return _parse_csv(handle, path, _DELIMITERS[path.suffix])
    if path.suffix == ".txt":
        text = handle.read()
        return iter([{"text": text}] if text.strip() else [])
    if path.suffix == ".json":
        text = handle.read()
        lines = not text.lstrip().startswith("[")  # many a .json file is JSON lines
        return _parse_json_lines(text.split("\n"), path) if lines else _parse_json_list(text, path)
    return _parse_json_lines(handle, path)


def _parse_json_list(text: str, path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as json: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is not a JSON object")
        yield row


def _parse_json_lines(lines: Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: this row is not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: this row is not a JSON object")
        yield row


def _parse_csv(handle: TextIO, path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.DictReader(handle, delimiter=delimiter, strict=True)
    try:
        columns = rows.fieldnames or []
        if twice := next((column for column in columns if columns.count(column) > 1), None):
            raise UserError(f"{path}: column {twice!r} stands twice")
        for row in rows:
            if None in row:
                raise UserError(f"{path}:{rows.line_num}: this row has more fields than there are columns; quote them")
            yield row
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: after line {rows.line_num}: {error}") from error


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


def _normalise(row: Row, index: int, form: Mapping[str, str], path: str) -> Row:
    where = f"{path}: row {index + 1}"
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


def _check_alike(rows: list[Row], path: str) -> None:
    """Chats and plain text do not mix in one column."""
    kinds = [isinstance(row.get("prompt"), str) for row in rows]
    if len(set(kinds)) > 1:
        first, other = ("text", "messages") if kinds[0] else ("messages", "text")
        odd = kinds.index(not kinds[0]) + 1
        raise UserError(f"{path}: row {odd}: the prompt is {other}, but that of row 1 is {first}; use one kind")


def _turn(plain: str, user: str, answer: str) -> Row:
    """A prompt-completion row, both as a chat and as plain text; the tokenizer decides which is used."""
    chat = {"prompt": [{"role": "user", "content": user}], "completion": [{"role": "assistant", "content": answer}]}
    return {**chat, "plain_prompt": plain, "plain_completion": f" {answer}"}


def _instruction(values: Row) -> Row:
    instruction, extra = values["instruction"], values.get("input", "")
    plain = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{extra}\n\n" if extra else "") + "### Response:"
    return _turn(plain, f"{instruction}\n\n{extra}" if extra else instruction, values["output"])


def tokenize(rows: Dataset, tokenizer: Any, max_length: int, *, name: str = "data set") -> Tokens:
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

    Raises:
        UserError: a row needs a chat template or an end-of-sequence token that the tokenizer lacks, or no row has a
            token left in the loss.
    """

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"input_ids": [], "labels": [], "truncated": []}
        for position, index in enumerate(indices):
            row = {key: column[position] for key, column in batch.items()}
            for ids, labels in _encode(row, tokenizer, max_length, f"{name}: row {index + 1}"):
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
        raise UserError(f"{where} is a chat, but the tokenizer has no chat template; use prompt and completion")
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
