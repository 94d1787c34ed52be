"""Lazy reading of a model folder, tensor by tensor, and writing of a sharded one. Never a whole model in memory."""

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor

from loram.artifacts import find_manifest
from loram.errors import UserError
from loram.model.architecture import Geometry
from loram.model.files import read_json, refuse_pointer
from loram.model.modeling_loram import dense, unpack
from loram.model.tensorfile import BLOCK_BYTES, TensorFile, TensorFileWriter, TensorSpec

SHARD_BYTES = 4 << 30
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# All that a model folder holds beside its weights and its config: carried over byte for byte.
_SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "loram_plan.json",
    "loram_masks.safetensors",
    "modeling_loram.py",
)
_MASK = ".mask"


class Checkpoint:
    """A folder with config.json and safetensors, read one tensor at a time.

    The weights of a sparse folder are shown as the dense ones that they stand for, made when they are asked for.

    Args:
        folder: the folder.
        name: what the user calls the model: its hub id or absolute path.
        stored: show a sparse folder's tensors as they are stored: values and masks.

    Raises:
        UserError: the folder is no model, its weights are in a format we do not read, a shard is missing, broken or
            outside the folder, or a file is a Git LFS pointer or not what the folder's manifest says.
    """

    def __init__(self, folder: Path, name: str | None = None, *, stored: bool = False) -> None:
        self.folder = folder
        self.name = name or str(folder.absolute())
        self._files: dict[str, TensorFile] = {}
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json here, so this is not a model folder")
        for path in (folder / "config.json", *_side_files(folder)):
            refuse_pointer(path)
        self.index = self._read_index()
        masks = {name for name in self.index if name.endswith(_MASK)}
        self._masks = {f"{name.removesuffix(_MASK)}.weight": name for name in masks}  # of a weight
        self.sparse, self._stored = bool(masks), stored
        find_manifest(folder)  # a folder of ours says what should be in it

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name, from the shards' own headers."""
        if (self.folder / _INDEX).is_file():
            weight_map = self._read_weight_map()
            shards = sorted(set(weight_map.values()))
            if (self.folder / _WEIGHTS).is_file() and _WEIGHTS not in shards:  # transformers would read that one
                raise UserError(
                    f"{self.folder}: has both {_WEIGHTS} and {_INDEX}; remove the one that is not the model"
                )
        elif (self.folder / _WEIGHTS).is_file():
            weight_map, shards = {}, [_WEIGHTS]
        else:
            other = [path.name for path in sorted(self.folder.iterdir()) if path.suffix in _PICKLED]
            remedy = f"; {other[0]} is pickled and never opened: convert it to safetensors first" if other else ""
            raise UserError(f"{self.folder}: no {_WEIGHTS} or {_INDEX} here{remedy}")
        found = {name: shard for shard in shards for name in self._open(shard).specs}
        for name, shard in weight_map.items():
            if found.get(name) != shard:
                raise UserError(f"{self.folder / _INDEX}: says {name} is in {shard}, but it is not there")
        return found

    def _read_weight_map(self) -> dict[str, str]:
        """The index's tensor name -> file name; every file lies in the folder and is safetensors by its name."""
        path = self.folder / _INDEX
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
        """The content of config.json.

        Raises:
            UserError: it is not a JSON object.
        """
        return read_json(self.folder / "config.json")

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes of a full model of a supported family (a pruned one has no single geometry)."""
        return Geometry.from_config(self.config, str(self.folder / "config.json"))

    @property
    def pruned(self) -> bool:
        """Whether this is a pruned folder."""
        return str(self.config.get("model_type")).startswith("loram_")

    @property
    def quantized(self) -> bool:
        """Whether the weights are packed in fewer than 16 bits."""
        return bool(self.config.get("quantization_config"))

    @property
    def tied(self) -> bool:
        """Whether lm_head shares the embedding's weight."""
        return HEAD not in self.index or bool(self.config.get("tie_word_embeddings"))

    @property
    def stored(self) -> "Checkpoint":
        """The same folder with a sparse one's tensors as they are stored."""
        return Checkpoint(self.folder, self.name, stored=True)

    def names(self) -> list[str]:
        """Names of all tensors, sorted as a person counts: layer 2 before layer 10."""
        hidden = set() if self._stored else set(self._masks.values())
        return sorted(self.index.keys() - hidden, key=_natural)

    def constants(self, name: str) -> list[str]:
        """Names of the tensors that belong to a quantised weight: its scales and codes."""
        return [key for key in self.index if key.startswith(f"{name}.")]

    @staticmethod
    def weight_of(name: str) -> str:
        """Name of the weight that a tensor belongs to, which is its own unless it is a quantised weight's constant."""
        module, mark, _ = name.partition(".weight.")
        return f"{module}.weight" if mark else name

    def spec(self, name: str) -> TensorSpec:
        """A tensor's dtype and shape, from the header alone.

        Raises:
            UserError: the model has no such tensor.
        """
        if name not in self.index:
            raise UserError(f"{self.folder}: no tensor {name}, though its config.json needs it")
        found = self._open(self.index[name]).specs[name]
        if (mask := self._mask_of(name)) is None:
            return found
        rows, columns = self.spec(mask).shape
        return TensorSpec(dtype=found.dtype, shape=(rows, 8 * columns))

    def _mask_of(self, name: str) -> str | None:
        """Name of a weight's mask, where the weight is shown dense."""
        return None if self._stored else self._masks.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return self.spec(name).shape

    @property
    def vocabulary(self) -> int:
        """How many tokens the embedding has a row for."""
        return self.shape(EMBEDDING)[0]

    @property
    def parameters(self) -> int:
        """How many values all tensors have together, a tied lm_head's not counted again; of sparse ones those kept."""
        files = {name: self._open(shard) for name, shard in self.index.items() if name not in self._masks.values()}
        return sum(
            math.prod(file.specs[name].shape) for name, file in files.items() if not (name == HEAD and self.tied)
        )

    @property
    def head(self) -> str:
        """Name of the tensor that lm_head multiplies by: its own, or the embedding's where they are tied."""
        return EMBEDDING if self.tied else HEAD

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """One tensor, or its rows `start` to `stop`, on the CPU, in the dtype of the file; no other byte is read.

        Raises:
            UserError: the model has no such tensor.
        """
        self.spec(name)
        file = self._open(self.index[name])
        if (mask := self._mask_of(name)) is None:
            return file.read(name, start, stop)
        bits = unpack(self.tensor(mask))
        first, last = int(bits[:start].sum()), int(bits[:stop].sum())  # places of the rows' values among all
        if int(bits.sum()) != math.prod(file.specs[name].shape):
            raise UserError(f"{self.folder}: {name} and {mask} do not fit together; make the folder again")
        return dense(file.read(name, first, last), self.tensor(mask, start, stop))

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of a tensor, some 64 MB at a time."""
        spec = self.spec(name)
        if self._mask_of(name) is None:
            return self._open(self.index[name]).blocks(name)
        rows = max(1, BLOCK_BYTES // spec.row_bytes)
        return ((row, self.tensor(name, row, row + rows)) for row in range(0, spec.shape[0], rows))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and first and last row; the same however it is sharded.

        Cheap also for a model of hundreds of gigabytes, and different for any other training run of the same shape.
        lm_head is left out where it is tied, since tools differ in writing it. A folder that `loram.quantize` made
        answers with that of the model it was made from: what was made for one goes with the other.
        """
        if (manifest := find_manifest(self.folder)) is not None and manifest.kind == "quantized":
            return manifest.made_from["original"]
        digest = hashlib.sha256()
        for name in sorted(self.names()):
            if name == HEAD and self.tied:
                continue
            spec = self.spec(name)
            digest.update(f"{name} {spec.dtype_name} {list(spec.shape)}".encode())
            if spec.shape and spec.shape[0]:
                for row in (0, spec.shape[0] - 1):
                    part = self.tensor(name, row, row + 1)
                    digest.update(part.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def copy_side_files(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence and plan to another folder, byte for byte."""
    for path in _side_files(source):
        shutil.copyfile(path, out / path.name)


def _side_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _SIDE_FILES for path in folder.glob(pattern) if path.is_file()})


def open_model(model: str | Path) -> Checkpoint:
    """Open a model by hub id, folder or GGUF file.

    A hub id is downloaded to the hub's cache (safetensors, config and tokenizer only). A GGUF file is converted once
    into a safetensors folder in loram's cache.

    Raises:
        UserError: nothing of that name is there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return Checkpoint(path)
    if path.is_file() and path.suffix == ".gguf":
        from loram.model.gguf import cached_conversion

        return Checkpoint(cached_conversion(path), name=str(path.absolute()))
    if path.exists():
        raise UserError(f"{path}: neither a model folder nor a .gguf file")
    return Checkpoint(_download(str(model)), name=str(model))


def _download(model: str) -> Path:
    patterns = ["model*.safetensors", "*.json", *_SIDE_FILES]  # not the consolidated.* some repositories add
    return Path(_ask_hub(model, lambda: snapshot_download(model, allow_patterns=patterns)))


def download_config(model: str) -> Path:
    """Fetch only the config.json of a model on the hub.

    Raises:
        UserError: the hub did not give one.
    """
    return Path(_ask_hub(model, lambda: hf_hub_download(model, "config.json")))


def _ask_hub(model: str, fetch: Callable[[], str]) -> str:
    missing = f"{model}: no such file or folder"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"{missing}, and not a hub id (owner/name) either")
    try:
        return fetch()
    except (OSError, ValueError) as error:  # the hub's own errors, offline included, derive from these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{missing}, and the hub did not give a model of that name: {reason}") from error


class ShardedWriter:
    """Writes safetensors shards of a bounded size, with transformers' index; use as a context manager.

    What goes where is settled beforehand, so tensors may come in any order and by rows, and none is held back.

    Args:
        folder: where; it must exist.
        specs: name -> dtype and shape of everything that will be written, in the order of the shards.
        shard_bytes: a shard holds no more than this (but a single tensor may).
        beside: tensors that are in other files of the folder, name -> file; the index names them too.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        shard_bytes: int = SHARD_BYTES,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.specs, self._beside = folder, specs, beside or {}
        shards: list[dict[str, TensorSpec]] = [{}]
        room = shard_bytes
        for name, spec in specs.items():
            if shards[-1] and spec.nbytes > room:
                shards.append({})
                room = shard_bytes
            shards[-1][name] = spec
            room -= spec.nbytes
        self._stack = contextlib.ExitStack()
        self._files: dict[str, TensorFileWriter] = {}
        self._weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards):
            # transformers reads no index beside a file of the plain name
            file = (
                _WEIGHTS
                if len(shards) == 1 and not self._beside
                else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            )
            writer = self._stack.enter_context(TensorFileWriter(folder / file, shard))
            self._files.update(dict.fromkeys(shard, writer))
            self._weight_map.update(dict.fromkeys(shard, file))

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write one tensor, or the rows of it that begin at `row`."""
        self._files[name].write(name, tensor, row)

    def copy(self, name: str, checkpoint: Checkpoint) -> None:
        """Write a tensor as a checkpoint has it, some rows at a time."""
        for row, block in checkpoint.blocks(name):
            self.write(name, block, row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)
        if exception[0] is None and (self._beside or len(set(self._weight_map.values())) > 1):
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": {**self._weight_map, **self._beside}}
            (self.folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
