"""Whatever a chat template writes, exactly the assistant's text and what ends it are in the loss."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loram.data.batches import IGNORED
from loram.data.chat import find_turns
from loram.data.encode import Encoder
from loram.data.forms import Chat
from loram.data.messages import Message
from loram.data.template import TEMPLATE_ERRORS, Renderer, UnclearChat

SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
OPEN, CLOSE = "\ue100", "\ue101"  # they stand around what should be in the loss


def make_tokenizer(template: str) -> Any:
    """A tokenizer that has one token per character, and special tokens."""
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


def make_chat(messages: Sequence[Message], **more: Any) -> Chat:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return Chat(**{"messages": messages, "turns": turns, **more})


def in_loss(template: str, chat: Chat) -> str:
    """Return the text of the tokens in the loss, with a bar between the turns."""
    tokenizer = make_tokenizer(template)
    [(ids, labels)] = Encoder(tokenizer).encode(chat, 1000, "rows.jsonl:1")
    groups = itertools.groupby(labels, key=lambda label: label != IGNORED)
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    return "|".join(tokenizer.decode(list(group)) for inside, group in groups if inside)


def say(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


@dataclass(frozen=True)
class Style:
    """How a template writes chats.

    Args:
        bos: what it begins with.
        system: where it writes the system prompt: in a turn of its own (with a default), or before a question.
        user, assistant: what begins a turn.
        user_end, end: what ends a turn.
        last_end: what it writes behind the last turn besides.
        prompt: where the beginning of the assistant's turn comes from: the flag, the question, the answer, or always.
        thought: whether an empty thought stands before the last answer, or thoughts are dropped from earlier ones.
        trim: whether contents lose their blanks.
    """

    bos: str
    system: str
    user: str
    assistant: str
    user_end: str
    end: str
    last_end: str
    prompt: str
    thought: str
    trim: bool

    def template(self, opening: str = "", closing: str = "") -> str:
        """Return the template, which writes two marks around what should be in the loss."""

        def q(text: str) -> str:
            return "{{ '" + text.replace("\n", "\\n") + "' }}" if text else ""

        content = "{{ m.content | trim }}" if self.trim else "{{ m.content }}"
        system = {
            "own": "",
            "first": "{% if sys and loop.first %}{{ sys }}\n\n{% endif %}",
            "last": "{% if sys and m == users[-1] %}{{ sys }}\n\n{% endif %}",
        }[self.system]
        own = "{{ sys or 'A default.' }}" if self.system == "own" else ""
        thought = {
            "none": "",
            "empty": "{% if loop.last %}" + q("<think>\n\n</think>\n\n") + "{% endif %}",
            "last": "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}",
        }[self.thought]
        by_flag, by_question, always = (
            q(self.assistant) if self.prompt == kind else "" for kind in ("flag", "question", "always")
        )
        by_answer = "" if self.prompt == "question" else q(self.assistant)
        return "".join(
            [
                "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}",
                "{% set rest = messages[1:] if sys else messages %}",
                "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}",
                q(self.bos) + (q(self.user) + own + q(self.user_end) if own else ""),
                "{% for m in rest %}{% if m.role == 'user' %}",
                q(self.user) + system + content + q(self.user_end) + by_question,
                "{% else %}",
                by_answer + opening + thought + content + q(self.end),
                "{% if loop.last %}" + q(self.last_end) + "{% endif %}" + closing,
                "{% endif %}{% endfor %}",
                "{% if add_generation_prompt %}" + by_flag + "{% endif %}" + always,
            ]
        )


@st.composite
def styles(draw: st.DrawFn) -> Style:
    marks = [
        ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        ("### User:\n", "### Assistant:\n", "\n\n"),
        ("USER: ", " ASSISTANT: ", ""),
        ("[INST] ", "[/INST]", ""),
        ("<|im_start|>", "<|im_end|>", ""),
    ]
    prompt = draw(st.sampled_from(["flag", "question", "answer", "always"]))
    # Where the assistant's turn is always open, only a special token tells what ends an answer from what opens one.
    user, assistant, user_end = draw(st.sampled_from(marks[:2] if prompt == "always" else marks))
    ends = ["<|im_end|>\n", "<eos>"] if prompt == "always" else ["<|im_end|>\n", "<eos>", "\n\n", "", " <eos>\n"]
    return Style(
        bos=draw(st.sampled_from(["", "<bos>"])),
        system=draw(st.sampled_from(["own", "first", "last"])),
        user=user,
        assistant=assistant,
        user_end=user_end,
        end=draw(st.sampled_from(ends)),
        last_end="" if prompt == "always" else draw(st.sampled_from(["", "<eos>"])),
        prompt=prompt,
        # Only a generation prompt tells a thought that the template adds from the beginning of a turn.
        thought=draw(st.sampled_from(["none", "empty", "last"])) if prompt == "flag" else "none",
        trim=draw(st.booleans()),
    )


@st.composite
def chats(draw: st.DrawFn) -> list[Message]:
    texts = st.one_of(
        st.sampled_from(["a", "four.", "User", "### User:\n", "two\nlines\n\n", "  blanks ", "[INST]", "ä→日", "a.\n"]),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cc"]), min_size=1, max_size=8),
    ).filter(str.strip)
    system = [say("system", draw(texts))] if draw(st.booleans()) else []
    questions = draw(st.lists(texts, min_size=1, max_size=3, unique_by=str.strip))
    turns = [[say("user", question), say("assistant", draw(texts))] for question in questions]
    if draw(st.booleans()) and not system:
        turns[0] = turns[0][1:]  # the chat begins with the assistant
    if draw(st.booleans()):
        turns[-1][-1]["reasoning_content"] = "so it is"
    return [*system, *itertools.chain(*turns)]


@settings(max_examples=300, deadline=None)
@given(styles(), chats())
def test_exactly_the_assistants_text_and_what_ends_it_are_in_the_loss(style: Style, messages: list[Message]) -> None:
    if style.thought != "last":
        messages = [say(message["role"], message["content"]) for message in messages]
    elif style.system == "last" and not any(message["role"] == "user" for message in messages):
        return
    if not style.end:
        messages = [{**message, "content": message["content"].rstrip()} for message in messages]
    expected = Renderer(make_tokenizer(style.template(OPEN, CLOSE))).render(messages)
    if not style.end:  # then the next role's marker ends a turn, if it is one token and follows at once
        expected = re.sub(f"{CLOSE}({'|'.join(map(re.escape, SPECIAL))})", rf"\1{CLOSE}", expected)
    plain = expected.replace(OPEN, "").replace(CLOSE, "")
    turns = find_turns(make_chat(messages), Renderer(make_tokenizer(style.template())))
    assert turns.text == plain
    assert _show(turns.text, turns.spans) == expected


def _show(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Put the marks around the spans of a text."""
    for start, stop in sorted(spans, reverse=True):
        text = text[:start] + OPEN + text[start:stop] + CLOSE + text[stop:]
    return text


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CHATS: dict[str, list[Message]] = {
    "two turns": [say("user", "hi"), say("assistant", "four."), say("user", "and?"), say("assistant", "five")],
    "system": [say("system", "Be short."), say("user", "hi"), say("assistant", "four.")],
    "thoughts": [
        say("user", "hi"),
        say("assistant", "four.", reasoning_content="let me see"),
        say("user", "and?"),
        say("assistant", "five", reasoning_content="one more"),
    ],
    "calls": [
        say("user", "weather?"),
        say("assistant", "", tool_calls=[CALL]),
        say("tool", "sunny", name="weather"),
        say("assistant", "It is sunny."),
    ],
}


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja") if "training" not in path.stem))
def test_masks_are_those_of_trl(name: str) -> None:
    """TRL has a version of some templates that marks the assistant's text, for its option `assistant_only_loss`.

    Some of these put the generation prompt, or its end, into the loss as well; for us the prompt gives it.
    """
    training = TEMPLATES / f"{name}_training.jinja"
    if not training.is_file():
        pytest.skip("TRL has no version of this template for training")
    compared = 0
    for kind, messages in CHATS.items():
        if (name, kind) == ("diffusion_gemma", "calls"):
            continue  # for us the token that asks for the tool's answer ends the turn, and TRL leaves it out
        ours, theirs = (with_special_tokens(path.read_text()) for path in (TEMPLATES / f"{name}.jinja", training))
        try:
            turns = find_turns(make_chat(messages), ours)
            marked = merged(theirs.generation_spans(messages))
        except (UnclearChat, *TEMPLATE_ERRORS):
            continue  # the template has no place for a part of the chat
        text, spans = turns.text, turns.spans
        if theirs.render(messages) != text:
            continue  # the version for training writes another text
        compared += 1
        assert [stop for _, stop in spans] == [stop for _, stop in marked], text
        for turn, (start, _), (other, _) in zip(make_chat(messages).turns, spans, marked, strict=True):
            before = [ours.write_calls(m) if "tool_calls" in m else m for m in messages[:turn]]
            assert text[other:start] in ours.render(before, prompt=True), text
    if not compared:
        pytest.skip("the version for training writes other texts")


