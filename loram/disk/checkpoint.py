"""Read a model folder tensor by tensor, so that a whole model is never in memory."""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loram.base.constants import BLOCK_BYTES
from loram.base.errors import UserError
from loram.disk.artifacts import find_manifest
from loram.disk.files import (
    CHAT_TEMPLATE,
    TOKENIZER_FILES,
    copy_files,
    copy_side_files,
    read_json,
    refuse_pointer,
    side_files,
)
from loram.disk.packed import PackedTensor, dense_dtype, unpacked
from loram.disk.stacked import Stack, StackedTensor, names_in_model
from loram.disk.tensorfile import StoredTensor, TensorFile, TensorSpec
from loram.model.architecture import Architecture
from loram.model.families import ARCHITECTURES, family_of, is_pruned
from loram.model.geometry import Geometry
from loram.model.modeling_loram import dense, unpack
from loram.model.packing import dense_config, packing_of
from loram.model.wrappers import Wrapper, wrapper_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MASK = ".mask"
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # tables that old checkpoints hold, and that the model computes itself


class Checkpoint:
    """A folder with config.json and safetensors, read one tensor at a time.

    A sparse folder shows dense weights, which are made from its values and masks when they are read. Weights in FP8 and
    MXFP4 are shown dense too, in the dtype that config.json says, and the config without its quantization_config. A
    wrapped model shows its text model alone, with the config and the names of an ordinary causal language model.
    Experts are shown as transformers' 3-D tensors, also where the files have one tensor per expert.

    Args:
        folder: the model's folder.
        name: what the user calls the model: its hub id or absolute path.
        stored: show a sparse folder's tensors as they are stored: values and masks.
        whole: show the files as they are: every tensor under its own name, towers and single experts too.
        packed: show weights in FP8 and MXFP4 as they are stored: values and scales.
        chat_template: the text of a chat template that takes the place of the folder's own.

    Raises:
        UserError: the folder is not a model, its weights are in a format that is not read, a shard is missing,
            broken or outside the folder, or a file is a Git LFS pointer or not what the folder's manifest says.
    """

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        *,
        stored: bool = False,
        whole: bool = False,
        packed: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self.folder, self.chat_template = folder, chat_template
        self.name = name or str(folder.absolute())
        self._files: dict[str, TensorFile] = {}
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json here, so this is not a model folder")
        for path in (folder / "config.json", *side_files(folder)):
            refuse_pointer(path)
        config = read_json(folder / "config.json")
        self.packing = None if packed else packing_of(config, str(folder / "config.json"))
        self._whole_config = dense_config(config) if self.packing else config
        self.wrapper = None if whole else wrapper_of(self._whole_config)
        self._stored, self._whole = stored, whole
        files = self._read_index()
        in_files = {name: StoredTensor(file=self._open(shard), name=name) for name, shard in files.items()}
        tensors: Mapping[str, StoredTensor | PackedTensor] = in_files
        if self.packing:
            tensors = unpacked(in_files, self.packing, dense_dtype(config))
        self._in_files, stacks = self._names_in_files(tensors)
        self._stacks = {
            name: StackedTensor([[tensors[part] for part in parts] for parts in stack], f"{folder}: {name}")
            for name, stack in stacks.items()
        }
        self._tensors: Mapping[str, StoredTensor | PackedTensor | StackedTensor] = {
            **{name: tensors[stored] for name, stored in self._in_files.items()},
            **self._stacks,
        }
        shown = {part for stack in stacks.values() for parts in stack for part in parts} | {*self._in_files.values()}
        self.beside = tensors.keys() - shown  # a wrapped model's towers, and what a model does not use
        self.index = {name: files[tensor.name] for name, tensor in self._tensors.items()}
        masks = {name for name in self.index if name.endswith(_MASK)}
        self._masks = {f"{name.removesuffix(_MASK)}.weight": name for name in masks}  # weight -> its mask
        self.sparse = bool(masks)
        find_manifest(folder)  # a folder of ours says what should be in it

    def _read_index(self) -> dict[str, str]:
        """Return the file that each tensor is in, by the tensor's name, from the shards' own headers."""
        if (self.folder / INDEX).is_file():
            weight_map = self._read_weight_map()
            shards = sorted(set(weight_map.values()))
            if (self.folder / WEIGHTS).is_file() and WEIGHTS not in shards:  # transformers would read that one
                raise UserError(f"{self.folder}: has both {WEIGHTS} and {INDEX}; remove the one that is not the model")
        elif (self.folder / WEIGHTS).is_file():
            weight_map, shards = {}, [WEIGHTS]
        else:
            other = [path.name for path in sorted(self.folder.iterdir()) if path.suffix in _PICKLED]
            remedy = f"; {other[0]} is pickled and never opened: convert it to safetensors first" if other else ""
            raise UserError(f"{self.folder}: no {WEIGHTS} or {INDEX} here{remedy}")
        index = {name: shard for shard in shards for name in self._open(shard).specs}
        for name, shard in weight_map.items():
            if index.get(name) != shard:
                raise UserError(f"{self.folder / INDEX}: says {name} is in {shard}, but it is not there")
        return index

    def _names_in_files(self, files: Iterable[str]) -> tuple[dict[str, str], dict[str, Stack]]:
        """Return the names in the files of each tensor that is shown, or of its parts, by the name it is shown with."""
        if self._whole:
            return {name: name for name in files}, {}
        names = {name: name for name in files} if self.wrapper is None else self._unwrapped(self.wrapper, files)
        row = ARCHITECTURES.get(str(self.config.get("model_type")))  # pruned folders have the names of the model
        used = [own for own in names if row is None or not row.leaves_unused(own, self.config)]
        single, stacks = names_in_model(used, row, self.folder)
        in_files = {name: names[own] for name, own in single.items()}
        return in_files, {
            name: tuple(tuple(names[part] for part in parts) for parts in stack) for name, stack in stacks.items()
        }

    def _unwrapped(self, wrapper: Wrapper, files: Iterable[str]) -> dict[str, str]:
        """Return the names in the files of a wrapped model's text model, by its own names."""
        names: dict[str, str] = {}
        for stored in files:
            if (own := wrapper.unwrapped(stored)) is None:
                continue
            if own in names:
                raise UserError(
                    f"{self.folder}: has {names[own]} and {stored}, two spellings of one tensor; remove one"
                )
            names[own] = stored
        return names

    def _read_weight_map(self) -> dict[str, str]:
        """Return the index's file for each tensor; every file lies in the folder and is safetensors by its name."""
        path = self.folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{path}: not a valid shard index: its weight_map should give a file name for each tensor")
        for name, shard in weight_map.items():
            if Path(shard).is_absolute() or ".." in Path(shard).parts:
                raise UserError(f"{path}: says {name} is in {shard}, which is outside the folder")
            if Path(shard).suffix != ".safetensors":
                raise UserError(f"{path}: says {name} is in {shard}, and only safetensors files are opened")
        return weight_map

    def _open(self, shard: str) -> TensorFile:
        if shard not in self._files:
            path = self.folder / shard
            if not path.is_file():
                raise UserError(f"{path}: the shard is missing; fetch or make the model again")
            self._files[shard] = TensorFile(path)
        return self._files[shard]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; of a wrapped model, what the text model's own would be.

        Raises:
            UserError: a wrapped model's text model is not of a supported family.
        """
        config = self._whole_config
        return config if self.wrapper is None else self.wrapper.text_config(config, self.name)

    @cached_property
    def architecture(self) -> Architecture:
        """The family's row, of a full or a pruned model, without what none of its layers has.

        Raises:
            UserError: the family is not supported.
        """
        row = family_of(self.config, self.name)
        return row.of_model(row.layer_kinds(self.config))

    @cached_property
    def rows_by_layer(self) -> list[Architecture]:
        """The family's row as each decoder layer has it; a layer that was dropped has no parts."""
        row, dropped = self.architecture, self.config.get("dropped_layers", ())
        kinds, layers = row.layer_kinds(self.config), row.text_config(self.config)["num_hidden_layers"]
        return [
            row.of_kind(kinds[layer] if kinds else None) if layer not in dropped else row.without_parts
            for layer in range(layers)
        ]

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes of a full model of a supported family (a pruned model has no single geometry)."""
        return Geometry.from_config(self.config, str(self.folder / "config.json"))

    @property
    def pruned(self) -> bool:
        """Return whether this is a pruned folder."""
        return is_pruned(self.config)

    @property
    def quantized(self) -> bool:
        """Return whether the weights are in 4 bits, and shown as they are stored."""
        return bool(self.config.get("quantization_config"))

    @property
    def tied(self) -> bool:
        """Return whether the head shares the embedding's weight."""
        return self.architecture.head_weight not in self.index or any(
            self.config.get(key) for key in self.architecture.tied_keys
        )

    @property
    def stored(self) -> "Checkpoint":
        """A view of the same folder that has a sparse folder's tensors as they are stored."""
        return Checkpoint(self.folder, self.name, stored=True, chat_template=self.chat_template)

    @property
    def whole(self) -> "Checkpoint":
        """A view of the same folder that has the tensors, names and config of the files: towers, single experts."""
        if not self.beside and self._in_files == {name: name for name in self.index}:  # nothing is shown otherwise
            return self
        return Checkpoint(self.folder, self.name, stored=self._stored, whole=True, chat_template=self.chat_template)

    @property
    def untied_config(self) -> dict[str, Any]:
        """The content of config.json once the head has a weight of its own."""
        if self.wrapper is not None:
            return self.wrapper.untied(self._whole_config)
        keys = self.architecture.tied_keys
        return {**self._whole_config, **dict.fromkeys(keys, False)}

    def name_in_files(self, name: str) -> str:
        """Return the name that a tensor has in the files, which for a wrapped model is another one.

        A tensor that the files do not have is new; it gets the name that transformers gives it.
        """
        new = name if self.wrapper is None else self.wrapper.outside(name)
        return self._in_files.get(name, new)

    def experts_in_files(self, name: str) -> Iterator[tuple[str, int, int]]:
        """Yield (name in the files, expert, first row) of each part of a 3-D tensor that files hold by experts.

        Nothing is yielded for a tensor that files hold as it is.
        """
        if name in self._stacks:
            yield from self._stacks[name].places()

    def copy_side_files(self, out: Path) -> None:
        """Copy tokenizer, licence, plan and the like to another folder, with the chat template that was chosen.

        With the whole of a wrapped model, the files about its towers' inputs are copied too.
        """
        wrapped = wrapper_of(self._whole_config) is not None
        copy_side_files(self.folder, out, processors=self._whole and wrapped)
        self._write_template(out)

    def copy_tokenizer(self, out: Path) -> None:
        """Copy the tokenizer's files to another folder, with the chat template that was chosen.

        Saved by transformers, they would name a class that only its own version has.
        """
        copy_files(self.folder, out, TOKENIZER_FILES)
        self._write_template(out)

    def _write_template(self, out: Path) -> None:
        if self.chat_template is not None:
            (out / CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf-8")

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted as a person counts: layer 2 comes before layer 10.

        Tables that the model computes by itself are left out.
        """
        return sorted((name for name in self._shown() if not _COMPUTED.search(name)), key=_natural)

    def _shown(self) -> set[str]:
        """Return the names of all tensors but the masks of weights that are shown dense."""
        return self.index.keys() - (set() if self._stored else set(self._masks.values()))

    def layer_tensors(self, layer: int) -> dict[str, Tensor]:
        """Return all tensors of a decoder layer, by name."""
        prefix = f"{self.architecture.layer_path(layer)}."
        return {name: self.tensor(name) for name in self.names() if name.startswith(prefix)}

    def constants(self, name: str) -> list[str]:
        """Return the names of the tensors that belong to a quantised weight: its scales and codes."""
        return [key for key in self.index if key.startswith(f"{name}.")]

    @staticmethod
    def weight_of(name: str) -> str:
        """Return the name of the weight that a tensor belongs to: its own, unless it is a weight's NF4 constant."""
        module, mark, _ = name.partition(".weight.")
        return f"{module}.weight" if mark else name

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape, which are read from the file's header alone.

        Raises:
            UserError: the model has no such tensor.
        """
        if name not in self.index:
            raise UserError(f"{self.folder}: no tensor {name}, though its config.json needs it")
        spec = self._tensors[name].spec
        if (mask := self._mask_of(name)) is None:
            return spec
        rows, columns = self.spec(mask).shape
        return TensorSpec(dtype=spec.dtype, shape=(rows, 8 * columns))

    def _mask_of(self, name: str) -> str | None:
        """Return the name of a weight's mask, if the weight is shown dense."""
        return None if self._stored else self._masks.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, which is read from the file's header alone."""
        return self.spec(name).shape

    @property
    def vocabulary(self) -> int:
        """Return how many tokens the embedding has a row for."""
        return self.shape(self.architecture.embedding_weight)[0]

    @property
    def parameters(self) -> int:
        """Return how many values all tensors hold together but for buffers; a tied head counts once."""
        row = self.architecture
        left_out = {
            *self._masks.values(),
            *filter(_COMPUTED.search, self.index),
            *([row.head_weight] if self.tied else []),
        }
        for layer, own in enumerate(self.rows_by_layer):
            left_out |= {f"{row.layer_path(layer)}.{part.name}" for part in own.parameters if part.buffer}
        return sum(math.prod(self._tensors[name].spec.shape) for name in self.index.keys() - left_out)

    @property
    def head(self) -> str:
        """The name of the tensor that the head multiplies by: its own, or the embedding's where they are tied."""
        return self.holder(self.architecture.head_weight)

    def holder(self, name: str) -> str:
        """Return the name of the tensor that holds a weight: its own, but for a tied head the embedding's."""
        return self.architecture.embedding_weight if self.tied and name == self.architecture.head_weight else name

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read one tensor, or its rows `start` to `stop`, to the CPU in the dtype of `spec`; no other byte is read.

        Raises:
            UserError: the model has no such tensor.
        """
        self.spec(name)
        stored = self._tensors[name]
        if (mask := self._mask_of(name)) is None:
            return stored.read(start, stop)
        bits = unpack(self.tensor(mask))
        first, last = int(bits[:start].sum()), int(bits[:stop].sum())  # where the rows' values are among all values
        if int(bits.sum()) != math.prod(stored.spec.shape):
            raise UserError(f"{self.folder}: {name} and {mask} do not fit together; make the folder again")
        return dense(stored.read(first, last), self.tensor(mask, start, stop))

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield a tensor in pieces of about 64 MB: (index of the first row, the rows)."""
        spec = self.spec(name)
        if self._mask_of(name) is None:
            return self._tensors[name].blocks()
        rows = max(1, BLOCK_BYTES // spec.row_bytes)
        return ((row, self.tensor(name, row, row + rows)) for row in range(0, spec.shape[0], rows))

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of every tensor's name, dtype, shape and first and last row; sharding makes no difference.

        It is cheap even for a model of hundreds of gigabytes, and differs for any other training run of the same shape.
        A tied head is left out, since tools differ in writing it. Weights in FP8 and MXFP4 count as they are stored. A
        folder that `loram.quantize` made has the
        fingerprint of the model that it was made from, so that what was made for one of them goes with the other.
        """
        if (manifest := find_manifest(self.folder)) is not None and manifest.kind == "quantized":
            return manifest.made_from["original"]
        if self.packing:
            return Checkpoint(self.folder, self.name, whole=self._whole, packed=True).fingerprint
        digest = hashlib.sha256()
        for name in sorted(self._shown()):
            if self.holder(name) != name:
                continue
            spec = self.spec(name)
            digest.update(f"{name} {spec.dtype_name} {list(spec.shape)}".encode())
            if spec.shape and spec.shape[0]:
                for row in (0, spec.shape[0] - 1):
                    part = self.tensor(name, row, row + 1)
                    digest.update(part.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
