"""Chats -> their text, with the places of the assistant's turns that are in the loss.

Chat templates write chats in many ways. A template may put the system prompt before the last question, add a default
one, drop earlier thoughts, or leave out the generation prompt. So nothing is taken for granted of the text that a
template writes: where each message stands is found by marks (`template.py`), and what surrounds a turn by comparing the
text of the whole chat with those of its parts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loram.data.forms import Chat
from loram.data.messages import REASONING
from loram.data.template import MARK, TEMPLATE_ERRORS, ChatText, Region, Renderer, Span, UnclearChat, shared_length

_READ = {"role", "content", "tool_calls", *REASONING}  # the keys of messages that are looked for in the text


@dataclass(frozen=True, kw_only=True)
class Turns:
    """A chat as text.

    Args:
        text: the text.
        spans: where in it the turns stand that are in the loss.
        unused: what the template leaves out on purpose: keys of messages, thoughts of earlier turns -> how many.
    """

    text: str
    spans: Sequence[Span]
    unused: Counter[str]


def find_turns(chat: Chat, renderer: Renderer) -> Turns:
    """Return a chat as text, and where in it the turns stand that are in the loss.

    A turn is what the assistant writes after the generation prompt, up to and including what ends the turn. Where the
    template marks the assistant's text itself (`{% generation %}`), its marks are taken.

    Raises:
        UnclearChat: the template leaves out a part of the chat, or a turn cannot be found.
        TemplateError: the template refuses the chat.
    """
    messages = [renderer.write_calls(message) if "tool_calls" in message else message for message in chat.messages]
    whole = _with_single_ends(ChatText(renderer=renderer, messages=messages, tools=chat.tools))
    if chat.tools and replace(whole, tools=()).text == whole.text:
        raise UnclearChat("has no place for tools")
    regions = whole.regions
    if marked := renderer.generation_spans(whole.messages, whole.tools):
        before = [0, *(region.last for region in regions)]
        spans = [span for turn in chat.turns for span in marked if before[turn] <= span[0] <= regions[turn].last]
    else:
        _check_apart(regions, chat.turns, [(regions[turn].first, regions[turn].last) for turn in chat.turns])
        spans = [(_start(whole, turn), _stop(whole, turn)) for turn in chat.turns]
        _check_apart(regions, chat.turns, spans)
    return Turns(text=whole.text, spans=spans, unused=_unused(whole))


def _with_single_ends(whole: ChatText) -> ChatText:
    """Return a chat without the special token at the end of a message that the template writes there as well."""
    special, messages = whole.renderer.special, list(whole.messages)
    for index, message in enumerate(messages):
        tokens = list(special.finditer(message["content"].rstrip()))
        if tokens and tokens[-1].end() == len(message["content"].rstrip()):
            after = whole.text[whole.regions[index].last :].lstrip()
            if after.startswith(tokens[-1].group()):
                messages[index] = {**message, "content": message["content"][: tokens[-1].start()]}
    return whole if messages == list(whole.messages) else replace(whole, messages=messages)


def _check_apart(regions: Sequence[Region], turns: Sequence[int], spans: Sequence[Span]) -> None:
    """Refuse a turn in whose text another message stands."""
    for turn, (start, stop) in zip(turns, spans, strict=True):
        for other, region in enumerate(regions):
            if other != turn and region.first < stop and region.last > start:
                raise UnclearChat(f"writes message {other + 1} inside message {turn + 1}")


def _unused(whole: ChatText) -> Counter[str]:
    """Count the keys of messages, and the thoughts of earlier turns, that the template does not write."""
    learnt, unused = whole.renderer.learnt, Counter[str]()
    for index, (message, region) in enumerate(zip(whole.messages, whole.regions, strict=True)):
        for key in message.keys() - _READ:
            place = ("key", message["role"], key)
            if place not in learnt:
                rest = {name: value for name, value in message.items() if name != key}
                learnt[place] = whole.with_message(index, rest).text != whole.text
            unused[f"{key} of messages"] += not learnt[place]
        unused["thoughts of earlier turns"] += bool(region.dropped)
    return +unused


def _start(whole: ChatText, turn: int) -> int:
    """Return where a turn starts: after the generation prompt, or where there is none, where the message begins."""
    first, role = whole.regions[turn].first, whole.messages[turn - 1]["role"] if turn else ""
    before = whole.regions[turn - 1].last if turn else 0
    floor = before if before <= first else 0
    place = ("start", role, whole.text[floor:first])
    learnt = whole.renderer.learnt
    if place not in learnt:
        learnt[place] = _find_start(whole, turn, floor) - floor
    return floor + int(learnt[place])


def _find_start(whole: ChatText, turn: int, floor: int) -> int:
    text, first = whole.text, whole.regions[turn].first
    start = _after_prompt(whole, turn, floor) if turn else _after_first_prompt(whole)
    if start is not None:
        before = whole.part(turn, prompt=True)
        asks = (before.text != replace(before, prompt=False).text) if turn else whole.renderer.generation_prompt
        if asks or not text[start:first].strip():
            return start
    # What follows stands there whatever the assistant says, so it opens the turn.
    try:
        other = whole.with_message(turn, {"role": whole.messages[turn]["role"], "content": MARK}).text
    except TEMPLATE_ERRORS:
        return first if start is None else start
    return max(start or floor, min(first, shared_length(text, other)))


def _after_prompt(whole: ChatText, turn: int, floor: int) -> int | None:
    """Return where the prompt of a turn ends in the whole chat, though the template may write both differently."""
    before, text, first = whole.part(turn, prompt=True), whole.text, whole.regions[turn].first
    if text.startswith(before.text) and floor <= len(before.text) <= first:
        return len(before.text)
    after_question, gap = before.text[before.regions[-1].last :], text[floor:first]
    shared = shared_length(after_question, gap)
    if shared < min(len(after_question), len(gap)):  # not in the middle of a word or a special token
        shared = max((end for end in whole.renderer.boundaries(gap) if end <= shared), default=0)
    prompt = whole.renderer.generation_prompt
    return None if prompt and shared <= len(after_question) - len(prompt) else floor + shared


def _after_first_prompt(whole: ChatText) -> int | None:
    """Return where the assistant's text starts in a chat that begins with its turn."""
    prompt, head = whole.renderer.generation_prompt, whole.text[: whole.regions[0].first]
    return head.rindex(prompt) + len(prompt) if prompt and prompt in head else None


