"""The forms as a table."""

from collections.abc import Mapping
from types import MappingProxyType

from loram.export.forms.form import Form
from loram.export.forms.gguf_lora import GGUF_LORA
from loram.export.forms.merged_gguf import GGUF
from loram.export.forms.mlx import MLX
from loram.export.forms.ollama import OLLAMA
from loram.export.forms.vllm import VLLM

FORMS: Mapping[str, Form] = MappingProxyType(
    {"gguf-lora": GGUF_LORA, "gguf": GGUF, "ollama": OLLAMA, "vllm": VLLM, "mlx": MLX}
)
