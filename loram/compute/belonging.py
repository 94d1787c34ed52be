"""Whether an adapter and a model belong together: modules and shapes, origin, and repeated weights of the base."""

from collections.abc import Mapping
from pathlib import Path

import torch

from loram.base.errors import UserError
from loram.base.hashes import file_sha256
from loram.compute.original import check_original, open_4bit
from loram.disk.adapter import WEIGHTS_NAME, Adapter
from loram.disk.artifacts import find_manifest
from loram.disk.checkpoint import Checkpoint
from loram.disk.renamed import in_text
from loram.disk.tensorfile import TensorFile
from loram.model.plan import MASKS_NAME, find_plan


def load_for(checkpoint: Checkpoint, folder: Path, *, trained_on: str | Path | None = None) -> Adapter:
    """Read an adapter and make sure that it was made for this model, or for its weights in 4 bits.

    An adapter of a wrapped model comes with the names of its text model, as the checkpoint's tensors do.

    Args:
        checkpoint: the model.
        folder: the adapter.
        trained_on: the model in 4 bits that it was trained on, where it is not at the name that the adapter has.

    Raises:
        UserError: the adapter is not sound, its modules or shapes are not the model's, its manifest or the plan beside
            it says that it was made for other weights, or it repeats weights of the base that are not the model's.
    """
    adapter = Adapter.load(folder)
    _check_origin(checkpoint, adapter, trained_on)
    shapes = _adaptable_shapes(checkpoint)
    if checkpoint.wrapper is not None and not adapter.masks:  # a masked one has the pruned model's names
        adapter = in_text(adapter, checkpoint.wrapper, shapes, checkpoint.name, full=not checkpoint.pruned)
    else:
        adapter.check_fits(shapes, checkpoint.name, full=not checkpoint.pruned)
    if checkpoint.quantized and adapter.of_experts:
        raise UserError(
            f"{folder}: adapts experts, which {checkpoint.name} has in fewer bits; take it in 16 or 32 bits"
        )
    check_base_weights(adapter, checkpoint)
    return adapter


def _adaptable_shapes(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of all that an adapter can be on, as `PruningPlan.adaptable_shapes` does."""
    row = checkpoint.architecture
    if checkpoint.quantized:  # packed tensors' shapes say nothing
        if plan := find_plan(checkpoint.folder):
            return plan.adaptable_shapes()
        geometry = checkpoint.geometry
        return {**geometry.linear_shapes(row), **geometry.expert_shapes(row)}
    shapes = {row.head: checkpoint.shape(checkpoint.head)}
    for layer, own in enumerate(checkpoint.rows_by_layer):
        prefix = row.layer_path(layer)
        for linear in own.linears:
            shapes[f"{prefix}.{linear.path}"] = checkpoint.shape(f"{prefix}.{linear.path}.weight")
        for tensor in own.expert_matrices:
            experts, *sides = checkpoint.shape(f"{prefix}.{tensor.name}")
            outputs, inputs = reversed(sides) if own.experts_transposed else sides
            shapes[f"{prefix}.{tensor.name}"] = experts, outputs, inputs
    return shapes


def _check_origin(checkpoint: Checkpoint, adapter: Adapter, trained_on: str | Path | None) -> None:
    """Refuse an adapter if its manifest, or the plan beside it, says that it was made for other weights."""
    folder, name = adapter.folder, checkpoint.name
    manifest, plan, ours = find_manifest(folder), find_plan(folder), find_plan(checkpoint.folder)
    made_from = {} if manifest is None else manifest.made_from
    if plan is not None and ours is not None and ours.fingerprint != plan.fingerprint:
        raise UserError(f"{folder}: was trained on another pruned model than {name} (their plans differ)")
    if checkpoint.pruned and manifest is not None and manifest.kind == "recovered":
        raise UserError(f"{folder}: this adapter is recovered; use it on the full model, not on {name}")
    if adapter.masks and plan is not None and file_sha256(folder / MASKS_NAME) != plan.masks:
        raise UserError(f"{folder / MASKS_NAME}: not the masks of the plan beside it; copy the adapter's folder again")
    made_for, expected = adapter.config.get("base_model_name_or_path"), made_from.get("base")
    if checkpoint.pruned:
        expected = made_from.get("pruned", expected)
    elif plan is not None:
        made_for, expected = plan.base.name, plan.base.fingerprint
    if expected is not None and checkpoint.fingerprint != expected:
        packed = None if checkpoint.quantized else open_4bit(trained_on or made_for, expected)
        if packed is None:
            in_4bit = manifest is not None and manifest.settings.get("load_in_4bit") and not checkpoint.pruned
            remedy = f"; if that is {name} in 4 bits and has moved: loram recover ADAPTER OUT --base {name} --pruned IT"
            raise UserError(
                f"{folder}: was made for {made_for}, and the weights of {name} are others (fingerprint "
                f"{checkpoint.fingerprint[:12]} instead of {expected[:12]}){remedy if in_4bit else ''}"
            )
        check_original(checkpoint, packed)
    if not checkpoint.pruned and "pruned" in made_from and not adapter.masks:
        raise UserError(f"{folder}: this adapter was trained on a pruned model: run `loram recover` on it first")


def check_base_weights(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuse an adapter that holds weights of its base, unless they are exactly those of a model.

    PEFT saves the base's lm_head with the factors where lm_head is targeted, and both tables where
    `save_embedding_layers` is on. As long as nobody trained them, they say nothing.

    Raises:
        UserError: a weight differs, or cannot be compared; the message names the key.
    """
    if not adapter.base_weights:
        return
    file = TensorFile(adapter.folder / WEIGHTS_NAME)
    for weight, key in adapter.base_weights.items():
        where, name = f"{file.path}: {key}", checkpoint.holder(weight)
        if name not in checkpoint.names():
            raise UserError(f"{where} is neither a LoRA factor nor a weight of {checkpoint.name}")
        if checkpoint.constants(name):
            raise UserError(
                f"{where} repeats a weight that {checkpoint.name} has in 4 bits, so they cannot be compared; take the "
                "model in 16 bits, or save the adapter again with save_embedding_layers=False"
            )
        spec = file.specs[key]
        same = spec.shape == checkpoint.shape(name) and all(
            torch.equal(block.to(spec.dtype), file.read(key, row, row + len(block)))
            for row, block in checkpoint.blocks(name)
        )
        if not same:
            raise UserError(
                f"{where} is not the {name} of {checkpoint.name}: it was trained or resized, and LoRAM knows only what "
                "LoRA factors train; if it was not, save the adapter again with save_embedding_layers=False"
            )