def _stop(whole: ChatText, turn: int) -> int:
    """Return where a turn stops: behind what the template writes to end it."""
    end, messages = whole.regions[turn].last, whole.messages
    last = turn + 1 == len(messages)
    following = len(whole.text) if last else whole.regions[turn + 1].first
    tail = whole.text[end:following] if end <= following else whole.text[end:]
    place, learnt = ("stop", "" if last else messages[turn + 1]["role"], tail), whole.renderer.learnt
    if place not in learnt:
        learnt[place] = _find_stop(whole, turn) - end
    return end + int(learnt[place])


def _find_stop(whole: ChatText, turn: int) -> int:
    text, end, renderer = whole.text, whole.regions[turn].last, whole.renderer
    last = turn + 1 == len(whole.messages)
    short = whole if last else whole.part(turn + 1)
    tail = short.text[end if last or text.startswith(short.text) else short.regions[turn].last :]
    shared = shared_length(tail, text[end:])
    if tail and shared == len(tail) and not (last and _opens_a_turn(whole, tail)):
        return end + shared
    # Either another turn follows in `tail`, or the template ends its last turn in a way of its own. What ends this turn
    # is then the first special token that follows in all cases, or that follows the question too, or else blanks, or
    # the marker of the next role.
    for other in (tail, text[whole.regions[turn - 1].last :] if turn and not last else ""):
        ending = renderer.ending(other)
        if ending and text.startswith(ending.rstrip(), end):
            return end + shared_length(ending, text[end:])
    if blanks := shared - len(tail[:shared].lstrip()):
        return end + blanks
    marker = None if last else renderer.special.match(text, end)
    return end if marker is None else marker.end()


def _opens_a_turn(whole: ChatText, tail: str) -> bool:
    """Return whether what follows the last turn opens another one, which some templates always do."""
    if not whole.renderer.special.sub("", tail).strip():
        return False
    longer = replace(whole, messages=[*whole.messages, {"role": "user", "content": "?"}])
    try:
        return not longer.text.startswith(tail, longer.region(len(whole.messages) - 1).last)
    except (UnclearChat, *TEMPLATE_ERRORS):
        return False
