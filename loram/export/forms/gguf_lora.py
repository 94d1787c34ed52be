"""The form gguf-lora: the factors as a GGUF file, which llama.cpp loads beside the base."""

import shlex
from contextlib import closing
from pathlib import Path

from loram.export.forms.form import Form
from loram.export.forms.ggufs import dtype_in_gguf, family_in_gguf, import_gguf, names_in_gguf, row_order
from loram.export.forms.rank import uniform
from loram.export.forms.source import Source
from loram.export.options import ExportOptions

ADAPTER_NAME = "adapter.gguf"


def write_gguf_lora(source: Source, path: Path, outtype: str) -> None:
    """Write an adapter's factors as a GGUF file.

    llama.cpp adds alpha / r times lora_b·lora_a, so alpha is written such that this is the adapter's own scaling, with
    rsLoRA too. The rows of lora_b lie as those of the weight do in a GGUF file of the base.

    Raises:
        UserError: the package gguf is missing, or has no name for the family or a module.
    """
    gguf, dtype, adapter = import_gguf(), dtype_in_gguf(outtype), uniform(source.adapter)
    with closing(gguf.GGUFWriter(path, family_in_gguf(source).architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.config["lora_alpha"]))
        for module, name in names_in_gguf(source).items():
            a, b = (adapter.modules[module][factor].float() for factor in "AB")
            if (order := row_order(source, module)) is not None:
                b = b[order]
            for part, factor in (("a", a), ("b", b)):
                values = gguf.quantize(factor.contiguous().numpy(), dtype)
                writer.add_tensor(f"{name}.lora_{part}", values, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _write(source: Source, staging: Path, out: Path, options: ExportOptions) -> str:
    write_gguf_lora(source, staging / ADAPTER_NAME, options.outtype or "f32")
    base = source.base if source.base.endswith(".gguf") else "BASE.gguf"
    return shlex.join(["llama-cli", "--model", base, "--lora", str(out / ADAPTER_NAME)])


GGUF_LORA = Form(
    result="GGUF LoRA adapter",
    write=_write,
    takes="llama.cpp takes it as a GGUF file: python convert_hf_to_gguf.py {model} --outfile model.gguf",
    options=("outtype",),
)
