"""Chats -> token ids, with the assistant's turns in the loss.

Chat templates write chats in many ways. A template may put the system prompt before the last question, add a default
one, drop earlier thoughts, or leave out the generation prompt. So nothing is taken for granted of the text that a
template writes: a part of the chat is found by changing it and comparing the two texts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from loram.data.forms import Chat
from loram.data.messages import REASONING, Message, arguments_as_text, calls_as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, end)

# What chat templates raise: they compute with whatever a row has.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_MARK = "\ue000"  # a private character of Unicode, which no chat has
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Renderer:
    """A tokenizer's chat template, and what can be learnt from the texts that it writes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer

    def render(self, messages: Sequence[Message], tools: Sequence[Message] = (), *, prompt: bool = False) -> str:
        """Return a chat as text; `prompt` adds the generation prompt."""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        )

    def generation_spans(self, chat: Chat) -> list[Span] | None:
        """Return the pieces of the text that the template itself marks as the assistant's; None if it marks none."""
        template = self.tokenizer.get_chat_template(tools=list(chat.tools) or None)
        if not _GENERATION.search(template):
            return None
        named: dict[str, Any] = self.tokenizer.special_tokens_map  # Any: templates take what they like
        rendered: Any = render_jinja_template(  # the declared type is that of the text alone
            [list(chat.messages)],
            tools=list(chat.tools) or None,
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
    def write_calls(self) -> Callable[[Message], Message]:
        """How the template wants tool calls: as they are, with arguments as JSON text, or as text of its own.

        The last is for templates that have no place for tool calls.
        """
        function = {"name": "weather", "arguments": {"city": "Paris"}}
        answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
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
class _Text:
    """A chat as the template writes it."""

    renderer: Renderer
    messages: Sequence[Message]
    tools: Sequence[Message]
    prompt: bool = False

    @cached_property
    def text(self) -> str:
        return self.renderer.render(self.messages, self.tools, prompt=self.prompt)

    def part(self, stop: int, *, prompt: bool = False) -> "_Text":
        """Return the chat that stops before message `stop`."""
        return replace(self, messages=self.messages[:stop], prompt=prompt)

    def place(self, index: int, marked: Message, *, once: bool = True) -> int | None:
        """Return the character at which the text gets longer when a message has a mark in one of its parts.

        Returns:
            The place, the first of several unless `once`; None if the template does not write that part.

        Raises:
            UnclearChat: with `once`, the text has changed at several places.
        """
        messages = [*self.messages[:index], marked, *self.messages[index + 1 :]]
        other = replace(self, messages=messages).text
        place = _shared(self.text, other)
        if once and not other.endswith(self.text[place:]):
            raise UnclearChat(f"does not write message {index + 1} at one place")
        return None if other == self.text else place

    def end(self, index: int) -> int:
        """Return where the text of a message ends, before its last blanks and whatever the template writes after it.

        For a message with tool calls this is a place inside the last call.

        Raises:
            UnclearChat: the template leaves out a part of the message, or writes it in an unexpected way.
        """
        message, places = self.messages[index], []
        for name, marked in _marked(message):
            # A tool's answer may be written with the name of the call.
            place = self._content_end(index) if name == "content" else self.place(index, marked, once=name in REASONING)
            if place is None and name in REASONING:  # a template may drop the thoughts of earlier turns
                place = 0 if self.part(index + 1).place(index, marked) is not None else None
            if place is None:
                raise UnclearChat(f"does not write the {name} of message {index + 1} ({message['role']})")
            places.append(place)
        return max(places)

    def _content_end(self, index: int) -> int | None:
        message = self.messages[index]
        content = message["content"].rstrip()
        try:
            return self.place(index, _add_mark(message, "content", len(content)))
        except UnclearChat:  # some templates look at how a message begins and ends
            middle = len(content) // 2
            place, rest = self.place(index, _add_mark(message, "content", middle)), content[middle:]
            if place is None or not self.text.startswith(rest, place):
                raise
            return place + len(rest)

    def beginning(self, index: int) -> int | None:
        """Return where the first thought or text of a message begins; None if that cannot be told."""
        message, places = self.messages[index], []
        for key in (*REASONING, "content"):
            try:
                places.append(self.place(index, _add_mark(message, key, 0)) if message.get(key) else None)
            except UnclearChat:
                return None
        return min((place for place in places if place is not None), default=None)


def _add_mark(message: Message, key: str, position: int) -> Message:
    return {**message, key: f"{message[key][:position]}{_MARK}{message[key][position:]}"}


def _marked(message: Message) -> Iterator[tuple[str, Message]]:
    """Yield the name of each part of a message, and the message with a mark at the end of that part."""
    thoughts = [key for key in REASONING if message.get(key)]
    calls = message.get("tool_calls", [])
    for key in thoughts[:1]:
        yield key, _add_mark(message, key, len(message[key]))
    if message["content"] or not (thoughts or calls):
        yield "content", _add_mark(message, "content", len(message["content"]))
    for number, call in enumerate(calls):
        function = {**call["function"], "name": call["function"]["name"] + _MARK}
        marked = [*calls[:number], {**call, "function": function}, *calls[number + 1 :]]
        yield "tool_calls", {**message, "tool_calls": marked}


def find_turns(chat: Chat, renderer: Renderer) -> tuple[str, list[Span]]:
    """Return a chat as text, and where in it the turns stand that are in the loss.

    A turn is what the assistant writes after the generation prompt, up to and including what ends the turn. Where the
    template marks the assistant's text itself (`{% generation %}`), its marks are taken.

    Raises:
        UnclearChat: the template leaves out a part of the chat, or a turn cannot be found.
        TemplateError: the template refuses the chat.
    """
    messages = [renderer.write_calls(message) if "tool_calls" in message else message for message in chat.messages]
    whole = _Text(renderer=renderer, messages=messages, tools=chat.tools)
    ends = [whole.end(index) for index in range(len(messages))]
    if chat.tools and replace(whole, tools=()).text == whole.text:
        raise UnclearChat("has no place for tools")
    marked = renderer.generation_spans(replace(chat, messages=messages))
    if marked is not None:
        before = [0, *ends]
        return whole.text, [span for turn in chat.turns for span in marked if before[turn] <= span[0] <= ends[turn]]
    return whole.text, [(_start(whole, ends, turn), _stop(whole, ends, turn)) for turn in chat.turns]


def _start(whole: _Text, ends: list[int], turn: int) -> int:
    """Return where a turn starts: after the generation prompt, or where there is none, where its content begins."""
    text, content = whole.text, whole.messages[turn]["content"]
    start = _after_prompt(whole, ends, turn) if turn else _after_first_prompt(whole, ends)
    if text[start : ends[turn]].strip() == content.strip():
        return start
    before = whole.part(turn, prompt=True)
    if (before.text != replace(before, prompt=False).text) if turn else whole.renderer.generation_prompt:
        return start
    beginning = whole.beginning(turn)
    return start if beginning is None or not text[start:beginning].strip() else beginning


def _after_prompt(whole: _Text, ends: list[int], turn: int) -> int:
    """Return where the prompt of a turn ends in the whole chat, though the template may write both differently."""
    before, text = whole.part(turn, prompt=True), whole.text
    if text.startswith(before.text) and ends[turn - 1] <= len(before.text) <= ends[turn]:
        return len(before.text)
    after_question = before.text[before.end(turn - 1) :]
    gap = text[ends[turn - 1] : ends[turn]]
    shared = _shared(after_question, gap)
    if shared < min(len(after_question), len(gap)):  # not in the middle of a word or a special token
        shared = max((end for end in whole.renderer.boundaries(gap) if end <= shared), default=0)
    prompt = whole.renderer.generation_prompt
    if prompt and shared <= len(after_question) - len(prompt):
        raise UnclearChat(f"writes the beginning of message {turn + 1} in an unexpected way")
    return ends[turn - 1] + shared


def _after_first_prompt(whole: _Text, ends: list[int]) -> int:
    """Return where the assistant's text starts in a chat that begins with its turn."""
    prompt, head = whole.renderer.generation_prompt, whole.text[: ends[0]]
    if not prompt:
        return 0
    if prompt not in head:
        raise UnclearChat("does not show where the first turn begins, which is the assistant's")
    return head.rindex(prompt) + len(prompt)


def _stop(whole: _Text, ends: list[int], turn: int) -> int:
    """Return where a turn stops: behind what the template writes to end it."""
    text, end = whole.text, ends[turn]
    last = turn + 1 == len(whole.messages)
    short = whole if last else whole.part(turn + 1)
    tail = short.text[end:] if last or text.startswith(short.text) else short.text[short.end(turn) :]
    shared = _shared(tail, text[end:])
    if tail and shared == len(tail) and not (last and _opens_a_turn(whole, tail)):
        return end + shared
    # Either another turn follows in `tail`, or the template ends its last turn in a way of its own. What ends this turn
    # is then the first special token that follows in all cases, or that follows the question too, or else blanks, or
    # the marker of the next role.
    for other in (tail, text[ends[turn - 1] :] if turn and not last else ""):
        ending = whole.renderer.ending(other)
        if ending and text.startswith(ending.rstrip(), end):
            return end + _shared(ending, text[end:])
    if blanks := shared - len(tail[:shared].lstrip()):
        return end + blanks
    marker = None if last else whole.renderer.special.match(text, end)
    return end if marker is None else marker.end()


def _opens_a_turn(whole: _Text, tail: str) -> bool:
    """Return whether what follows the last turn opens another one, which some templates always do."""
    if not whole.renderer.special.sub("", tail).strip():
        return False
    longer = replace(whole, messages=[*whole.messages, {"role": "user", "content": "?"}])
    try:
        return not longer.text.startswith(tail, longer.end(len(whole.messages) - 1))
    except (UnclearChat, *TEMPLATE_ERRORS):
        return False


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts share at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
