"""Raw rows -> a text, a prompt and its completion, or a chat.

Rows of a prompt and a completion, a question and an answer, or an instruction and an output are chats with a plain
version. Which version is used is decided later, by whether the tokenizer has a chat template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loram.base.errors import UserError
from loram.data.messages import Message, check_text, read_list, read_messages, read_tools
from loram.data.reading import Row
from loram.data.spec import DataSpec, Kind


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text, all of which is in the loss."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt, and a text that continues it and is in the loss."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A chat.

    Args:
        messages: the messages, as transformers' chat templates take them.
        turns: the indices of the messages that are in the loss.
        tools: the schemas of the tools that the assistant may call.
        plain: the same as plain text, for tokenizers without a chat template; None if it has no such form.
    """

    messages: Sequence[Message]
    turns: Sequence[int]
    tools: Sequence[Message] = ()
    plain: Completion | None = None


Example = Text | Completion | Chat


@dataclass(frozen=True, kw_only=True)
class _Form:
    """A form of rows: the columns that it needs, those that it can use, and the kind of rows that they are."""

    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    kind: Kind = "text"

    @property
    def columns(self) -> set[str]:
        return {*self.needs, *self.may}


# The first form whose columns are there is taken.
_FORMS = (
    _Form(needs=("messages",), may=("system", "tools")),
    _Form(needs=("prompt", "completion"), may=("system", "tools")),
    _Form(needs=("instruction", "output"), may=("input", "system", "history", "tools")),
    _Form(needs=("question", "answer"), may=("system", "history", "tools")),
    _Form(needs=("text",)),
    _Form(needs=("prompt", "chosen", "rejected"), may=("system", "tools"), kind="pairs"),
    _Form(needs=("chosen", "rejected"), may=("system", "tools"), kind="pairs"),
    _Form(needs=("prompt", "completion", "label"), may=("system", "tools"), kind="labels"),
)
_OTHER_NAMES = {"messages": ("conversations", "conversation")}
_OPTIONAL = {name for form in _FORMS for name in form.may}
_EXPECTED: Mapping[Kind, str] = {
    "text": "messages, prompt and completion, instruction and output, question and answer, or text",
    "pairs": "chosen and rejected, with a prompt of their own or one that both begin with",
    "labels": "prompt, completion and label",
}
_READERS: Mapping[Kind, str] = {
    "text": "every method that learns from one text per row",
    "pairs": "methods dpo and orpo",
    "labels": "method kto",
}
_LEARNED = {"messages", "completion", "output", "answer", "text"}  # a row without its text teaches nothing


def pick_form(spec: DataSpec, columns: Sequence[str], kinds: Sequence[Kind] = ("text",)) -> Mapping[str, str]:
    """Decide which of a data set's columns to use: the ones that the spec names, and others by their own names.

    Args:
        spec: the data set.
        columns: the names of its columns.
        kinds: what may be learnt from the rows.

    Returns:
        Our name of each column -> its name in the data.

    Raises:
        UserError: a named column does not exist, no form fits, or only one of another kind does.
    """
    named = {str(ours): theirs for ours, theirs in spec.columns.items()}
    for ours, theirs in named.items():
        if theirs not in columns:
            raise UserError(f"{spec.path}: no column {theirs!r} for {ours}; there are {', '.join(columns)}")
    own = {name: name for form in _FORMS for name in form.columns if name in columns and name not in named.values()}
    for ours, others in _OTHER_NAMES.items():
        if ours not in own and (there := [name for name in others if name in columns]):
            own[ours] = there[0]
    names = own | named
    forms = [form for form in _FORMS if set(named) <= form.columns]
    fitting = [form for form in forms if set(form.needs) <= set(names)]
    for form in fitting:
        if form.kind in kinds:
            return {ours: names[ours] for ours in (*form.needs, *form.may) if ours in names}
    every, expected = ", ".join(columns) or "none", "; or ".join(_EXPECTED[kind] for kind in kinds)
    if fitting:
        raise UserError(
            f"{spec.path}: has {' and '.join(fitting[0].needs)}, which {_READERS[fitting[0].kind]} can read; here the "
            f"rows should have {expected}"
        )
    if named:
        needs = " or ".join(" and ".join(form.needs) for form in forms if form.kind in kinds) or "one form only"
        raise UserError(f"{spec.path}: the columns {', '.join(named)} belong to rows with {needs}; there are {every}")
    raise UserError(
        f"{spec.path}: cannot tell which columns to use from {every}; expected {expected}; or name them, as in "
        "prompt=COLUMN"
    )


