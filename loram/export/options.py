"""Options of `loram export`."""

from typing import ClassVar, Literal

from pydantic import PositiveInt

from loram.base.options import Options, option
from loram.base.paths import LocalPath


class ExportOptions(Options):
    """What an adapter is exported to; see `loram.export.export.export_adapter`."""

    stage: ClassVar[str] = "export"

    to: Literal["gguf-lora", "gguf", "ollama", "vllm", "mlx"] = option(..., "The form to write.", common=True)
    max_rank: PositiveInt | None = option(
        None, "Reduce the update of each module to at most this rank, by its largest singular values.", common=True
    )
    base_gguf: LocalPath | None = option(
        None, "For gguf and ollama: the base as a GGUF file (default: the adapter's base, if it is one)."
    )
    ollama_base: str | None = option(None, "For ollama: the name that the base has in Ollama, such as llama3.1.")
    outtype: Literal["f32", "f16", "bf16"] | None = option(
        None, "For the GGUF forms: the dtype of what is written (default: f32 for factors, f16 for weights)."
    )