def with_special_tokens(template: str) -> Renderer:
    """A template with a tokenizer to which everything that looks like a special token is one."""
    tokenizer = make_tokenizer(template)
    names = set(re.findall("<[|\uff5c][^<>\\s']+[|\uff5c]>|<\\w+_of_\\w+>", template))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(names)})
    return Renderer(tokenizer)


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans that touch."""
    result: list[tuple[int, int]] = []
    for start, stop in spans:
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, stop))
    return result


def test_without_a_generation_prompt_thoughts_and_calls_are_in_the_loss() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% else %}"
        "{% if m.reasoning_content %}{{ '[THINK]' + m.reasoning_content + '[/THINK]' }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ '[CALL]' + c.function.name }}{% endfor %}"
        "{{ m.content + '<eos>' }}{% endif %}{% endfor %}"
    )
    for answer, text in (
        (say("assistant", "four.", reasoning_content="so"), "[THINK]so[/THINK]four.<eos>"),
        (say("assistant", "pre", tool_calls=[CALL]), "[CALL]weatherpre<eos>"),
        (say("assistant", "four."), "four.<eos>"),
    ):
        assert in_loss(template, make_chat([say("user", "hi"), answer])) == text


def test_blanks_behind_a_turn_do_not_take_in_what_follows() -> None:
    """Mistral 7B v0.1 writes a blank behind the end token, which is one token with the bracket that follows."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}"
    )
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*"[]INST/ab. ", " ["])}, merges=[(" ", "[")]))
    inner.add_special_tokens(["<eos>"])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, eos_token="<eos>")
    messages = [say("user", "a"), say("assistant", "b."), say("user", "a"), say("assistant", "b.")]
    [(_ids, labels)] = Encoder(tokenizer).encode(make_chat(messages), 1000, "rows.jsonl:1")
    learnt = tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED])
    assert "".join(learnt) == "b.<eos>b.<eos> "


def test_a_long_chat_is_not_rendered_for_each_of_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {"user": "<|im_start|>user\n", "assistant": "<|im_start|>assistant\n", "user_end": "<|im_end|>\n"}
    rest = {"bos": "", "system": "own", "last_end": "", "prompt": "flag", "thought": "none", "trim": False}
    style = Style(**marks, **rest, end=marks["user_end"])  # type: ignore[arg-type]
    renderer, calls = Renderer(make_tokenizer(style.template())), []
    render = renderer.render
    monkeypatch.setattr(renderer, "render", lambda *args, **options: calls.append(1) or render(*args, **options))
    messages = [say(role, f"{number}") for number in range(100) for role in ("user", "assistant")]
    turns = find_turns(make_chat(messages), renderer)
    assert len(turns.spans) == 100
    assert len(calls) < 20
