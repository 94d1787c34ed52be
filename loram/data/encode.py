"""One example -> token ids and labels."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from loram.base.errors import UserError
from loram.data.batches import IGNORED
from loram.data.chat import find_turns
from loram.data.forms import Chat, Completion, Example, Text
from loram.data.template import TEMPLATE_ERRORS, Renderer, Span, UnclearChat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFUSED = "the tokenizer's chat template refuses this chat"
Encoded = tuple[list[int], list[int]]  # (token ids, labels), of the same length


class Encoder:
    """A tokenizer, and how rows that can be a chat or plain text are written.

    Args:
        tokenizer: a tokenizer of transformers.
        chats: whether such rows are chats, where the tokenizer has a chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, chats: bool = True) -> None:
        self.tokenizer = tokenizer
        self.chats = chats and bool(tokenizer.chat_template)
        self.renderer = Renderer(tokenizer)
        self.unused: Counter[str] = Counter()  # what the chat template leaves out on purpose

    def encode(self, example: Example, max_length: int, where: str) -> Iterator[Encoded]:
        """Yield the token ids and labels of an example; a text that is longer than `max_length` gives several pieces.

        Raises:
            UserError: the tokenizer has no chat template or end token that the example needs, or the template refuses
                a chat, leaves out a part of it, or does not show where the turns are. `where` begins the message.
        """
        if isinstance(example, Text):
            ids, _ = self._plain(example.text, 0, where)
            for start in range(0, len(ids), max_length):
                piece = ids[start : start + max_length]
                yield piece, list(piece)
        elif isinstance(example, Completion):
            yield self._plain(example.prompt + example.completion, len(example.prompt), where)
        elif example.plain is not None and not self.chats:
            yield from self.encode(example.plain, max_length, where)
        else:
            yield self._chat(example, where)

    def encode_prompt(self, chat: Chat, where: str) -> list[int]:
        """Return the token ids of a chat up to where the assistant begins to write its next turn.

        A chat that has a plain form is continued in it if chats are not to be written, or cannot be.

        Raises:
            UserError: as in `encode`.
        """
        if chat.plain is not None and not self.chats:
            return [*self._first(chat.plain.prompt), *self._tokens(chat.plain.prompt)[0]]
        self._check_chat(chat, where)
        messages = [
            self.renderer.write_calls(message) if "tool_calls" in message else message for message in chat.messages
        ]
        try:
            return self._tokens(self.renderer.render(messages, chat.tools, prompt=True))[0]
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{where}: {_REFUSED}: {error}") from error

    def _plain(self, text: str, prompt: int, where: str) -> Encoded:
        """Return a text with one end token behind it; what follows its first `prompt` characters is in the loss.

        A beginning or end token that the text has already is not added again.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise UserError(f"{where}: plain text ends with the end-of-sequence token, but the tokenizer names none")
        ids, spans = self._tokens(text)
        labels = [token if stop > prompt else IGNORED for token, (_, stop) in zip(ids, spans, strict=True)]
        first = self._first(text)
        rest = [] if text.rstrip().endswith(self.tokenizer.eos_token) else [end]
        return [*first, *ids, *rest], [*((IGNORED if prompt else token) for token in first), *labels, *rest]

    def _first(self, text: str) -> list[int]:
        """Return the tokens that belong before a text; none where it begins with the beginning token already."""
        beginning = self.tokenizer.bos_token
        return [] if beginning and text.lstrip().startswith(beginning) else self._added_first

    @cached_property
    def _added_first(self) -> list[int]:
        """The tokens that the tokenizer puts before each text by itself."""
        ids, plain = (list(self.tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (True, False))
        return next(ids[:at] for at in range(len(ids)) if ids[at : at + len(plain)] == plain)

    def _chat(self, chat: Chat, where: str) -> Encoded:
        self._check_chat(chat, where)
        try:
            turns = find_turns(chat, self.renderer)
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{where}: {_REFUSED}: {error}") from error
        except UnclearChat as error:
            raise UserError(
                f"{where}: the tokenizer's chat template {error}; change the row, or use another chat template"
            ) from error
        self.unused.update(turns.unused)
        ids, places = self._tokens(turns.text)
        # A token that begins in the blanks behind a turn, and goes on, belongs to what follows.
        ends = [start + len(turns.text[start:stop].rstrip()) for start, stop in turns.spans]
        spans = [(start, stop, end) for (start, stop), end in zip(turns.spans, ends, strict=True)]
        inside = [
            any((first < end and last > start) or (start <= first and last <= stop) for start, stop, end in spans)
            for first, last in places
        ]
        return ids, [token if wanted else IGNORED for token, wanted in zip(ids, inside, strict=True)]

    def _check_chat(self, chat: Chat, where: str) -> None:
        """Refuse a chat where none can be written, and a prompt that a chat template has written already."""
        if not self.chats:
            reason = "this row is a chat, but the tokenizer has no chat template; use prompt and completion"
            if self.tokenizer.chat_template:
                reason = "this row is a chat and has no other form; leave apply_chat_template as it is"
            raise UserError(f"{where}: {reason}")
        if chat.plain is not None and (token := self.renderer.special.match(chat.plain.prompt.lstrip())):
            raise UserError(
                f"{where}: the prompt begins with {token.group()!r}, so a chat template has written it already; "
                "set apply_chat_template to false"
            )

    def _tokens(self, text: str) -> tuple[list[int], Sequence[Span]]:
        """Return a text's tokens, without those that the tokenizer adds, and the characters that each stands for."""
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{self.tokenizer.name_or_path}: this tokenizer does not tell where its tokens stand in a text; use "
                "the fast version of it (a folder with tokenizer.json)"
            )
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoding["input_ids"]), encoding["offset_mapping"]
