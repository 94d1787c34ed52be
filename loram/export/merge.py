"""The merge stage: add an adapter to its base's weights, a few rows at a time, and write a plain model folder."""

import shutil
from pathlib import Path

from loram.export.table import Export


def merge(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Add an adapter's update scaling·B·A to a model's weights and write the result as a plain model folder.

    With DoRA every row is then brought to its magnitude; with `mask_update`, the update is masked as in training. See
    `loram.disk.merged`. Everything in a wrapped model that is not its text model is copied byte for byte.

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
    from loram.compute.belonging import load_for
    from loram.disk.artifacts import check_output, publish
    from loram.disk.card import Making, shown, write_card
    from loram.disk.files import CHAT_TEMPLATE
    from loram.disk.merged import check_mergeable, write_merged
    from loram.disk.opening import open_model

    out = check_output(out, base, adapter)
    checkpoint = open_model(base)
    check_mergeable(checkpoint)
    update = load_for(checkpoint, local(adapter))
    made_from = {"base": checkpoint.fingerprint, "adapter": update.fingerprint}
    with publish(out, kind="merged", made_from=made_from) as staging:
        write_merged(staging, checkpoint, update)
        if (template := update.folder / CHAT_TEMPLATE).is_file():  # that of the chats that it was trained on
            shutil.copyfile(template, staging / CHAT_TEMPLATE)
        making = Making(
            kind="merged",
            step=f"**Merged** into the weights of `{shown(checkpoint.name)}`.",
            model=checkpoint.name,
            parents=[update.folder, checkpoint.folder],
            wrapped=checkpoint.wrapper is not None,
        )
        write_card(staging, making)
    return out


EXPORT = Export(
    function=merge,
    summary="Add an adapter to the weights of a model: a plain model folder.",
    result="merged model",
    takes=("model", "adapter"),
)
