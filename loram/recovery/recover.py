"""The recover stage: an adapter trained on a pruned model -> a stock PEFT adapter for the full one."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loram.base.errors import UserError
from loram.base.paths import is_on_hub, local, named
from loram.compute.belonging import check_base_weights, load_for
from loram.compute.device import pick_device
from loram.compute.likelihood import load_scored
from loram.compute.loading import load_tokenizer, open_full
from loram.compute.original import check_original, open_4bit
from loram.disk.adapter import ROW_LENGTHS_NAME, Adapter, save_adapter, scaled
from loram.disk.artifacts import Manifest, check_output, find_manifest, publish
from loram.disk.card import Making, shown, write_card
from loram.disk.checkpoint import Checkpoint
from loram.disk.files import copy_side_files
from loram.disk.opening import is_cached, open_model, plan_of
from loram.disk.renamed import in_full, in_text, in_wrapper
from loram.disk.tensorfile import TensorFile
from loram.model.plan import PLAN_NAME, PruningPlan, find_plan
from loram.model.resize import widen
from loram.model.wrappers import WRAPPERS
from loram.recovery.correct import best_multiplier, correct_adapter
from loram.recovery.options import RecoverOptions

logger = logging.getLogger(__name__)

_DEV_LENGTH = 1024


def recover(
    adapter: str | Path,
    out: str | Path,
    *,
    options: RecoverOptions | None = None,
    base: str | Path | None = None,
    pruned: str | Path | None = None,
    device: str | None = None,
    chat_template: str | Path | None = None,
    **fields: Any,
) -> Path:
    """Widen a LoRA adapter to the full model's shapes: zeros where rows or columns were pruned, all else copied.

    This is the recovery function R of arXiv 2502.13533, section 3.2. It is exact and does without the full model: the
    plan beside the adapter, or in the folder that it was trained on, has its geometry. Layers that were dropped get no
    factors. An adapter of a sparse model is copied, because the shapes are those of the full model. Where the full
    model is wrapped, the recovered adapter has the wrapped model's names, whether the pruned one has towers or not.
    Weights are read, tensor by tensor, only for the options (see `loram.recovery.correct`) and for DoRA: its magnitudes
    are lengths of rows, and a full row is longer than a pruned one.

    An adapter that was trained on a full model in NF4 has no plan. With `base`, the model's original, it is written
    again as one of that, once every tensor is found to lie within NF4's error of the original's.

    Args:
        adapter: folder that `train` made on a pruned model, or any trainer's PEFT adapter. Its plan is the
            `loram_plan.json` beside it, or else that of `pruned` or of its `base_model_name_or_path`.
        out: the recovered adapter folder to make: stock PEFT for `base_model_name_or_path` = the full model.
        options: what to do beyond widening; single options may be given by name instead: `correct=True` takes out what
            alignment and 4 bits changed in the pruned model's weights (EMLoC, arXiv 2506.12015).
        base: the full model, where it is not at the name that the plan has. The recovered adapter then names this one.
            It may be a hub id, which is compared with the plan where the model is in the hub's cache.
        pruned: the folder the adapter was trained on, for `correct` or a model in NF4, where it is not at the name the
            adapter has.
        device: for `dev_dataset`: `cpu`, `cuda`, ...; the first GPU where there is one.
        chat_template: a .jinja file, or a model whose tokenizer has a template, in place of the model's own template.
        fields: single options by name, over `options`; see `RecoverOptions`.

    Returns:
        `out`.

    Raises:
        UserError: the folder is no adapter of a pruned model, its tensors do not fit the plan, the plan is not that of
            the model it was trained on, a refit is to be corrected, `base` or `pruned` are other models, or `out`
            exists.
    """
    chosen = RecoverOptions.of(options, **fields)
    source = local(adapter)
    out = check_output(out, source)
    trained = Adapter.load(source)
    plan = find_plan(source) or plan_of(pruned or trained.config.get("base_model_name_or_path"))
    manifest = find_manifest(source)
    if plan is None and base is not None:
        if chosen.correct or chosen.dev_dataset is not None:
            raise UserError(f"{source}: no loram_plan.json beside the adapter, and correction and multiplier need one")
        return _rebase(trained, open_model(base), pruned, out)
    if plan is None:
        raise UserError(
            f"{source}: no loram_plan.json beside the adapter, nor in its base_model_name_or_path; if it was trained "
            "on a pruned model, copy that folder's loram_plan.json here; if on a full model in 4 bits, name its "
            "original with --base"
        )
    if manifest is not None and manifest.kind == "recovered":
        raise UserError(f"{source}: this adapter is recovered already; use it on the full model")
    if trained.masks:
        raise UserError(
            f"{source}: was trained with mask_update, and a masked update is not of rank r, so no adapter of that rank "
            "equals it; `loram merge BASE ADAPTER OUT` adds it to the full model exactly"
        )
    if plan.refit and chosen.correct:
        raise UserError(
            f"{source}: correct takes out changes of the weights that were kept, but those of a refitted model make up "
            "for what was removed, which the full model has; leave it out"
        )
    _check_origin(source, trained, plan, manifest)
    reads_full = chosen.correct or chosen.dev_dataset is not None or trained.dora
    full = _full_model(plan, base, read=reads_full, chat_template=chat_template)
    trained = _in_text(trained, plan)
    if trained.dora and (chosen.correct or chosen.dev_dataset is not None):
        raise UserError(f"{source}: a DoRA adapter; correction and multiplier are for plain LoRA, so leave them out")
    settings: dict[str, Any] = {"correct": chosen.correct}
    _check_base_weights(trained, plan, full, pruned)
    if chosen.correct and full is not None:
        in_4bit = manifest is not None and bool(manifest.settings.get("load_in_4bit"))
        trained = correct_adapter(trained, plan, full, _trained_on(trained, manifest, pruned), in_4bit=in_4bit)
    tensors = {name: widen(name, tensor, plan) for name, tensor in trained.tensors.items()}
    if trained.dora and full is not None:
        tensors |= _magnitudes(trained, plan, full)
    name = plan.base.name if base is None else named(base)
    config = {**trained.config, "base_model_name_or_path": name, "task_type": "CAUSAL_LM"}
    recovered = dataclasses.replace(trained, config=config, tensors=tensors)
    if plan.dropped:
        recovered = in_full(recovered)
    if (spec := chosen.dev_dataset) is not None and full is not None:
        rows = load_scored(spec, full, load_tokenizer(full), None, _DEV_LENGTH).rows
        best, losses = best_multiplier(full, recovered, (rows["input_ids"][:], rows["labels"][:]), pick_device(device))
        recovered = scaled(recovered, best)
        settings |= {"dev_data": spec.model_dump(mode="json"), "multiplier": best, "dev_losses": losses}
    wrapper = WRAPPERS.get(plan.base.wrapper or "") if full is None else full.wrapper
    if wrapper is not None:
        recovered = in_wrapper(recovered, wrapper)
    _warn_of_tied_head(trained, plan, name)
    made_from = {"base": plan.base.fingerprint, "plan": plan.fingerprint, "adapter": trained.fingerprint}
    with publish(out, kind="recovered", made_from=made_from, settings=settings) as staging:
        save_adapter(staging, recovered.config, recovered.tensors)
        copy_side_files(source, staging)
        plan.save(staging)
        write_card(staging, _making(_step(name, settings), name, source, full, wrapped=wrapper is not None))
    return out


def _making(step: str, model: str, adapter: Path, full: Checkpoint | None, *, wrapped: bool) -> Making:
    parents = [adapter, *([] if full is None else [full.folder]), *([local(model)] if local(model).is_dir() else [])]
    return Making(kind="recovered", step=step, model=model, parents=parents, wrapped=wrapped)


def _step(model: str, settings: Mapping[str, Any]) -> str:
    """Return what recovery did, as one line of Markdown."""
    parts = [
        f"**Recovered** for `{shown(model)}`: widened to its shapes, with zeros where parts were pruned",
        *(["corrected for what alignment and 4 bits changed in the weights"] if settings["correct"] else []),
        *([f"the update multiplied by {settings['multiplier']:g}"] if "multiplier" in settings else []),
    ]
    return "; ".join(parts) + "."


def _in_text(adapter: Adapter, plan: PruningPlan) -> Adapter:
    """Return an adapter under the names of the text model, if the pruned model that it was trained on has towers.

    Raises:
        UserError: it does not fit the plan, or has a module outside the text model.
    """
    shapes, wrapper = plan.adaptable_shapes(), WRAPPERS.get(plan.base.wrapper or "")
    model = f"the model of {adapter.folder / PLAN_NAME}"
    if wrapper is not None and any(module.startswith(f"{wrapper.decoder}.") for module in adapter.modules):
        return in_text(adapter, wrapper, shapes, model, full=False)
    adapter.check_fits(shapes, model)
    return adapter


def _rebase(adapter: Adapter, full: Checkpoint, trained_on: str | Path | None, out: Path) -> Path:
    """Write an adapter that was trained on a full model in NF4 again, as one of the model's original.

    Raises:
        UserError: the model in 4 bits is not there, or `full` is not its original; or there is nothing to do.
    """
    manifest = find_manifest(adapter.folder)
    if full.pruned or manifest is None or manifest.made_from.get("base") in (None, full.fingerprint):
        raise UserError(
            f"{adapter.folder}: no loram_plan.json beside the adapter, so it is for a full model already; only an "
            "adapter that `loram train` made on a model in 4 bits is recovered without a plan, for its original"
        )
    load_for(full, adapter.folder, trained_on=trained_on)
    made_from = {"base": full.fingerprint, "adapter": adapter.fingerprint}
    with publish(out, kind="recovered", made_from=made_from) as staging:
        save_adapter(staging, {**adapter.config, "base_model_name_or_path": full.name}, adapter.tensors)
        copy_side_files(adapter.folder, staging)
        step = f"**Made for** `{shown(full.name)}`, of which the model in 4 bits was made."
        write_card(staging, _making(step, full.name, adapter.folder, full, wrapped=full.wrapper is not None))
    return out


def _full_model(
    plan: PruningPlan, base: str | Path | None, *, read: bool, chat_template: str | Path | None
) -> Checkpoint | None:
    """Return the full model, or None where recovery does without it; a model that is named is compared with the plan.

    Args:
        plan: the plan.
        base: what the user names; a model on the hub is not fetched for the comparison alone.
        read: whether recovery reads its weights.
        chat_template: as `open_full`.

    Raises:
        UserError: it is not there, or it is another model.
    """
    if base is None and not read:
        return None
    name = plan.base.name if base is None else named(base)
    if not read and is_on_hub(name) and not is_cached(name):
        logger.warning("%s: not on this disk, so it is not checked that this is the full model of the plan", name)
        return None
    return open_full(plan, base, chat_template=chat_template)


def _warn_of_tied_head(adapter: Adapter, plan: PruningPlan, name: str) -> None:
    """Say what other tools do wrong with an adapter on a head that is tied to the embedding."""
    if plan.geometry.tie_word_embeddings and plan.architecture.head in adapter.modules:
        logger.warning(
            "%s is tied to the embedding, and the adapter is on it: PEFT's own merge changes the embedding too, and "
            "llama.cpp cannot load such an adapter; merge it with `loram merge %s ADAPTER OUT`",
            plan.architecture.head,
            name,
        )


def _check_base_weights(
    adapter: Adapter, plan: PruningPlan, full: Checkpoint | None, pruned: str | Path | None
) -> None:
    """Refuse an adapter that repeats weights of its base, unless they are those of the model it was trained on.

    That is the pruned model. Where it is not there, the full one will do: both tables are as large, and only alignment
    can have trained them.
    """
    if not adapter.base_weights:
        return
    names = (pruned, adapter.config.get("base_model_name_or_path"), None if full else plan.base.name)
    name = next((name for name in names if name and local(name).exists()), None)
    model = full if name is None else open_model(name)
    if model is None:
        key = next(iter(adapter.base_weights.values()))
        raise UserError(
            f"{adapter.folder}: repeats a weight of its base, {key}, and no model is there to compare it with; name "
            "the folder that it was trained on with --pruned, or the full model with --base"
        )
    check_base_weights(adapter, model)


def _trained_on(adapter: Adapter, manifest: Manifest | None, pruned: str | Path | None) -> Checkpoint:
    """Return the pruned model that an adapter was trained on, in 16 or 32 bits."""
    name = pruned or adapter.config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter.folder}: does not say what it was trained on; name that folder with --pruned")
    try:
        model = open_model(name)
    except UserError as error:
        raise UserError(f"{error}; say where the model that the adapter was trained on is: --pruned") from error
    expected = None if manifest is None else manifest.made_from.get("pruned")
    if expected is not None and model.fingerprint != expected:
        packed = None if model.quantized else open_4bit(adapter.config.get("base_model_name_or_path"), expected)
        if packed is None:
            raise UserError(
                f"{model.name}: not the model that {adapter.folder} was trained on "
                f"(fingerprint {model.fingerprint[:12]} instead of {expected[:12]}); name that one with --pruned"
            )
        check_original(model, packed)
    if model.quantized:
        raise UserError(f"{model.name}: is in 4 bits; name the folder that it was made from with --pruned")
    return model


def _magnitudes(adapter: Adapter, plan: PruningPlan, full: Checkpoint) -> dict[str, Tensor]:
    """DoRA's magnitudes for the full model: m = ‖W‖ of every row, times what training made of the row's length.

    A row that was kept has the length ‖W^P‖ in the pruned model and the magnitude m^P, so m = m^P ‖W‖ / ‖W^P‖: a pruned
    o_proj or down_proj has lost columns, and an aligned model has other weights. A row that was pruned keeps ‖W‖.
    """
    path = adapter.folder / ROW_LENGTHS_NAME
    if not path.is_file():
        raise UserError(
            f"{path}: missing, and a DoRA adapter cannot be recovered without the lengths of the rows that it was "
            "trained on; `loram train --method dora` leaves them there"
        )
    if full.quantized:
        raise UserError(f"{full.name}: in 4 bits; a DoRA adapter is recovered with the full model in 16 or 32 bits")
    pruned, found = TensorFile(path), {}
    for module, magnitude in adapter.magnitudes.items():
        name = f"base_model.model.{module}.lora_magnitude_vector"
        if module not in pruned.specs or pruned.specs[module].shape != tuple(magnitude.shape):
            raise UserError(f"{path}: has no row lengths of {module}, or another model's")
        grown = widen(name, magnitude / pruned.read(module) - 1, plan) + 1
        found[name] = (grown * _row_lengths(full, f"{module}.weight")).to(magnitude.dtype)
    return found


def _row_lengths(full: Checkpoint, name: str) -> Tensor:
    """‖W‖ of every row of a weight: (out_features,) float32."""
    blocks = full.blocks(full.holder(name))
    return torch.cat([torch.linalg.vector_norm(block.float(), dim=1) for _, block in blocks])


def _check_origin(source: Path, adapter: Adapter, plan: PruningPlan, manifest: Manifest | None) -> None:
    """Refuse a plan that is not the one of the model that the adapter was trained on, as far as anything tells."""
    if manifest is not None:
        if (made_from := manifest.made_from.get("plan", "none")) != plan.fingerprint:
            raise UserError(
                f"{source / PLAN_NAME}: not the plan that the adapter was trained with "
                f"(fingerprint {plan.fingerprint[:12]} instead of {made_from[:12]})"
            )
        return
    trained_on = adapter.config.get("base_model_name_or_path")
    theirs = find_plan(local(trained_on)) if isinstance(trained_on, str) and trained_on else None
    if theirs is not None and theirs.fingerprint != plan.fingerprint:
        raise UserError(
            f"{source / PLAN_NAME}: not the plan of {trained_on}, which the adapter was trained on "
            f"(fingerprint {plan.fingerprint[:12]} instead of {theirs.fingerprint[:12]}); copy that one"
        )
