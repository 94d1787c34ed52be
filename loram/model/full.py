"""The full model that a plan was made from."""

from pathlib import Path

from loram.errors import UserError
from loram.model.checkpoint import Checkpoint, open_model
from loram.model.plan import PruningPlan


def open_full(plan: PruningPlan, base: str | Path | None = None) -> Checkpoint:
    """The full model of a plan: at `base`, else at the name that the plan has.

    Raises:
        UserError: it is not there, or is another model.
    """
    try:
        full = open_model(base or plan.base.name)
    except UserError as error:
        if base is not None:
            raise
        raise UserError(f"{error}; say where the full model is: --base, or base_model_name_or_path") from error
    if full.fingerprint != plan.base.fingerprint:
        raise UserError(
            f"{full.name}: not the full model that the plan was made from, {plan.base.name} "
            f"(fingerprint {full.fingerprint[:12]} instead of {plan.base.fingerprint[:12]}); name that one with --base"
        )
    return full
