"""Write a model folder tensor by tensor, in any order and in shards, so that a whole model is never in memory."""

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from loram.base.constants import SHARD_BYTES
from loram.base.progress import track
from loram.disk.checkpoint import INDEX, WEIGHTS, Checkpoint
from loram.disk.files import write_json
from loram.disk.tensorfile import TensorFileWriter, TensorSpec
from loram.model.plan import MASKS_NAME


class ShardedWriter:
    """A context manager that writes safetensors shards of a bounded size, with transformers' index.

    It is known beforehand which tensor goes where, so tensors may come in any order and by rows, and none is held back.

    Args:
        folder: the folder to write into, which must exist.
        specs: the dtype and shape of everything that will be written, by name, in the order of the shards.
        shard_bytes: the most that a shard holds, unless a single tensor is larger.
        beside: the files of tensors that are in other files of the folder, by name; the index names them too.
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
                WEIGHTS
                if len(shards) == 1 and not self._beside
                else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            )
            writer = self._stack.enter_context(TensorFileWriter(folder / file, shard))
            self._files.update(dict.fromkeys(shard, writer))
            self._weight_map.update(dict.fromkeys(shard, file))

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write one tensor, or some of its rows, of which the first is `row`."""
        self._files[name].write(name, tensor, row)

    def copy(self, name: str, checkpoint: Checkpoint, source: str | None = None) -> None:
        """Copy a tensor from a checkpoint, some rows at a time; `source` is its name there, where that is another."""
        for row, block in checkpoint.blocks(source or name):
            self.write(name, block, row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)
        if exception[0] is None and (self._beside or len(set(self._weight_map.values())) > 1):
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": {**self._weight_map, **self._beside}}
            write_json(self.folder / INDEX, index)


def write_trained(out: Path, base: Checkpoint, trained: Path | None, *, frozen: Collection[str] = ()) -> None:
    """Write a model folder again with the weights of a checkpoint, in the dtypes of the folder, block by block of rows.

    Of a wrapped model only the text model was trained; everything else is copied.

    Args:
        out: the folder to write into.
        base: the full or pruned model that was trained.
        trained: the checkpoint; None for the model's own weights.
        frozen: the names of the weights that did not train.
    """
    source, base = None if trained is None else Checkpoint(trained).stored, base.stored
    whole, names = base.whole, [name for name in base.names() if name not in frozen]
    trains = {base.name_in_files(name): name for name in names}
    experts = {part: (name, expert, row) for name in names for part, expert, row in base.experts_in_files(name)}
    masks = {name: file for name, file in base.index.items() if file == MASKS_NAME}  # as they were
    specs = {name: whole.spec(name) for name in whole.names() if name not in masks}
    with ShardedWriter(out, specs, beside=masks) as writer:
        for name in track(list(specs), "Writing"):
            if source is not None and name in experts:
                stack, expert, row = experts[name]
                (trained_expert,) = source.tensor(stack, expert, expert + 1)  # (rows, columns), gate and up together
                writer.write(name, trained_expert[row : row + specs[name].shape[0]].to(specs[name].dtype))
                continue
            if source is None or name not in trains:
                writer.copy(name, whole)
                continue
            for row, block in source.blocks(source.holder(trains[name])):
                writer.write(name, block.to(specs[name].dtype), row)
    whole.copy_side_files(out)
    write_json(out / "config.json", whole.config)
