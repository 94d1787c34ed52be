"""Raw rows -> rows of one form: `messages`, `prompt` and `completion`, or `text`, as TRL calls them.

A question-answer or instruction row becomes a prompt and a completion in two versions, as a chat and as plain text.
Which version is used is decided later by whether the tokenizer has a chat template.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from loram.base.errors import UserError
from loram.data.reading import Row, location
from loram.data.spec import DataSpec

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# Our name of a column -> the file's name. The first form whose columns are all in the file is taken.
_KNOWN_FORMS: tuple[Mapping[str, str], ...] = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "prompt", "completion": "completion"},
    {"instruction": "instruction", "input": "input", "output": "output"},
    {"instruction": "instruction", "output": "output"},
    {"question": "question", "answer": "answer"},
    {"text": "text"},
)


def pick_form(spec: DataSpec, columns: Sequence[str]) -> Mapping[str, str]:
    """Decide which of a file's columns to use: the ones that the spec names, else those of the first known form.

    Returns:
        Our name of each column -> its name in the file.

    Raises:
        UserError: a named column does not exist, or no form fits.
    """
    if spec.columns:
        for ours, theirs in spec.columns.items():
            if theirs not in columns:
                raise UserError(f"{spec.path}: no column {theirs!r} for {ours}; there are {', '.join(columns)}")
        if set(spec.columns) not in ({"messages"}, {"text"}, {"prompt", "completion"}):
            raise UserError(f"{spec.path}: name the column of messages, or of text, or both prompt and completion")
        return {str(ours): theirs for ours, theirs in spec.columns.items()}
    for form in _KNOWN_FORMS:
        if set(form.values()) <= set(columns):
            return form
    raise UserError(
        f"{spec.path}: cannot tell which columns to use from {', '.join(columns) or 'none'}; expected messages, prompt "
        "and completion, instruction and output, question and answer, or text; or name them, as in prompt=COLUMN"
    )


def normalise(row: Row, form: Mapping[str, str], where: str) -> Row:
    """Bring a raw row into the form that the rest of loram reads.

    Args:
        row: the raw row.
        form: our name of each column -> its name in the row.
        where: the place of the row, for messages.

    Raises:
        UserError: a value is missing, empty, or not of the expected type.
    """
    values: Row = {ours: row.get(theirs) for ours, theirs in form.items()}
    if "input" in values:
        values["input"] = values["input"] or ""  # the only value that may be missing
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
        return _single_turn(f"Question: {values['question']}\nAnswer:", values["question"], values["answer"])
    if "instruction" in values:
        return _instruction(values)
    if "prompt" in values and isinstance(values["prompt"], str) != isinstance(values["completion"], str):
        raise UserError(f"{where}: prompt and completion should both be text or both be messages")
    return values


def check_alike(rows: Sequence[Row], path: str, lines: Sequence[int] | None) -> None:
    """Check that the prompts of all rows are chats, or that all are plain text.

    Raises:
        UserError: the column has both.
    """
    kinds = [isinstance(row.get("prompt"), str) for row in rows]
    if len(set(kinds)) > 1:
        first, other = ("text", "messages") if kinds[0] else ("messages", "text")
        where = location(path, kinds.index(not kinds[0]), lines)
        raise UserError(f"{where}: the prompt is {other}, but above it is {first}; use one kind")


def _messages(value: Any, name: str, where: str) -> list[Row]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name} should be a list of messages, but is {value!r}")
    return [_message(message, where) for message in value]


def _message(message: Any, where: str) -> Row:
    fields = message if isinstance(message, dict) else {}
    role = fields.get("role") or fields.get("from")
    content = fields.get("content") if "content" in fields else fields.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{where}: a message needs a role and a content, but this is {message!r}")
    _check_text(role + content, "a message", where)
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": content}


def _check_text(text: str, name: str, where: str) -> None:
    r"""Refuse half a character, such as \ud83d alone: JSON can write it, but no tokenizer and no file accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name} is not valid text: {error}") from error


def _single_turn(plain: str, user: str, answer: str) -> Row:
    """Make a prompt-completion row that is both a chat and plain text."""
    chat = {"prompt": [{"role": "user", "content": user}], "completion": [{"role": "assistant", "content": answer}]}
    return {**chat, "plain_prompt": plain, "plain_completion": f" {answer}"}


def _instruction(values: Row) -> Row:
    instruction, extra = values["instruction"], values.get("input", "")
    plain = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{extra}\n\n" if extra else "") + "### Response:"
    return _single_turn(plain, f"{instruction}\n\n{extra}" if extra else instruction, values["output"])
