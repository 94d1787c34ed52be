"""The merge stage: add an adapter to its base's weights, a few rows at a time, and write a plain model folder."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loram.base.errors import UserError
from loram.export.table import Export

if TYPE_CHECKING:
    from torch import Tensor

    from loram.disk.adapter import Adapter
    from loram.disk.checkpoint import Checkpoint


def merge(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Add an adapter's update scaling·B·A to a model's weights and write the result as a plain model folder.

    With DoRA every row is then brought to its magnitude; with `mask_update`, the update is masked as in training.
    Sums are in float32 and stored in the base's dtype. If the head is tied to the embedding and the adapter updates
    it, the merged model has a head of its own (`tie_word_embeddings` false), since the embedding must stay as it was.
    Of a wrapped model, everything else is copied byte for byte.

    Args:
        base: the hub id, folder or GGUF file of the model that the adapter is for; it may be a pruned folder.
        adapter: a PEFT LoRA or DoRA folder; for a full base a recovered one.
        out: the folder to make, which plain transformers loads.

    Returns:
        `out`.

    Raises:
        UserError: the adapter does not fit the base, or `out` exists.
    """
    from loram.base.paths import local
    from loram.base.progress import track
    from loram.compute.belonging import load_for
    from loram.disk.artifacts import check_output, publish
    from loram.disk.card import Making, shown, write_card
    from loram.disk.files import CHAT_TEMPLATE, write_json
    from loram.disk.opening import open_model
    from loram.disk.writer import ShardedWriter

    out = check_output(out, base, adapter)
    checkpoint = open_model(base)
    if checkpoint.sparse:
        raise UserError(
            f"{checkpoint.name}: is sparse, and an update would fill it; merge into the full model it was made from"
        )
    update = load_for(checkpoint, local(adapter))
    whole, architecture = checkpoint.whole, checkpoint.architecture
    sources = {name: name for name in whole.names()}
    updates = _updates(checkpoint, update)
    untied = checkpoint.tied and architecture.head in update.modules
    if untied:
        head, embedding = architecture.head_weight, architecture.embedding_weight
        sources[checkpoint.name_in_files(head)] = checkpoint.name_in_files(embedding)
    specs = {name: whole.spec(source) for name, source in sources.items()}
    for weight in updates:
        if not (dtype := specs[weight].dtype).is_floating_point:
            raise UserError(
                f"{checkpoint.name}: {weight} is quantised ({dtype}); merge into its original, in 16 or 32 bits"
            )

    made_from = {"base": checkpoint.fingerprint, "adapter": update.fingerprint}
    with publish(out, kind="merged", made_from=made_from) as staging:
        with ShardedWriter(staging, specs) as writer:
            for weight, source in track(list(sources.items()), "Merging"):
                updated = updates.get(weight)
                for row, block in whole.blocks(source):
                    if updated is not None:
                        block = updated(block, row).to(block.dtype)
                    writer.write(weight, block, row)
        whole.copy_side_files(staging)
        if (template := update.folder / CHAT_TEMPLATE).is_file():  # that of the chats that it was trained on
            shutil.copyfile(template, staging / CHAT_TEMPLATE)
        write_json(staging / "config.json", checkpoint.untied_config if untied else whole.config)
        making = Making(
            kind="merged",
            step=f"**Merged** into the weights of `{shown(checkpoint.name)}`.",
            model=checkpoint.name,
            parents=[update.folder, checkpoint.folder],
            wrapped=checkpoint.wrapper is not None,
        )
        write_card(staging, making)
    return out


def _updates(checkpoint: "Checkpoint", adapter: "Adapter") -> dict[str, Callable[["Tensor", int], "Tensor"]]:
    """Return what merging makes of the rows of a tensor, by name in the files: (rows, index of the first) -> rows."""
    updates: dict[str, Callable[[Tensor, int], Tensor]] = {}
    transposed = checkpoint.architecture.experts_transposed
    for module in adapter.modules:
        if module not in adapter.of_experts:
            updates[checkpoint.name_in_files(f"{module}.weight")] = partial(adapter.updated, module)
            continue
        parts = list(checkpoint.experts_in_files(module))
        for name, expert, first in parts:
            updates[name] = partial(_updated_part, adapter, module, expert, first, transposed)
        if not parts:
            updates[checkpoint.name_in_files(module)] = partial(adapter.updated, module, transposed=transposed)
    return updates


def _updated_part(
    adapter: "Adapter", module: str, expert: int, first: int, transposed: bool, rows: "Tensor", start: int
) -> "Tensor":
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


EXPORT = Export(
    function=merge,
    summary="Add an adapter to the weights of a model: a plain model folder.",
    result="merged model",
    takes=("model", "adapter"),
)
