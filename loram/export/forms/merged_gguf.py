"""The form gguf: a GGUF file of the base with the update in its weights."""

import shlex
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from loram.base.errors import UserError
from loram.base.progress import track
from loram.export.forms.form import Form
from loram.export.forms.ggufs import (
    dtype_in_gguf,
    family_in_gguf,
    find_base_gguf,
    import_gguf,
    names_in_gguf,
    open_base,
    row_order,
)
from loram.export.forms.source import Source
from loram.export.options import ExportOptions

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter
    from gguf.gguf_reader import ReaderTensor

MODEL_NAME = "model.gguf"
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def write_merged_gguf(source: Source, base: Path, path: Path, outtype: str) -> None:
    """Write a GGUF file of the base again, with the adapter's update in its weights.

    Metadata and tokenizer are the base's, and so are all tensors that the adapter leaves as they are, byte for byte.
    The others are dequantised, one at a time, get the update in float32, and are stored in `outtype`.

    Raises:
        UserError: the package gguf is missing, or the file is not of this base.
    """
    gguf, dtype, reader = import_gguf(), dtype_in_gguf(outtype), open_base(source, base)
    modules = {name: module for module, name in names_in_gguf(source).items()}
    _check_shapes(source, reader, modules, base)
    file_type = gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[outtype]]
    with closing(gguf.GGUFWriter(path, family_in_gguf(source).architecture)) as writer:
        _copy_metadata(reader, writer, {gguf.Keys.General.FILE_TYPE: int(file_type)})
        for tensor in reader.tensors:
            data = tensor.data
            if tensor.name in modules:
                size = int(tensor.n_elements) * _BYTES[outtype]
                writer.add_tensor_info(tensor.name, _shape(tensor), numpy.dtype(numpy.float32), size, dtype)
            else:
                writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in track(reader.tensors, "Merging"):
            data = tensor.data
            if (module := modules.get(tensor.name)) is not None:
                data = gguf.quantize(_updated(source, module, tensor), dtype)
            writer.write_tensor_data(data)


def _updated(source: Source, module: str, tensor: "ReaderTensor") -> Any:
    """Return a weight of the base's file with the adapter's update, in the file's order of rows: float32."""
    weight = torch.tensor(import_gguf().dequantize(tensor.data, tensor.tensor_type))
    if (order := row_order(source, module)) is None:
        return source.adapter.updated(module, weight).numpy()
    ours = torch.empty_like(weight)
    ours[order] = weight
    return source.adapter.updated(module, ours)[order].numpy()


def _shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    """Return the shape of a tensor as torch has it; GGUF has the columns first."""
    return tuple(int(size) for size in reversed(tensor.shape.tolist()))


def _copy_metadata(reader: "GGUFReader", writer: "GGUFWriter", changed: dict[str, Any]) -> None:
    """Copy the metadata, tokenizer included, with some values of keys that are there changed."""
    gguf = import_gguf()
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue  # the writer has these of its own
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, changed.get(field.name, field.contents()), kind, sub_type=inner)


def _check_shapes(source: Source, reader: "GGUFReader", modules: dict[str, str], base: Path) -> None:
    shapes = {tensor.name: _shape(tensor) for tensor in reader.tensors}
    for name, module in modules.items():
        factors = source.adapter.modules[module]
        expected = factors["B"].shape[0], factors["A"].shape[1]
        if shapes.get(name) != expected:
            has = f"has shape {shapes[name]} there" if name in shapes else "is not there"
            raise UserError(f"{base}: {name} {has}, and {source.folder} is for a weight of shape {expected}")


def _write(source: Source, staging: Path, out: Path, options: ExportOptions) -> str:
    if (base := find_base_gguf(source, options.base_gguf)) is None:
        raise UserError(
            "export: to gguf needs the base as a GGUF file, whose metadata and tokenizer it takes: --base-gguf FILE; "
            f"without one, merge with `loram merge {source.base} {source.folder} MERGED` and convert with llama.cpp: "
            "python convert_hf_to_gguf.py MERGED --outfile model.gguf"
        )
    write_merged_gguf(source, base, staging / MODEL_NAME, options.outtype or "f16")
    return shlex.join(["llama-cli", "--model", str(out / MODEL_NAME)])


GGUF = Form(
    result="merged GGUF model",
    write=_write,
    takes="llama.cpp's own converter writes its GGUF file: python convert_hf_to_gguf.py {model} --outfile model.gguf",
    weights=True,
    options=("base_gguf", "outtype"),
)
