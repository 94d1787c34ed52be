"""A tokenizer's chat template, and where in the text that it writes each message of a chat stands.

A part of a message is found by writing the chat again with a mark in it, and comparing the two texts.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from loram.data.messages import REASONING, Message, arguments_as_text, calls_as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, end)

# What chat templates raise: they compute with whatever a row has.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
MARK = chr(0xF0000)  # a private character of Unicode, which no chat has; those that follow it are marks too
_MARKS = re.compile("[\U000f0000-\U000ffffd]")
_MOST_MARKS = 0xFFFD
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Renderer:
    """A tokenizer's chat template, and what has been learnt from the texts that it writes.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.learnt: dict[tuple[Any, ...], Any] = {}  # what holds wherever the same text stands in the same place

    def render(self, messages: Sequence[Message], tools: Sequence[Message] = (), *, prompt: bool = False) -> str:
        """Return a chat as text; `prompt` adds the generation prompt."""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        )

    def generation_spans(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[Span]:
        """Return the pieces of the text that the template itself marks as the assistant's; empty if it marks none."""
        template = self.tokenizer.get_chat_template(tools=list(tools) or None)
        if not _GENERATION.search(template):
            return []
        named: dict[str, Any] = self.tokenizer.special_tokens_map  # Any: templates take what they like
        rendered: Any = render_jinja_template(  # the declared type is that of the text alone
            [list(messages)],
            tools=list(tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **named,
        )
        return list(rendered[1][0])

    @cached_property
    def special(self) -> re.Pattern[str]:
        """The special tokens, as a pattern."""
        tokens = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def ending(self, text: str) -> str:
        """Return the beginning of a text up to its first special token and the blanks behind it; empty without one."""
        token = self.special.search(text)
        return "" if token is None else text[: len(text) - len(text[token.end() :].lstrip())]

    def boundaries(self, text: str) -> list[int]:
        """Return where special tokens and blanks end in a text."""
        return [match.end() for match in re.finditer(rf"\s|{self.special.pattern}", text)]

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds for the assistant to go on; empty if it adds nothing."""
        question = [{"role": "user", "content": "?"}]
        without, with_prompt = self.render(question), self.render(question, prompt=True)
        return with_prompt.removeprefix(without) if with_prompt.startswith(without) else ""

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that the template writes right after the assistant's text; empty where it writes none."""
        answer = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        try:
            after = self.render(answer).partition(MARK)[2]
        except TEMPLATE_ERRORS:
            return ""
        token = self.special.match(after.lstrip())
        return "" if token is None else token.group()

    @cached_property
    def write_calls(self) -> Callable[[Message], Message]:
        """How the template wants tool calls: as they are, with arguments as JSON text, or as text of its own.

        The last is for templates that have no place for tool calls.
        """
        function = {"name": "weather", "arguments": {"city": "Paris"}}
        call = {"id": "abcdefghi", "type": "function", "function": function}  # Mistral wants nine characters
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        question = {"role": "user", "content": "?"}
        for change in (dict, arguments_as_text):
            try:
                if "weather" in self.render([question, change(answer)]):
                    return change
            except TEMPLATE_ERRORS:
                continue
        return calls_as_text


class UnclearChat(Exception):
    """It cannot be found out what the chat template does; the message says with what."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where a message stands in the text of its chat.

    Args:
        first: where its first part begins: its thought, its content, or for tool calls a place inside the first.
        last: where its last part ends, before the blanks at the end of the content; for calls a place inside the last.
        dropped: the parts that the template writes only in the last turn of a chat, such as thoughts.
    """

    first: int
    last: int
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChatText:
    """A chat as a template writes it."""

    renderer: Renderer
    messages: Sequence[Message]
    tools: Sequence[Message] = ()
    prompt: bool = False

    @cached_property
    def text(self) -> str:
        """The text."""
        return self.renderer.render(self.messages, self.tools, prompt=self.prompt)

    def part(self, stop: int, *, prompt: bool = False) -> "ChatText":
        """Return the chat that stops before message `stop`."""
        return replace(self, messages=self.messages[:stop], prompt=prompt)

    def with_message(self, index: int, message: Message) -> "ChatText":
        """Return the chat with another message in one place."""
        return replace(self, messages=[*self.messages[:index], message, *self.messages[index + 1 :]])

    @cached_property
    def regions(self) -> list[Region]:
        """The region of each message.

        Raises:
            UnclearChat: the template leaves out a part of a message, or writes it in an unexpected way.
        """
        return self._regions_at_once() or [self.region(index) for index in range(len(self.messages))]

    def region(self, index: int) -> Region:
        """Return the region of a message; as `regions`, one part at a time."""
        message, places, dropped = self.messages[index], [], []
        for name, mark in _parts(message):
            place = self._content_end(index) if name == "content" else self._place(index, mark(message, MARK), name)
            if place is not None:
                places.append(place)
            elif name in ("content", "tool_calls") or self._is_lost(index, mark(message, MARK)):
                raise UnclearChat(f"does not write the {name} of message {index + 1} ({message['role']})")
            else:
                dropped.append(name)
        return Region(first=min(places), last=max(places), dropped=tuple(dropped))

    def _is_lost(self, index: int, marked: Message) -> bool:
        """Return whether a part is not written even where its message is the last, as thoughts are."""
        short = self.part(index + 1)
        return index + 1 == len(self.messages) or short.with_message(index, marked).text == short.text

    def _place(self, index: int, marked: Message, name: str = "") -> int | None:
        """Return the character at which the text gets longer when a message has a mark in one of its parts.

        Returns:
            The place; None if the template does not write that part.

        Raises:
            UnclearChat: the text has changed at several places. Those of a call count as one: a tool's answer may be
                written with the name of the call.
        """
        other = self.with_message(index, marked).text
        place = shared_length(self.text, other)
        if name != "tool_calls" and not other.endswith(self.text[place:]):
            raise UnclearChat(f"does not write message {index + 1} at one place")
        return None if other == self.text else place

    def _content_end(self, index: int) -> int | None:
        message = self.messages[index]
        content = message["content"].rstrip()
        try:
            return self._place(index, _mark_at("content", len(content), message, MARK))
        except UnclearChat:  # some templates look at how a message begins and ends
            middle = len(content) // 2
            place, rest = self._place(index, _mark_at("content", middle, message, MARK)), content[middle:]
            if place is None or not self.text.startswith(rest, place):
                raise
            return place + len(rest)

    def _regions_at_once(self) -> list[Region] | None:
        """Return all regions from one text with a mark of its own in each part; None if it differs in other ways."""
        marks = map(chr, range(ord(MARK), ord(MARK) + _MOST_MARKS))
        messages, owners = [], []
        for message in self.messages:
            owners.append([(mark, change) for (_, change), mark in zip(_parts(message), marks, strict=False)])
            messages.append(functools.reduce(lambda whole, own: own[1](whole, own[0]), owners[-1], message))
        try:
            other = replace(self, messages=messages).text
        except TEMPLATE_ERRORS:
            return None
        places: dict[str, list[int]] = {}
        for count, match in enumerate(_MARKS.finditer(other)):
            places.setdefault(match.group(), []).append(match.start() - count)
        once = all(len(places.get(mark, ())) == 1 for own in owners for mark, _ in own)
        if not once or _MARKS.sub("", other) != self.text:
            return None
        regions = [[places[mark][0] for mark, _ in own] for own in owners]
        return [Region(first=min(own), last=max(own)) for own in regions]


def _parts(message: Message) -> Iterator[tuple[str, Callable[[Message, str], Message]]]:
    """Yield the name of each part of a message, and what puts a mark at its beginning, at its end, or into a call."""
    thoughts = [key for key in REASONING if message.get(key)]
    calls = message.get("tool_calls", [])
    contents = ["content"] if message["content"] or not (thoughts or calls) else []
    for key in (*thoughts[:1], *contents):
        text = message[key]
        # The end comes first, so that the place of the beginning is the same with both marks.
        yield key, partial(_mark_at, key, len(text.rstrip()))
        yield f"beginning of the {key}", partial(_mark_at, key, len(text) - len(text.lstrip()))
    for number in range(len(calls)):
        yield "tool_calls", partial(_mark_call, number)


def _mark_at(key: str, position: int, message: Message, mark: str) -> Message:
    return {**message, key: f"{message[key][:position]}{mark}{message[key][position:]}"}


def _mark_call(number: int, message: Message, mark: str) -> Message:
    calls = message["tool_calls"]
    call = calls[number]
    function = {**call["function"], "name": call["function"]["name"] + mark}
    return {**message, "tool_calls": [*calls[:number], {**call, "function": function}, *calls[number + 1 :]]}


def shared_length(one: str, other: str) -> int:
    """Return how many characters two texts share at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
