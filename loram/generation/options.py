"""Options of generation, under the names that transformers gives them."""

from typing import ClassVar, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from loram.base.options import Options, option


class DecodingOptions(Options):
    """How a model is held, and how it chooses tokens."""

    max_new_tokens: PositiveInt = option(256, "Stop an answer after this many tokens.", common=True)
    do_sample: bool = option(
        False, "Draw each token by its probability, instead of taking the likeliest one.", common=True
    )
    temperature: PositiveFloat | None = option(
        None, "With --do-sample: divide the logits by this (default: the model's own, else 1)."
    )
    top_p: float | None = option(
        None,
        "With --do-sample: draw among the likeliest tokens that together have this probability (default: the model's "
        "own, else 1).",
        gt=0,
        le=1,
    )
    load_in_4bit: bool = option(False, "Hold the model in 4 bits (NF4), as training does.")
    stream: bool = option(
        False, "Never load the model: read it from disk layer by layer, once per new token, which is slow."
    )

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None and not self.do_sample:
                raise ValueError(f"{name}: is for drawn tokens; add do_sample, or leave it out")
        if self.load_in_4bit and self.stream:
            raise ValueError("load_in_4bit: what is streamed is never loaded; leave it or stream out")
        return self


class GenerateOptions(DecodingOptions):
    """How to continue prompts; see `loram.generation.generate.generate`."""

    stage: ClassVar[str] = "generate"

    batch_size: PositiveInt | None = option(
        None, "How many prompts to continue at a time (default: 8; with --stream 64, since they share each reading)."
    )
    apply_chat_template: bool = option(
        True, "Write a prompt as a user's turn, where the tokenizer has a chat template, and not as plain text."
    )

    @property
    def together(self) -> int:
        """Return how many prompts are continued at a time."""
        return self.batch_size or (64 if self.stream else 8)


class ChatOptions(DecodingOptions):
    """How to chat; see `loram.generation.chat.chat`."""

    stage: ClassVar[str] = "chat"

    system: str | None = option(None, "The system prompt.", common=True)
    compare: bool = option(False, "Let the model answer without and with the adapter, side by side.", common=True)
