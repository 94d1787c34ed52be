"""Files or hub names -> rows of messages, prompt-completion or text -> token ids with the loss mask in `labels`."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from jinja2 import TemplateError

from loram.data_spec import DataSpec
from loram.errors import UserError

logger = logging.getLogger(__name__)

_SLOW_ROWS = 5_000
IGNORED = -100  # the label of a token that is not in the loss
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
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
    if spec.max_samples is not None:
        raw = raw.select(range(min(spec.max_samples, len(raw))))
    if not len(raw):
        raise UserError(f"{spec.path}: the data set is empty")
    form = _form(spec, raw.column_names)
    with _bar_if_slow(len(raw)):
        return raw.map(
            lambda row, index: _normalise(row, index, form, spec.path),
            with_indices=True,
            remove_columns=raw.column_names,
            desc="Reading rows",
        )


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


def _read(spec: DataSpec) -> Dataset:
    path = Path(spec.path).expanduser()
    if path.suffix == ".txt" and path.is_file():
        text = path.read_text(encoding="utf-8")
        return Dataset.from_dict({"text": [text] if text.strip() else []})
    if not path.exists():
        return _read_hub(spec)
    if path.suffix not in _FORMATS:
        raise UserError(f"{path}: unknown kind of data file; known are {', '.join([*_FORMATS, '.txt'])}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the data set is empty")
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # datasets wraps whatever its readers raise
        _name_bad_line(path)
        cause = error.__cause__ or error
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {str(cause).splitlines()[0]}") from error


def _name_bad_line(path: Path) -> None:
    """Say which line of a JSON-lines file is at fault, if one is."""
    if path.suffix != ".jsonl":
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise UserError(f"{path}:{number}: this row is not a JSON object")
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: this row is not valid JSON ({error})") from error


def _read_hub(spec: DataSpec) -> Dataset:
    if ("/" in spec.path and Path(spec.path).suffix in {*_FORMATS, ".txt"}) or spec.path.startswith((".", "/", "~")):
        raise UserError(f"{spec.path}: no such file")
    try:
        return datasets.load_dataset(spec.path, spec.config, split=spec.split or "train")
    except Exception as error:  # the hub, the network and the builders raise all kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{spec.path}: no such file, and not a data set the hub gave: {reason}") from error


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
        f"{spec.path}: cannot tell which columns to use from {', '.join(columns)}; expected messages, prompt and "
        "completion, instruction and output, question and answer, or text; or name them, as in prompt=COLUMN"
    )


def _normalise(row: Row, index: int, form: Mapping[str, str], path: str) -> Row:
    values = {ours: row[theirs] for ours, theirs in form.items()}
    for ours, value in values.items():
        if ours == "input":
            values["input"] = value or ""
        elif not value:
            raise UserError(f"{path}: row {index + 1}: {form[ours]!r} is {value!r}, where text is needed")
        elif not isinstance(value, str) and ours not in ("messages", "prompt", "completion"):
            raise UserError(f"{path}: row {index + 1}: {form[ours]!r} should be text, but is {value!r}")
    if "question" in values:
        return _turn(f"Question: {values['question']}\nAnswer:", values["question"], values["answer"])
    if "instruction" in values:
        return _instruction(values)
    return {
        key: [_message(message, index, path) for message in value] if isinstance(value, list) else value
        for key, value in values.items()
    }


def _message(message: Row, index: int, path: str) -> Row:
    role = message.get("role") or message.get("from")
    content = message.get("content") if "content" in message else message.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{path}: row {index + 1}: a message needs a role and a content, but this is {message!r}")
    return {"role": _ROLES.get(role, role), "content": content}


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
        UserError: a chat needs a template the tokenizer lacks, or no row has a token left in the loss.
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
        encoded = rows.map(encode, batched=True, with_indices=True, remove_columns=rows.column_names, desc="Tokenizing")
        kept = encoded.remove_columns("truncated").filter(_has_loss, desc="Dropping rows without loss")
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
        ids = tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id]
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            yield piece, list(piece)
        return
    if "plain_prompt" in row and tokenizer.chat_template is None:
        row = {"prompt": row["plain_prompt"], "completion": row["plain_completion"]}
    if isinstance(row.get("prompt"), str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
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


def _encode_chat(messages: list[Row], first: int, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of a chat; the assistant turns from message `first` on are in the loss."""
    full = _template(tokenizer, messages)
    labels = [IGNORED] * len(full)
    for turn in range(first, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:turn], add_generation_prompt=True) if turn else []
        start = _common_prefix(before, full)
        end = _common_prefix(_template(tokenizer, messages[: turn + 1]), full)
        labels[start:end] = full[start:end]
    return full, labels


def _template(tokenizer: Any, messages: list[Row], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def _common_prefix(short: list[int], long: list[int]) -> int:
    """Length of the common beginning: tokens may merge across the end of a prompt."""
    return next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long)))
