"""What a model is to answer or to continue: prompts from a file, from rows of a data set, or from Python."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram.base.errors import UserError
from loram.data.files import kind_of
from loram.data.forms import Chat, Completion, normalise, pick_form
from loram.data.messages import Message, read_messages
from loram.data.reading import Raw, Row, read_raw
from loram.data.spec import DataSpec

_ASKING = ("messages", "conversations", "conversation", "prompt", "instruction", "question")
_ANSWERING = ("completion", "output", "answer")
_NO_ANSWER = "?"  # in the place of an answer, which a prompt is without


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What comes before an answer.

    Args:
        chat: the messages; where it has a plain form too, the prompt of that.
        where: its place, for messages about errors: `prompts.jsonl:7`.
    """

    chat: Chat
    where: str

    @property
    def content(self) -> str | list[Message]:
        """Return the prompt as an output shows it: its text if it is a single one of a user, else the messages."""
        first, *rest = self.chat.messages
        return list(self.chat.messages) if rest or first["role"] != "user" else str(first["content"])


def prompt_of(chat: Chat, where: str) -> Prompt:
    """Return a chat without the assistant's last turn, where it ends with one.

    Raises:
        UserError: nothing is left.
    """
    messages = list(chat.messages)
    if messages and messages[-1]["role"] == "assistant":
        del messages[-1]
    if not messages:
        raise UserError(f"{where}: there is nothing to answer")
    return Prompt(chat=Chat(messages=messages, turns=(), tools=chat.tools, plain=chat.plain), where=where)


def prompt_from(value: str | Sequence[Message], where: str) -> Prompt:
    """Return a prompt given as text, or as messages.

    Raises:
        UserError: it is empty, or a message cannot be used.
    """
    if not isinstance(value, str):
        messages, _ = read_messages(list(value), "messages", where)
        return prompt_of(Chat(messages=messages, turns=()), where)
    if not value.strip():
        raise UserError(f"{where}: the prompt is empty")
    message = {"role": "user", "content": value}
    return Prompt(chat=Chat(messages=[message], turns=(), plain=Completion(prompt=value, completion="")), where=where)


def read_prompts(spec: DataSpec) -> list[Prompt]:
    """Read the prompts in a data set: one per row, or one per line of a .txt file.

    Rows have a prompt, messages, a question or an instruction, as for training. Their answers may be missing, and are
    not read; messages lose the assistant's turn that they end with.

    Raises:
        UserError: the data set cannot be read, or a row has no prompt; names file and line.
    """
    raw = read_raw(spec)
    if kind_of(Path(spec.path)) == ".txt":
        lines = [prompt_from(line, place) for place, line in _lines(raw)]
        return lines[: spec.max_samples]
    columns = list(raw.columns())
    if {*_ASKING} & {*columns, *spec.columns}:
        form = pick_form(spec, [*columns, *(name for name in _ANSWERING if name not in columns)])
        if "text" not in form:
            return [_read(row, form, place) for place, row in raw]
    raise UserError(
        f"{spec.path}: no column messages, prompt, question or instruction; there are {', '.join(columns)}; name the "
        "one to use, as in prompt=COLUMN"
    )


def _lines(raw: Raw) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each line of .txt files that is not blank."""
    for place, row in raw:
        path = place.rpartition(":")[0]
        for number, line in enumerate(row["text"].split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", line


def _read(row: Row, form: Mapping[str, str], where: str) -> Prompt:
    in_messages = "prompt" in form and isinstance(row.get(form["prompt"]), list)
    answer: Any = [{"role": "assistant", "content": _NO_ANSWER}] if in_messages else _NO_ANSWER
    chat = normalise({**row, **{form[name]: answer for name in _ANSWERING if name in form}}, form, where)
    if not isinstance(chat, Chat):
        raise UserError(f"{where}: the prompt is empty")
    return prompt_of(chat, where)
