"""Lazy reading of a model folder, tensor by tensor, and writing of a sharded one. Never a whole model in memory."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loram.errors import UserError
from loram.model.architecture import Geometry, read_config

SHARD_BYTES = 1 << 30
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
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
    "modeling_loram.py",
)


class Checkpoint:
    """A folder with config.json and safetensors, read one tensor at a time.

    Args:
        folder: the folder.
        name: what the user calls the model: its hub id or absolute path.

    Raises:
        UserError: the folder is no model, its weights are in a format we do not read, or a shard is missing or broken.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.name = name or str(folder.absolute())
        self._files: dict[str, Any] = {}
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json here, so this is not a model folder")
        self.index = self._read_index()

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name, from the shards' own headers."""
        if (self.folder / _INDEX).is_file():
            try:
                weight_map = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.folder / _INDEX}: not a valid shard index: {error}") from error
            shards = sorted(set(weight_map.values()))
        elif (self.folder / _WEIGHTS).is_file():
            weight_map, shards = {}, [_WEIGHTS]
        else:
            other = [path.name for path in sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt"))]
            remedy = f"; {other[0]} is pickled, convert it to safetensors first" if other else ""
            raise UserError(f"{self.folder}: no {_WEIGHTS} or {_INDEX} here{remedy}")
        found = {name: shard for shard in shards for name in tuple(self._open(shard).keys())}
        for name, shard in weight_map.items():
            if found.get(name) != shard:
                raise UserError(f"{self.folder / _INDEX}: says {name} is in {shard}, but it is not there")
        return found

    def _open(self, shard: str) -> Any:
        if shard not in self._files:
            path = self.folder / shard
            if not path.is_file():
                raise UserError(f"{path}: the shard is missing; fetch or make the model again")
            try:
                self._files[shard] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{path}: not a whole safetensors file: {error}") from error
        return self._files[shard]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            UserError: it is not a JSON object.
        """
        return read_config(self.folder / "config.json")

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes of a full model of a supported family (a pruned one has no single geometry)."""
        return Geometry.from_config(self.config, str(self.folder / "config.json"))

    @property
    def pruned(self) -> bool:
        """Whether this is a pruned folder."""
        return str(self.config.get("model_type")).startswith("loram_")

    @property
    def tied(self) -> bool:
        """Whether lm_head shares the embedding's weight."""
        return "lm_head.weight" not in self.index or bool(self.config.get("tie_word_embeddings"))

    def names(self) -> list[str]:
        """Names of all tensors, sorted as a person counts: layer 2 before layer 10."""
        return sorted(self.index, key=_natural)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return tuple(self._open(self.index[name]).get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype of the file.

        Raises:
            UserError: the model has no such tensor.
        """
        if name not in self.index:
            raise UserError(f"{self.folder}: no tensor {name}, though its config.json needs it")
        return self._open(self.index[name]).get_tensor(name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and first and last row; the same however it is sharded.

        Cheap also for a model of hundreds of gigabytes, and different for any other training run of the same shape.
        lm_head is left out where it is tied, since tools differ in writing it.
        """
        digest = hashlib.sha256()
        for name in sorted(self.index):
            if name == "lm_head.weight" and self.tied:
                continue
            part = self._open(self.index[name]).get_slice(name)
            shape = part.get_shape()
            digest.update(f"{name} {part.get_dtype()} {shape}".encode())
            if shape and shape[0]:
                for row in (part[:1], part[shape[0] - 1 :]):
                    digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def copy_side_files(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence and plan to another folder, byte for byte."""
    for path in sorted({path for pattern in _SIDE_FILES for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, out / path.name)


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
    """Write tensors into safetensors shards of a bounded size, with transformers' index; use as a context manager.

    Args:
        folder: where; it must exist.
        shard_bytes: a shard is closed before it would outgrow this (a single tensor may).
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self.total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is written when its shard is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        save_file(self._pending, self.folder / f"shard-{len(self._shards)}.safetensors", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is pending, give the shards their final names and write the index."""
        if self._pending:
            self._flush()
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards):
            final = _WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number}.safetensors").rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: object, *rest: object) -> None:
        if exception is None:
            self.close()


def rewrite(
    checkpoint: Checkpoint,
    out: Path,
    change: Callable[[str, Tensor], Tensor],
    *,
    extra: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[list[str]], Iterable[str]] = iter,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write every tensor of a checkpoint, changed, into another folder, and copy the side files.

    Args:
        change: (name, tensor) -> the tensor to write.
        extra: new tensor name -> the checkpoint's tensor it starts from.
        progress: wraps the iteration over names for a progress bar.
        shard_bytes: see `ShardedWriter`.
    """
    with ShardedWriter(out, shard_bytes) as writer:
        for name in progress([*checkpoint.names(), *extra]):
            writer.add(name, change(name, checkpoint.tensor(extra.get(name, name))))
    copy_side_files(checkpoint.folder, out)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
