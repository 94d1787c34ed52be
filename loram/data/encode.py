"""One example -> token ids and labels."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loram.base.errors import UserError
from loram.data.batches import IGNORED
from loram.data.chat import TEMPLATE_ERRORS, Renderer, Span, UnclearChat, find_turns
from loram.data.forms import Chat, Completion, Example, Text
from loram.data.messages import REASONING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READ = {"role", "content", "tool_calls", *REASONING}  # what `find_turns` looks after
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
        self.unused: Counter[str] = Counter()  # keys of messages that the chat template does not name

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

    def _plain(self, text: str, prompt: int, where: str) -> Encoded:
        """Return a text with one end token behind it; what follows its first `prompt` characters is in the loss.

        A beginning or end token that the text has already is not added again.
        """
        end, beginning = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if end is None:
            raise UserError(f"{where}: plain text ends with the end-of-sequence token, but the tokenizer names none")
        ids, spans = self._tokens(text, special=True)
        if beginning is not None and ids[:2] == [beginning, beginning]:
            ids, spans = ids[1:], spans[1:]
        while ids[-1:] == [end]:
            ids, spans = ids[:-1], spans[:-1]
        labels = [token if stop > prompt else IGNORED for token, (_, stop) in zip(ids, spans, strict=True)]
        return [*ids, end], [*labels, end]

    def _chat(self, chat: Chat, where: str) -> Encoded:
        if not self.chats:
            reason = "this row is a chat, but the tokenizer has no chat template; use prompt and completion"
            if self.tokenizer.chat_template:
                reason = "this row is a chat and has no other form; leave apply_chat_template as it is"
            raise UserError(f"{where}: {reason}")
        self._check_unrendered(chat, where)
        try:
            text, turns = find_turns(chat, self.renderer)
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{where}: the tokenizer's chat template refuses this chat: {error}") from error
        except UnclearChat as error:
            raise UserError(
                f"{where}: the tokenizer's chat template {error}; change the row, or use another chat template"
            ) from error
        template = self.tokenizer.get_chat_template(tools=list(chat.tools) or None)
        self.unused.update(
            f"{key} of messages" for m in chat.messages for key in m if key not in _READ and key not in template
        )
        ids, spans = self._tokens(text, special=False)
        inside = [any(start < last and stop > first for first, last in turns) for start, stop in spans]
        return ids, [token if wanted else IGNORED for token, wanted in zip(ids, inside, strict=True)]

    def _check_unrendered(self, chat: Chat, where: str) -> None:
        """Refuse a prompt that a chat template has written already, because it would be written twice."""
        if chat.plain is not None and (token := self.renderer.special.match(chat.plain.prompt.lstrip())):
            raise UserError(
                f"{where}: the prompt begins with {token.group()!r}, so a chat template has written it already; "
                "set apply_chat_template to false"
            )

    def _tokens(self, text: str, *, special: bool) -> tuple[list[int], Sequence[Span]]:
        """Return a text's tokens, and the characters that each stands for; `special` lets the tokenizer add its own."""
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{self.tokenizer.name_or_path}: this tokenizer does not tell where its tokens stand in a text; use "
                "the fast version of it (a folder with tokenizer.json)"
            )
        encoding = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        return list(encoding["input_ids"]), encoding["offset_mapping"]
