"""A chat in the terminal: one line per turn of the user, and the answers as they are written."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from transformers import TextStreamer, set_seed

from loram.base.errors import UserError
from loram.base.progress import without_bars
from loram.data.forms import Chat
from loram.data.messages import Message
from loram.generation.options import ChatOptions
from loram.generation.prompts import Prompt
from loram.generation.speaker import Speaker
from loram.generation.table import side_by_side

_COMMAND = re.compile(r"/[a-z]+")
_HELP = "/clear forgets the chat, /system TEXT sets the system prompt and forgets the chat, /exit ends it"
OnText = Callable[[str, str], None]


@dataclass(kw_only=True)
class Voice:
    """One of those who answer: the model with its adapter on or off, and the chat as that one knows it.

    Args:
        name: its name.
        adapted: whether the adapter is on.
        messages: the chat so far, without a system prompt.
    """

    name: str
    adapted: bool
    messages: list[Message] = field(default_factory=list)


class Conversation:
    """A chat with one voice, or with two that do not hear each other.

    Args:
        speaker: the model.
        voices: those who answer.
        system: the system prompt, or nothing.
    """

    def __init__(self, speaker: Speaker, voices: list[Voice], system: str = "") -> None:
        self.speaker, self.voices, self.system = speaker, voices, system

    def clear(self) -> None:
        """Forget all turns."""
        for voice in self.voices:
            voice.messages.clear()

    def answer(self, text: str, on_text: OnText) -> dict[str, str]:
        """Let every voice answer a user's turn, and return the answers by name. An answer that is stopped is forgotten.

        Args:
            text: the turn.
            on_text: gets the answers piece by piece: who speaks, and what.

        Raises:
            UserError: the chat template refuses the chat.
        """
        turn = {"role": "user", "content": text}
        answers = {voice.name: self._say(voice, turn, on_text) for voice in self.voices}
        for voice in self.voices:
            voice.messages += [turn, {"role": "assistant", "content": answers[voice.name]}]
        return answers

    def _say(self, voice: Voice, turn: Message, on_text: OnText) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = Prompt(chat=Chat(messages=[*system, *voice.messages, turn], turns=()), where="chat")
        tokens = self.speaker.encode(prompt)
        if self.speaker.too_long(tokens):
            _note("The chat may get longer than the model was made for: /clear forgets it.")
        streamer = _Streamer(self.speaker.tokenizer, partial(on_text, voice.name))
        (written,) = self.speaker.write([tokens], adapted=voice.adapted, streamer=streamer)
        return self.speaker.text(written)


class _Streamer(TextStreamer):
    """Hands over an answer piece by piece."""

    def __init__(self, tokenizer: Any, on_piece: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_piece = on_piece

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece."""
        self.on_piece(text)


def chat(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    options: ChatOptions | None = None,
    device: str | None = None,
    seed: int = 42,
    chat_template: str | Path | None = None,
    **fields: Any,
) -> None:
    """Chat with a model: lines of standard input are turns of the user, and answers go to standard output.

    The chat ends with the input, or with `/exit`. On a terminal, Ctrl-C stops an answer.

    Args:
        model: the hub id, folder or GGUF file of a full model, or a pruned or merged folder.
        adapter: the folder of a LoRA adapter that fits the model.
        options: how to chat; single options may be given by name instead.
        device: `cpu`, `cuda`, ... (default: the first GPU, or the CPU if there is none).
        seed: the seed of `do_sample`.
        chat_template: a .jinja file, or a model whose tokenizer has a template, in place of the model's own template.
        fields: single options by name, over `options`; see `ChatOptions`.

    Raises:
        UserError: the model or the adapter cannot be used, or there is no chat template.
    """
    settings = ChatOptions.of(options, **fields)
    if settings.compare and adapter is None:
        raise UserError("compare: shows answers without and with an adapter; name one with --adapter, or leave it out")
    speaker = Speaker(model, adapter, settings, device=device, chat_template=chat_template)
    name = speaker.checkpoint.name
    if not speaker.encoder.chats:
        raise UserError(
            f"{name}: has no chat template, so it cannot chat; give one with --chat-template (a .jinja file, or a "
            "folder with one, such as an adapter's), or let it continue plain text with `loram generate`"
        )
    voices = [Voice(name="base", adapted=False)] if settings.compare else []
    voices.append(Voice(name="base" if adapter is None else f"with {Path(adapter).name}", adapted=True))
    speaker.load()
    set_seed(seed)
    with without_bars() if settings.stream else contextlib.nullcontext():
        _talk(Conversation(speaker, voices, settings.system or ""), name)


def _talk(conversation: Conversation, name: str) -> None:
    """Read turns and commands, and print answers, until the input ends."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        _note(f"{name}: {_HELP}.")
    output = Console(width=None if sys.stdout.isatty() else 120)
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if _COMMAND.fullmatch(command):
            _obey(conversation, command, rest.strip())
        elif line:
            try:
                _print_answers(conversation, line, output)
            except (KeyboardInterrupt, UserError) as error:
                if not at_terminal:
                    raise
                print()
                _note(str(error) or "The answer was stopped, and is forgotten.")


def _lines() -> Iterator[str]:
    """Yield the lines of standard input without blanks around them; on a terminal each has a prompt."""
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a history and keys to edit the line
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _obey(conversation: Conversation, command: str, rest: str) -> None:
    if command not in ("/clear", "/system"):
        _note(f"{command} is not a command: {_HELP}.")
        return
    conversation.clear()
    if command == "/system":
        conversation.system = rest
    _note(f"The chat begins again, {'with a' if conversation.system else 'without a'} system prompt.")


def _note(text: str) -> None:
    """Tell the user something that is no part of the chat."""
    Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _print_answers(conversation: Conversation, text: str, output: Console) -> None:
    """Print the answer while it is written, or two answers side by side."""
    if len(conversation.voices) == 1:
        conversation.answer(text, lambda _, piece: print(piece, end="", flush=True))
        print()
        return
    pieces = {voice.name: "" for voice in conversation.voices}
    with Live(console=output, transient=True) as live:

        def show(name: str, piece: str) -> None:
            pieces[name] += piece
            live.update(side_by_side(pieces))

        answers = conversation.answer(text, show)
    output.print(side_by_side(answers))
