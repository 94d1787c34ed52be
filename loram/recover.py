"""The recover stage: an adapter trained on a pruned model -> a stock PEFT adapter for the full one."""

from pathlib import Path

from loram.artifacts import Manifest, check_output, find_manifest, publish
from loram.errors import UserError
from loram.model.adapter import Adapter, save_adapter
from loram.model.checkpoint import copy_side_files
from loram.model.plan import PLAN_NAME, PruningPlan, find_plan
from loram.model.resize import widen


def recover(adapter: str | Path, out: str | Path) -> Path:
    """Widen a LoRA adapter to the full model's shapes: zeros where rows or columns were pruned, all else copied.

    Exact (arXiv 2502.13533, section 3.2, the recovery function R) and without the full model: the plan beside the
    adapter has its geometry. Of a sparse model, whose shapes are the full model's, all is copied.

    Args:
        adapter: folder that `train` made on a pruned model; any trainer's PEFT adapter with that model's
            `loram_plan.json` copied beside it will do.
        out: the recovered adapter folder to make: stock PEFT for `base_model_name_or_path` = the full model.

    Returns:
        `out`.

    Raises:
        UserError: the folder is no adapter of a pruned model, its tensors do not fit the plan, the plan is not that of
            the model it was trained on, or `out` exists.
    """
    source, out = Path(adapter), Path(out)
    check_output(out, source)
    trained = Adapter.load(source)
    plan = find_plan(source)
    manifest = find_manifest(source)
    if plan is None:
        raise UserError(f"{source}: no loram_plan.json beside the adapter; was it trained on a pruned model?")
    if manifest is not None and manifest.kind == "recovered":
        raise UserError(f"{source}: this adapter is recovered already; use it on the full model")
    if trained.masks:
        raise UserError(
            f"{source}: was trained with mask_update, and a masked update is not of rank r, so no adapter of that rank "
            "equals it; `loram merge BASE ADAPTER OUT` adds it to the full model exactly"
        )
    _check_origin(source, trained, plan, manifest)
    trained.check_fits(plan.linear_shapes(), f"the model of {source / PLAN_NAME}")
    tensors = {name: widen(name, tensor, plan) for name, tensor in trained.tensors.items()}
    config = {**trained.config, "base_model_name_or_path": plan.base.name, "task_type": "CAUSAL_LM"}
    made_from = {"base": plan.base.fingerprint, "plan": plan.fingerprint, "adapter": trained.fingerprint}
    with publish(out, kind="recovered", made_from=made_from) as staging:
        save_adapter(staging, config, tensors)
        copy_side_files(source, staging)
    return out


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
    theirs = find_plan(Path(trained_on)) if isinstance(trained_on, str) and trained_on else None
    if theirs is not None and theirs.fingerprint != plan.fingerprint:
        raise UserError(
            f"{source / PLAN_NAME}: not the plan of {trained_on}, which the adapter was trained on "
            f"(fingerprint {plan.fingerprint[:12]} instead of {theirs.fingerprint[:12]}); copy that one"
        )
