"""Messages of a chat, as OpenAI, ShareGPT and others write them -> messages as chat templates take them."""

import json
from collections.abc import Mapping
from typing import Any

from loram.base.errors import UserError

Message = dict[str, Any]  # Any: the values are JSON

REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers gives a template the first that is there
_ROLES = (
    {role: role for role in ("user", "assistant", "system", "developer", "tool")}
    | dict.fromkeys(("human", "prompter"), "user")
    | dict.fromkeys(("gpt", "chatgpt", "bing", "bot", "chatbot", "ai", "model", "output"), "assistant")
    | dict.fromkeys(("function", "function_response", "observation"), "tool")
)
_CALLS = ("function_call", "tool_call")  # roles of ShareGPT whose text is a call, or a list of calls
_TRAIN = ("train", "training")
_TEXTS = ("content", *REASONING)
_ARGUMENTS = ("arguments", "parameters", "input")  # the last two are Llama's and Anthropic's names


def read_messages(value: Any, name: str, where: str) -> tuple[list[Message], list[int]]:
    """Bring a list of messages into the form of transformers' chat templates.

    Args:
        value: the list, as the row has it.
        name: the column, for messages about errors.
        where: the place of the row, for messages about errors.

    Returns:
        (the messages; the indices of the assistant's turns that the loss may count: a turn with `weight: 0` or
        `train: false` is left out, and so are empty turns).

    Raises:
        UserError: a message has no role or no content, or a value that cannot be used; names the row and the key.
    """
    messages, turns = [], []
    for number, fields in enumerate(read_list(value, f"{where}: {name} should be a list of messages")):
        here = f"{where}: message {number + 1} of {name}"
        if not isinstance(fields, dict):
            raise UserError(f"{here}: a message needs a role and a content, but this is {fields!r}")
        message, trains = _read_message({key: item for key, item in fields.items() if item is not None}, here)
        messages.append(message)
        if trains and (message.get("tool_calls") or any(str(message.get(key, "")).strip() for key in _TEXTS)):
            turns.append(number)
    return messages, turns


def read_tools(value: Any, name: str, where: str) -> list[Message]:
    """Return the schemas of a row's tools, which may be a list or JSON text.

    Raises:
        UserError: it is something else.
    """
    problem = f"{where}: {name} should be a list of tool schemas"
    tools = read_list(value, problem)
    if not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{problem}, but is {value!r}")
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def read_list(value: Any, problem: str) -> list[Any]:
    """Return a list that may be written as JSON text, or as an Arrow table's object of lists.

    Args:
        value: the value of a row.
        problem: what the error begins with.

    Raises:
        UserError: it is no list.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, problem)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise UserError(f"{problem}, but is {value!r}")
    return value


def arguments_as_text(message: Message) -> Message:
    """Return a message whose tool calls have their arguments as JSON text, as OpenAI and some chat templates do."""
    calls = [call["function"] for call in message["tool_calls"]]
    texts = [{**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in calls]
    written = [{**call, "function": text} for call, text in zip(message["tool_calls"], texts, strict=True)]
    return {**message, "tool_calls": written}


def calls_as_text(message: Message) -> Message:
    """Write the tool calls of a message into its content, for chat templates that have no place for them.

    Each call is a line of JSON between `<tool_call>` and `</tool_call>`, as Hermes and Qwen write them.
    """
    calls = [call["function"] for call in message["tool_calls"]]
    lines = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join([*filter(None, [message["content"]]), *lines])}


def check_text(text: str, name: str, where: str) -> None:
    r"""Refuse half a character, such as \ud83d alone: JSON can write it, but no tokenizer and no file accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name} is not valid text: {error}") from error


def _read_message(fields: Message, where: str) -> tuple[Message, bool]:
    """Return a message, and whether the loss may count it. `fields` holds no None."""
    fields = dict(fields)
    sharegpt = "role" not in fields
    role = fields.pop("role", None) or fields.pop("from", None)
    if not isinstance(role, str):
        raise UserError(f"{where}: a message needs a role and a content, but this is {fields!r}")
    role = role.strip()
    content = _content(fields.pop("content", None) if "content" in fields else fields.pop("value", None), where)
    calls = _calls(fields, where)
    if role.lower() in _CALLS:
        role, calls, content = "assistant", [*calls, *_listed(content, where)], ""
    if sharegpt and role.lower() not in _ROLES:
        raise UserError(f"{where}: the role {role!r} is not known; known are {', '.join((*_ROLES, *_CALLS))}")
    role = _ROLES.get(role.lower(), role)
    trains = _trains(fields, role, where)
    for key in REASONING:
        if not isinstance(fields.get(key, ""), str):
            raise UserError(f"{where}: {key} should be text, but is {fields[key]!r}")
    if content is None and not calls and not any(fields.get(key) for key in REASONING):
        raise UserError(f"{where}: a message needs a role and a content, but this one has no content and no tool calls")
    message = {"role": role, "content": content or "", **fields} | ({"tool_calls": calls} if calls else {})
    check_text(json.dumps(message, ensure_ascii=False), "it", where)
    return message, trains


def _content(value: Any, where: str) -> str | None:
    """Return a message's text; a list of text parts is joined."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"{where}: content should be text, but is {value!r}")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise UserError(f"{where}: only parts of text can be used, but the content has {part!r}")
        texts.append(text)
    return "".join(texts)


def _calls(fields: Message, where: str) -> list[Message]:
    """Take a message's tool calls out of its fields, OpenAI's older single `function_call` among them."""
    calls = read_list(fields.pop("tool_calls", None) or [], f"{where}: tool_calls should be a list")
    single = fields.pop("function_call", None)
    return [_call(call, where) for call in [*calls, *([single] if single else [])]]


def _listed(text: str | None, where: str) -> list[Message]:
    """Return the calls that a message's text lists as JSON."""
    calls = _from_json(text or "", f"{where}: the text of a tool call")
    return [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]


def _call(value: Any, where: str) -> Message:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call needs the name of a function, but this is {value!r}")
    key = next((key for key in _ARGUMENTS if key in function), _ARGUMENTS[0])
    if other := sorted(function.keys() - {"name", key, "id", "type", "index"}):
        raise UserError(f"{where}: the call of {function['name']} has {other[0]!r}, which no chat template writes")
    arguments = function.get(key)
    if isinstance(arguments, str):  # as OpenAI sends them; templates write a text as a quoted text
        arguments = _from_json(arguments, f"{where}: the arguments of {function['name']}") if arguments.strip() else {}
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return {"id": value["id"], **call} if isinstance(value.get("id"), str) else call


def _trains(fields: Message, role: str, where: str) -> bool:
    """Take a message's own say about the loss out of its fields, and return whether the loss may count it."""
    wanted = role == "assistant"
    if (weight := fields.pop("weight", None)) is not None:
        if weight not in (0, 1):
            raise UserError(f"{where}: weight can be 0 or 1, but is {weight!r}")
        fields.setdefault(_TRAIN[0], bool(weight))
    for key in _TRAIN:
        if (train := fields.pop(key, None)) is None:
            continue
        if not isinstance(train, bool):
            raise UserError(f"{where}: {key} can be true or false, but is {train!r}")
        if train and role != "assistant":
            raise UserError(f"{where}: only an assistant's turn can be in the loss, but this is one of {role!r}")
        wanted = wanted and train
    return wanted


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} should be JSON, but is {text!r}") from error


def without_nulls(value: Any) -> Any:
    """Return a value of an Arrow table without the nulls that it puts where a row's object lacks a key."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
