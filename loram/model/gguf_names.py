"""What GGUF files call families, and which of their rows lie in another order there. Nothing here touches a weight.

The facts are those of llama.cpp's converters. The names of tensors are not here: the package `gguf` has them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """A family as GGUF files have it.

    Args:
        architecture: what the file's `general.architecture` says.
        paired: whether the rows of queries and keys lie in pairs that are rotated together. transformers has the first
            half of a head's rows before the second half, and row i is rotated with row i + head_dim / 2.
    """

    architecture: str
    paired: bool = False


_LLAMA = GgufFamily(architecture="llama", paired=True)
# model_type -> its row. A wrapped model has one where its text model is of another architecture in it than alone. A
# family without a row is not exported to GGUF.
GGUF_FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "mixtral": _LLAMA,
        "smollm3": GgufFamily(architecture="smollm3", paired=True),
        "ministral3": GgufFamily(architecture="mistral3", paired=True),
        "granite": GgufFamily(architecture="granite", paired=True),
        "granitemoe": GgufFamily(architecture="granitemoe", paired=True),
        "qwen2": GgufFamily(architecture="qwen2"),
        "qwen3": GgufFamily(architecture="qwen3"),
        "gemma2": GgufFamily(architecture="gemma2"),
        "gemma3_text": GgufFamily(architecture="gemma3"),
        "gemma4_text": GgufFamily(architecture="gemma4"),
        "phi3": GgufFamily(architecture="phi3"),
        "seed_oss": GgufFamily(architecture="seed_oss"),
        "ernie4_5": GgufFamily(architecture="ernie4_5"),
        "hunyuan_v1_dense": GgufFamily(architecture="hunyuan-dense"),
        "exaone4": GgufFamily(architecture="exaone4"),
        "olmo2": GgufFamily(architecture="olmo2"),
        "olmo3": GgufFamily(architecture="olmo2"),
        "glm4": GgufFamily(architecture="glm4"),
        "cohere2": GgufFamily(architecture="cohere2"),
        "lfm2": GgufFamily(architecture="lfm2"),
        "qwen2_moe": GgufFamily(architecture="qwen2moe"),
        "qwen3_moe": GgufFamily(architecture="qwen3moe"),
        "gpt_oss": GgufFamily(architecture="gpt-oss"),
        "glm4_moe": GgufFamily(architecture="glm4moe"),
        "olmoe": GgufFamily(architecture="olmoe"),
        "ernie4_5_moe": GgufFamily(architecture="ernie4_5-moe"),
        "minimax_m2": GgufFamily(architecture="minimax-m2"),
        "mistral3": GgufFamily(architecture="mistral3", paired=True),
    }
)
