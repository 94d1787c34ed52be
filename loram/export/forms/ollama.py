"""The form ollama: a Modelfile that puts the factors on the base, and the factors as a GGUF file."""

import shlex
from pathlib import Path

from loram.base.errors import UserError
from loram.export.forms.form import Form
from loram.export.forms.gguf_lora import ADAPTER_NAME, write_gguf_lora
from loram.export.forms.ggufs import find_base_gguf
from loram.export.forms.source import Source
from loram.export.options import ExportOptions

MODELFILE = "Modelfile"


def _write(source: Source, staging: Path, out: Path, options: ExportOptions) -> str:
    base = options.ollama_base or find_base_gguf(source, options.base_gguf)
    if base is None:
        raise UserError(
            "export: to ollama needs the base: --base-gguf FILE, or the name that it has in Ollama: --ollama-base NAME"
        )
    write_gguf_lora(source, staging / ADAPTER_NAME, options.outtype or "f32")
    text = f"FROM {base}\nADAPTER ./{ADAPTER_NAME}\n"  # the path begins where the Modelfile is
    (staging / MODELFILE).write_text(text, encoding="utf-8")
    return shlex.join(["ollama", "create", out.name, "--file", str(out / MODELFILE)])


OLLAMA = Form(
    result="folder with a Modelfile",
    write=_write,
    takes="Ollama takes it without an adapter: write a Modelfile with the line `FROM {model}`",
    options=("base_gguf", "ollama_base", "outtype"),
)
