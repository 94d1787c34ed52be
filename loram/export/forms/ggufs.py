"""What the forms in GGUF share: names, the order of rows, dtypes, and the base as a GGUF file. It needs `gguf`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loram.base.errors import UserError
from loram.disk.gguf import check_gguf
from loram.export.forms.source import Source
from loram.model.gguf_names import GGUF_FAMILIES, GgufFamily
from loram.model.parts import KEYS, QUERIES

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader


def import_gguf() -> Any:
    """Return the package `gguf`, which is an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("export: to write GGUF files, install gguf: pip install 'loram[gguf]'") from error
    return gguf


def family_in_gguf(source: Source) -> GgufFamily:
    """Return what GGUF files call the base's family.

    Raises:
        UserError: the family is not exported to GGUF.
    """
    wrapper, text = None if source.wrapper is None else source.wrapper.model_type, source.architecture.model_type
    family = GGUF_FAMILIES.get(wrapper or text, GGUF_FAMILIES.get(text))
    if family is None:
        raise UserError(
            f"{source.folder}: its base is a {text}, which LoRAM does not export to GGUF; it exports "
            f"{', '.join(GGUF_FAMILIES)}; merge it with `loram merge` and convert the model with llama.cpp"
        )
    return family


def names_in_gguf(source: Source) -> dict[str, str]:
    """Return the name in GGUF of the weight of each adapted module: `blk.3.attn_q.weight`.

    Raises:
        UserError: GGUF has no name for a module in this family.
    """
    gguf, architecture = import_gguf(), family_in_gguf(source).architecture
    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise UserError(f"export: this version of gguf does not know {architecture}; install a newer one")
    names = gguf.get_tensor_name_map(arch, source.geometry.num_hidden_layers)
    known = {}
    for module in source.adapter.modules:
        if (name := names.get_name(module)) is None:
            raise UserError(f"{source.folder}: adapts {module}, which has no name in GGUF for {architecture}")
        known[module] = f"{name}.weight"
    return known


def row_order(source: Source, module: str) -> Tensor | None:
    """Return the index, in our order, of each row of a weight in GGUF's order; None where the order is the same.

    With `paired`, rows i and i + head_dim / 2 of each head of queries or keys become neighbours.

    Example: one head of 4 rows -> [0, 2, 1, 3].
    """
    place = source.architecture.split(module)
    if place is None or not family_in_gguf(source).paired:
        return None
    layer, path = place
    linear = next(linear for linear in source.architecture.linears if linear.path == path)
    if linear.rows[0] not in (QUERIES, KEYS):
        return None
    geometry = source.geometry.at(layer)
    rows = torch.arange(geometry.size(linear.rows))
    return rows.view(-1, 2, geometry.head_dim // 2).mT.reshape(-1)


def dtype_in_gguf(outtype: str) -> "GGMLQuantizationType":
    """Return GGUF's name of a dtype: `f16` -> GGMLQuantizationType.F16."""
    dtype: GGMLQuantizationType = import_gguf().GGMLQuantizationType[outtype.upper()]
    return dtype


def find_base_gguf(source: Source, given: Path | None) -> Path | None:
    """Return the base as a GGUF file: the one that is given, or the adapter's base if it is one; else None.

    Raises:
        UserError: the given file is not there, or is not GGUF.
    """
    path = given or (Path(source.base) if source.base.endswith(".gguf") else None)
    if path is not None:
        check_gguf(path)
    return path


def open_base(source: Source, path: Path) -> "GGUFReader":
    """Open a GGUF file of the base.

    Raises:
        UserError: it is broken, in several files, or of another family.
    """
    gguf, expected = import_gguf(), family_in_gguf(source).architecture
    try:
        reader: GGUFReader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path}: the package gguf cannot read it: {error}") from error
    if (parts := reader.get_field("split.count")) is not None and parts.contents() > 1:
        raise UserError(f"{path}: one of several files of a model; join them with llama.cpp's llama-gguf-split --merge")
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    if (actual := None if field is None else field.contents()) != expected:
        raise UserError(f"{path}: its general.architecture is {actual}, and the adapter's base is a {expected}")
    return reader
