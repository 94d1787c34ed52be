"""A model that writes: in memory or read from disk, with its adapter on or off."""

import contextlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from loram.base.paths import local
from loram.compute.belonging import load_for
from loram.compute.decoding import StreamedDecoder
from loram.compute.device import pick_device
from loram.compute.loading import load_tokenizer
from loram.compute.resident import load_adapted
from loram.data.encode import Encoder
from loram.data.tokens import check_tokenizer, check_tokens
from loram.disk.opening import open_model
from loram.generation.options import DecodingOptions
from loram.generation.prompts import Prompt

_GENERATION_CONFIG = "generation_config.json"


class Speaker:
    """A model with its tokenizer, ready to write.

    Args:
        model: the hub id, folder or GGUF file of a full model, or a pruned or merged folder.
        adapter: the folder of a LoRA adapter that fits it.
        options: how the model is held, and how it chooses tokens.
        chats: whether prompts that can be a chat or plain text are chats, where the tokenizer has a chat template.
        device: `cpu`, `cuda`, ... (default: the first GPU, or the CPU if there is none).
        chat_template: what takes the place of the model's chat template; see `loram.disk.template.read_template`.

    Raises:
        UserError: the model or the adapter cannot be used, or they do not fit each other.
    """

    def __init__(
        self,
        model: str | Path,
        adapter: str | Path | None,
        options: DecodingOptions,
        *,
        chats: bool = True,
        device: str | None = None,
        chat_template: str | Path | None = None,
    ) -> None:
        self.checkpoint = open_model(model, chat_template=chat_template)
        self._adapter = None if adapter is None else load_for(self.checkpoint, local(adapter))
        self.device = pick_device(device)
        self.tokenizer: Any = load_tokenizer(self.checkpoint)
        check_tokenizer(self.tokenizer, self.checkpoint.vocabulary)
        self.encoder = Encoder(self.tokenizer, chats=chats)
        self.options = options

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            UserError: it cannot be written for this model; names its place.
        """
        ids = self.encoder.encode_prompt(prompt.chat, prompt.where)
        check_tokens(ids, self.checkpoint.vocabulary, self.tokenizer, prompt.where)
        return ids

    def too_long(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt and an answer of full length are more tokens than the model was made for."""
        limit = self.checkpoint.architecture.text_config(self.checkpoint.config).get("max_position_embeddings")
        return limit is not None and len(prompt) + self.options.max_new_tokens > limit

    def load(self) -> None:
        """Load the model now, and not with the first prompt; a streamed one is never loaded."""
        _ = self._loaded

    def write(
        self, prompts: Sequence[list[int]], *, adapted: bool = True, streamer: TextStreamer | None = None
    ) -> list[list[int]]:
        """Return what follows each of several prompts, as token ids up to and including the end token.

        Args:
            prompts: their token ids; none is empty.
            adapted: whether the adapter is on.
            streamer: gets the tokens of a single prompt while they are written.
        """
        (model, without_adapter), width, config = self._loaded, max(map(len, prompts)), self._config
        ids = torch.tensor([[config.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        where = torch.device("cpu") if self.options.stream else self.device
        with contextlib.nullcontext() if adapted else without_adapter():
            written = model.generate(
                input_ids=ids.to(where), attention_mask=mask.to(where), generation_config=config, streamer=streamer
            )
        return [_until(row, config.eos_token_id) for row in written[:, width:].tolist()]

    @cached_property
    def _loaded(self) -> tuple[Any, Callable[[], contextlib.AbstractContextManager[None]]]:
        """The model, and what takes its adapter off while a block runs."""
        if self.options.stream:
            decoder = StreamedDecoder(self.checkpoint, self._adapter, self.device)
            return decoder.model, decoder.without_adapter
        model, _ = load_adapted(self.checkpoint, self._adapter, self.device, in_4bit=self.options.load_in_4bit)
        return model, contextlib.nullcontext if self._adapter is None else model.disable_adapter

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens as text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @property
    def _config(self) -> GenerationConfig:
        """How transformers generates: as the model's own file says, but for what the options say."""
        folder, options = self.checkpoint.folder, self.options
        own = (folder / _GENERATION_CONFIG).is_file()
        config = GenerationConfig.from_pretrained(folder) if own else GenerationConfig()
        ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
        names = [self.tokenizer.eos_token, self.encoder.renderer.end_of_turn if self.encoder.chats else ""]
        ends = sorted({*ends, *self.tokenizer.convert_tokens_to_ids([name for name in names if name])})
        drawing = {name: getattr(options, name) for name in ("temperature", "top_p")}
        config.update(
            max_new_tokens=options.max_new_tokens,
            do_sample=options.do_sample,
            eos_token_id=ends,
            pad_token_id=ends[0],  # padding is masked, and nobody reads it
            use_cache=not options.stream,
            cache_implementation=None,  # the usual cache that grows, whatever a file of an older version says
            **{name: value for name, value in drawing.items() if value is not None},
        )
        return config


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return tokens up to and including the first end token."""
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
