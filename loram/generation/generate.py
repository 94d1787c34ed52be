"""Answer or continue prompts in batches."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import set_seed

from loram.base.errors import UserError
from loram.base.progress import track
from loram.data.messages import Message
from loram.data.spec import DataSpec, as_spec
from loram.generation.options import GenerateOptions
from loram.generation.prompts import Prompt, prompt_from, read_prompts
from loram.generation.speaker import Speaker

logger = logging.getLogger(__name__)

Prompts = DataSpec | str | Path | Mapping[str, Any] | Sequence[str | Sequence[Message] | Prompt]


class Generated(BaseModel):
    """What a model has written.

    Args:
        prompt: the prompt: its text, or its messages where these are more than a single one of a user.
        text: what the model wrote, without special tokens.
        tokens: how many tokens it wrote, with the one that ends its answer if it came to an end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | list[Message]
    text: str
    tokens: int


def generate(model: str | Path, prompts: Prompts, **options: Any) -> list[Generated]:
    """Let a model continue prompts: an answer to each as a chat, or plain text.

    With the default options each token is the likeliest one, and what a prompt gets does not depend on the others. What
    `generation_config.json` in the model's folder says beside these options holds too, as in transformers.

    Args:
        model: the hub id, folder or GGUF file of a full model, or a pruned or merged folder.
        prompts: a list of texts, or of chats as lists of messages; or the data set that has them (see
            `loram.generation.prompts.read_prompts`).
        options: the keyword arguments of `written`: `adapter`, `device`, `seed`, `chat_template`, and the fields of
            `GenerateOptions`, such as `max_new_tokens=64` or `load_in_4bit=True`.

    Raises:
        UserError: the model, the adapter or a prompt cannot be used.
    """
    return list(written(model, prompts, **options))


def written(
    model: str | Path,
    prompts: Prompts,
    *,
    adapter: str | Path | None = None,
    options: GenerateOptions | None = None,
    device: str | None = None,
    seed: int = 42,
    chat_template: str | Path | None = None,
    **fields: Any,
) -> Iterator[Generated]:
    """Yield what a model writes, in the order of the prompts, as soon as their batch is done; see `generate`.

    Args:
        model, prompts: as in `generate`.
        adapter: the folder of a LoRA adapter that fits the model: a recovered adapter for the full model, or a trained
            one for its pruned model.
        options: how to generate; single options may be given by name instead.
        device: `cpu`, `cuda`, ... (default: the first GPU, or the CPU if there is none).
        seed: the seed of `do_sample`.
        chat_template: a .jinja file, or a model whose tokenizer has a template, in place of the model's own template.
        fields: single options by name, over `options`; see `GenerateOptions`.
    """
    settings = GenerateOptions.of(options, **fields)
    chosen, chats = _read(prompts)
    chats = chats and settings.apply_chat_template
    speaker = Speaker(model, adapter, settings, chats=chats, device=device, chat_template=chat_template)
    encoded = [speaker.encode(prompt) for prompt in chosen]
    if count := sum(map(speaker.too_long, encoded)):
        logger.warning(
            "%s: %d of %d prompts, with their answers, may be longer than the model was made for",
            speaker.checkpoint.name,
            count,
            len(encoded),
        )
    set_seed(seed)
    starts = range(0, len(encoded), settings.together)
    for start in track(starts, "Generating"):
        batch = slice(start, start + settings.together)
        for prompt, tokens in zip(chosen[batch], speaker.write(encoded[batch]), strict=True):
            yield Generated(prompt=prompt.content, text=speaker.text(tokens), tokens=len(tokens))


def _read(prompts: Prompts) -> tuple[list[Prompt], bool]:
    """Return the prompts, and whether those that can be a chat or plain text may be chats."""
    if isinstance(prompts, DataSpec | str | Path | Mapping):
        spec = as_spec(prompts)
        return read_prompts(spec), spec.apply_chat_template
    if not prompts:
        raise UserError("generate: there is no prompt")
    return [
        prompt if isinstance(prompt, Prompt) else prompt_from(prompt, f"prompt {number}")
        for number, prompt in enumerate(prompts, 1)
    ], True
