"""Write a model folder again with an adapter's update in its weights, a few rows at a time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from loram.base.errors import UserError
from loram.base.progress import track
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.disk.files import write_json
from loram.disk.writer import ShardedWriter


def write_merged(out: Path, base: Checkpoint, adapter: Adapter) -> None:
    """Write a model folder again with an adapter's update in its weights, in the dtypes of the folder.

    Sums are in float32. If the head is tied to the embedding and the adapter updates it, the new model has a head of
    its own (`tie_word_embeddings` false), since the embedding must stay as it was.

    Args:
        out: the folder to write into.
        base: the full or pruned model; everything in a wrapped one that is not its text model is copied.
        adapter: the adapter, which fits the model.

    Raises:
        UserError: a weight that the adapter updates is quantised, or the model is sparse.
    """
    check_mergeable(base)
    whole, architecture = base.whole, base.architecture
    sources = {name: name for name in whole.names()}
    updates = _updates(base, adapter)
    untied = base.tied and architecture.head in adapter.modules
    if untied:
        head, embedding = architecture.head_weight, architecture.embedding_weight
        sources[base.name_in_files(head)] = base.name_in_files(embedding)
    specs = {name: whole.spec(source) for name, source in sources.items()}
    for weight in updates:
        if not (dtype := specs[weight].dtype).is_floating_point:
            raise UserError(f"{base.name}: {weight} is quantised ({dtype}); take its original, in 16 or 32 bits")
    with ShardedWriter(out, specs) as writer:
        for weight, source in track(list(sources.items()), "Merging"):
            updated = updates.get(weight)
            for row, block in whole.blocks(source):
                if updated is not None:
                    block = updated(block, row).to(block.dtype)
                writer.write(weight, block, row)
    whole.copy_side_files(out)
    write_json(out / "config.json", base.untied_config if untied else whole.config)


def check_mergeable(base: Checkpoint) -> None:
    """Refuse a model whose weights cannot take an update.

    Raises:
        UserError: the model is sparse.
    """
    if base.sparse:
        raise UserError(
            f"{base.name}: is sparse, and an update would fill it; merge into the full model it was made from"
        )


def _updates(base: Checkpoint, adapter: Adapter) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Return what merging makes of the rows of a tensor, by name in the files: (rows, index of the first) -> rows."""
    updates: dict[str, Callable[[Tensor, int], Tensor]] = {}
    transposed = base.architecture.experts_transposed
    for module in adapter.modules:
        if module not in adapter.of_experts:
            updates[base.name_in_files(f"{module}.weight")] = partial(adapter.updated, module)
            continue
        parts = list(base.experts_in_files(module))
        for name, expert, first in parts:
            updates[name] = partial(_updated_part, adapter, module, expert, first, transposed)
        if not parts:
            updates[base.name_in_files(module)] = partial(adapter.updated, module, transposed=transposed)
    return updates


def _updated_part(
    adapter: Adapter, module: str, expert: int, first: int, transposed: bool, rows: Tensor, start: int
) -> Tensor:
    """Return some rows of a part of one expert with the adapter's update, in float32.

    Args:
        adapter: the adapter.
        module: the tensor of all experts.
        expert, first: which expert it is, and where in that expert's matrix the part begins.
        transposed: whether that matrix is (in_features, out_features).
        rows, start: the rows, and the index of the first of them in the part.
    """
    delta = adapter.delta(module, expert, expert + 1)[0]
    begin = first + start
    return (delta.T if transposed else delta)[begin : begin + len(rows)] + rows