def normalise(row: Row, form: Mapping[str, str], where: str) -> Example | None:
    """Bring a raw row into the form that the rest of loram reads.

    Args:
        row: the raw row.
        form: our name of each column -> its name in the row.
        where: the place of the row, for messages.

    Returns:
        The row; None if it is empty, because what the model is to learn from it is empty or null.

    Raises:
        UserError: a value is missing, or not of the expected type.
    """
    values: Row = {ours: row.get(theirs) for ours, theirs in form.items()}
    for ours, theirs in form.items():
        if ours in _LEARNED and theirs in row and _is_empty(values[ours]):
            return None
        if ours not in _OPTIONAL and theirs not in row:
            raise UserError(f"{where}: there is no {theirs!r}")
    if "text" in form:
        return Text(text=_text(values["text"], form["text"], where))
    messages, turns, plain = _turns(values, form, where)
    if values.get("system"):
        system = _text(values["system"], form["system"], where)
        if messages[:1] and messages[0]["role"] == "system":
            raise UserError(f"{where}: {form['system']!r} is a second system prompt; the chat has one already")
        messages, turns = [{"role": "system", "content": system}, *messages], [turn + 1 for turn in turns]
        plain = None if plain is None else replace(plain, prompt=f"{system}\n\n{plain.prompt}")
    tools = read_tools(values["tools"], form["tools"], where) if values.get("tools") else ()
    return Chat(messages=messages, turns=turns, tools=tools, plain=None if tools else plain)


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} should be text, but is {value!r}")
    if not value:
        raise UserError(f"{where}: {name!r} is '', where text is needed; name a row without a prompt text=COLUMN")
    check_text(value, repr(name), where)
    return value


def _turns(values: Row, form: Mapping[str, str], where: str) -> tuple[list[Message], list[int], Completion | None]:
    """Return a row's messages, which of them are in the loss, and the row as plain text."""
    if "messages" in form:
        return *read_messages(values["messages"], form["messages"], where), None
    if "prompt" in form and (isinstance(values["prompt"], list) or isinstance(values["completion"], list)):
        if not isinstance(values["prompt"], list) or not isinstance(values["completion"], list):
            both = f"{form['prompt']} and {form['completion']}"
            raise UserError(f"{where}: {both} should both be text or both be messages")
        before, _ = read_messages(values["prompt"], form["prompt"], where)
        after, turns = read_messages(values["completion"], form["completion"], where)
        return [*before, *after], [len(before) + turn for turn in turns], None
    texts = {ours: _text(values[ours], form[ours], where) for ours in form if _is_needed(ours, values)}
    ask, answer, plain = _single_turn(texts)
    messages = [*_history(values, form, where), _message("user", ask), _message("assistant", answer)]
    turns = [turn for turn in range(1, len(messages), 2) if messages[turn]["content"].strip()]
    return messages, turns, plain if len(messages) == 2 else None


def _is_needed(ours: str, values: Row) -> bool:
    """Return whether a column has to be text. An instruction may be empty where there is an input."""
    if ours in ("input", "instruction"):
        return bool(values[ours]) or (ours == "instruction" and not values.get("input"))
    return ours not in _OPTIONAL


def _single_turn(texts: Mapping[str, str]) -> tuple[str, str, Completion]:
    """Return the question, the answer, and both as plain text."""
    if "prompt" in texts:
        return texts["prompt"], texts["completion"], Completion(prompt=texts["prompt"], completion=texts["completion"])
    if "question" in texts:
        ask, answer, prompt = texts["question"], texts["answer"], f"Question: {texts['question']}\nAnswer:"
    else:
        headed = [("Instruction", texts.get("instruction")), ("Input", texts.get("input"))]
        ask, answer = "\n\n".join(text for _, text in headed if text), texts["output"]
        prompt = "".join(f"### {name}:\n{text}\n\n" for name, text in headed if text) + "### Response:"
    return ask, answer, Completion(prompt=prompt, completion=f" {answer}")


def _history(values: Row, form: Mapping[str, str], where: str) -> list[Message]:
    """Return the earlier turns of an Alpaca row, which are pairs of a question and an answer."""
    messages = []
    problem = f"{where}: {form['history']!r} should be pairs of a question and an answer" if "history" in form else ""
    for pair in read_list(values.get("history") or [], problem):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UserError(f"{problem}, but has {pair!r}")
        check_text("".join(pair), repr(form["history"]), where)
        messages += [_message("user", pair[0]), _message("assistant", pair[1])]
    return messages


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
