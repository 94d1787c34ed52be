"""Models that hold a text model beside towers for images: one row per wrapper. No weights, no torch.

LoRAM prunes and trains the text model, which is an ordinary causal language model of a supported family. Here is where
it lies in the wrapper: in config.json, in checkpoint files, and among the modules that an adapter names.

Names of the text model alone begin with `model.` or are those of the head; in the wrapper they begin with
`model.language_model.` or are those of the same head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from loram.base.errors import UserError
from loram.model.families import ARCHITECTURES, PRUNED_PREFIX, is_pruned

_DECODER, _HEAD = "model", "lm_head"  # of the text model alone

# What checkpoint files call the text model's decoder and head -> what the text model calls them. The first prefix that
# fits counts. transformers reads all of these spellings; it writes the second or the first, as its version decides.
_SPELLINGS = MappingProxyType(
    {
        "model.language_model.": f"{_DECODER}.",
        "language_model.model.": f"{_DECODER}.",
        "language_model.lm_head.": f"{_HEAD}.",
        "language_model.": f"{_DECODER}.",
        "lm_head.": f"{_HEAD}.",
    }
)
# What a wrapper's config.json may say of the text model outside `text_config`; there it counts more than inside.
_OF_THE_TEXT = (
    *("tie_word_embeddings", "torch_dtype", "dtype", "quantization_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_NOW: Mapping[str, str] = {"torch_dtype": "dtype"}  # an older key -> what transformers calls it today


def _sizes(vocabulary: int, hidden: int, intermediate: int | None, layers: int, heads: int) -> Mapping[str, int]:
    return MappingProxyType(
        {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            **({} if intermediate is None else {"intermediate_size": intermediate}),  # where layers have experts alone
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
    )


# transformers' defaults by the text model's family, since `text_config` often has only what differs from them
_DEFAULTS = MappingProxyType(
    {
        "gemma3_text": _sizes(262_208, 2304, 9216, 26, 8),
        "gemma4_text": _sizes(262_144, 2304, 9216, 30, 8),
        "llama": _sizes(32_000, 4096, 11_008, 32, 32),
        "ministral3": _sizes(131_072, 4096, 14_336, 34, 32),
        "qwen3_5_text": _sizes(248_320, 4096, 12_288, 32, 16),
        "qwen3_5_moe_text": _sizes(248_320, 2048, None, 40, 16),
        "mistral": _sizes(32_000, 4096, 14_336, 32, 32),
        **dict.fromkeys(("qwen2", "qwen3"), _sizes(151_936, 4096, 22_016, 32, 32)),
    }
)


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """One kind of wrapped model.

    Args:
        model_type: transformers' name of it. Around a pruned text model it is `loram_gemma3` in place of `gemma3`.
        model_class: transformers' class of it.
        families: the families that its text model may be of, transformers' default first. Nobody has looked at others:
            a wrapper may compute something else with them than the text model alone does.
        decoder: the path of the text model's decoder inside the wrapped model.
        softcap: whether the wrapped model's head has the text model's softcap.
    """

    model_type: str
    model_class: str
    families: tuple[str, ...]
    decoder: str = "model.language_model"
    softcap: bool = False

    @property
    def spellings(self) -> Mapping[str, str]:
        """What checkpoint files call the text model's parts -> what the text model calls them, as prefixes."""
        return _SPELLINGS

    def unwrapped(self, stored: str) -> str | None:
        """Return the text model's own name of a tensor in a checkpoint file, or None where it is not the text model's.

        Example: `language_model.model.layers.3.mlp.up_proj.weight` -> `model.layers.3.mlp.up_proj.weight`.
        """
        for prefix, own in self.spellings.items():
            if stored.startswith(prefix):
                return own + stored.removeprefix(prefix)
        return None

    def outside(self, name: str) -> str:
        """Return the wrapped model's name of a module or tensor of its text model.

        Example: `model.layers.3.mlp.up_proj` -> `model.language_model.layers.3.mlp.up_proj`.
        """
        prefix = f"{_DECODER}."
        return f"{self.decoder}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    def inside(self, name: str) -> str | None:
        """Return the text model's own name of a module or tensor of the wrapped model; the inverse of `outside`.

        None stands for what is not in the text model.
        """
        prefix = f"{self.decoder}."
        if name.startswith(prefix):
            return f"{_DECODER}.{name.removeprefix(prefix)}"
        return name if name.partition(".")[0] == _HEAD else None

    def text_config(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return what the text model's own config.json would be.

        Args:
            config: the content of the wrapper's config.json.
            where: what the error message calls that file.

        Raises:
            UserError: there is no `text_config`, or its family is not supported.
        """
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise UserError(f"{where}: model_type {self.model_type!r} needs a text_config, and there is none")
        family = str(text.get("model_type") or self.families[0]).removeprefix(PRUNED_PREFIX)
        known = [name for name in self.families if name in ARCHITECTURES]
        if family not in known:
            raise UserError(
                f"{where}: model_type {self.model_type!r} holds a text model of type {family!r}, which is not "
                f"supported there; supported are {', '.join(known)}"
            )
        softcap = None if self.softcap else ARCHITECTURES[family].logit_softcap
        said = {key: config[key] for key in _OF_THE_TEXT if config.get(key) is not None}
        return {
            **_DEFAULTS.get(family, {}),
            **{_NOW.get(key, key): value for key, value in {**text, **said}.items()},
            **({} if softcap is None else {softcap.key: None}),  # most wrappers' heads have none
            "model_type": text["model_type"] if is_pruned(text) else family,
            "architectures": text["architectures"] if is_pruned(text) else [ARCHITECTURES[family].model_class],
        }

    def untied(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of the wrapper's config.json for a head that does not share the embedding's weight."""
        off = {"tie_word_embeddings": False}  # tools differ in which of the two they read
        return {**config, **off, "text_config": {**config["text_config"], **off}}


_ROWS = (
    Wrapper(model_type="gemma3", model_class="Gemma3ForConditionalGeneration", families=("gemma3_text",)),
    Wrapper(model_type="gemma4", model_class="Gemma4ForConditionalGeneration", families=("gemma4_text",), softcap=True),
    Wrapper(model_type="mistral3", model_class="Mistral3ForConditionalGeneration", families=("mistral", "ministral3")),
    Wrapper(model_type="llava", model_class="LlavaForConditionalGeneration", families=("llama", "mistral", "qwen2")),
    Wrapper(
        model_type="llava_next", model_class="LlavaNextForConditionalGeneration", families=("llama", "mistral", "qwen2")
    ),
    Wrapper(model_type="llava_onevision", model_class="LlavaOnevisionForConditionalGeneration", families=("qwen2",)),
    Wrapper(
        model_type="internvl", model_class="InternVLForConditionalGeneration", families=("qwen2", "qwen3", "llama")
    ),
    Wrapper(model_type="qwen3_5", model_class="Qwen3_5ForConditionalGeneration", families=("qwen3_5_text",)),
    Wrapper(model_type="qwen3_5_moe", model_class="Qwen3_5MoeForConditionalGeneration", families=("qwen3_5_moe_text",)),
)
WRAPPERS: Mapping[str, Wrapper] = MappingProxyType({row.model_type: row for row in _ROWS})
WRAPPED_CLASSES = tuple(row.model_class for row in _ROWS)


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """Return the row of the wrapper that a config.json is of, pruned or not, or None where it is of no wrapper."""
    return WRAPPERS.get(str(config.get("model_type")).removeprefix(PRUNED_PREFIX))
