"""Corrections of a recovered adapter for the differences between the full model and the pruned one.

Alignment or 4 bits may have changed the weights that an adapter was trained on, while the full model's weights are
unchanged. EMLoC (arXiv 2506.12015) subtracts this change from the adapter, as far as the adapter's own input directions
can express it. Besides, the best strength of the update may be larger or smaller on the full model than on the pruned
one; a multiplier for it can be chosen on development rows.
"""

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from loram.base.progress import track
from loram.compute.likelihood import adapted_losses
from loram.compute.nf4 import as_4bit, experts_as_4bit
from loram.disk.adapter import Adapter, scaled
from loram.disk.checkpoint import Checkpoint
from loram.disk.expert_factors import by_expert, together
from loram.model.plan import PruningPlan
from loram.model.resize import narrow

logger = logging.getLogger(__name__)

LIMIT = 3.0  # lambda in EMLoC's paper
MULTIPLIERS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)


def correct_adapter(
    adapter: Adapter, plan: PruningPlan, base: Checkpoint, pruned: Checkpoint, *, in_4bit: bool
) -> Adapter:
    """Correct an adapter, module by module, for the change of the weights that pruning kept.

    Only the weights of one module are in memory at a time.

    Args:
        adapter: the adapter as it was trained on the pruned model.
        plan: the plan of the pruned model.
        base: the full model, in 16 or 32 bits.
        pruned: the pruned model that the adapter was trained on.
        in_4bit: whether the pruned model was in NF4 during the training; its weights are then rounded to NF4 before
            they are compared.

    Returns:
        An adapter with the same shapes, names and options.
    """
    tensors = dict(adapter.tensors)
    for module in track(list(adapter.modules), "Correcting"):
        experts = adapter.experts(module)
        name = f"{module}.weight" if experts is None else module
        full, trained = base.tensor(base.holder(name)), pruned.tensor(pruned.holder(name))
        in_layer = plan.architecture.split(module) is not None
        kept = trained != 0 if pruned.sparse and in_layer else torch.ones_like(trained, dtype=torch.bool)
        if in_4bit and experts is None:
            trained = trained.masked_scatter(kept, as_4bit(trained[kept]))
        elif in_4bit:
            trained = experts_as_4bit(trained, transposed=plan.architecture.experts_transposed)
        change = (narrow(name, full, plan).float() - trained.float()) * kept
        factors, scaling = adapter.modules[module], adapter.scaling(module)
        if experts is None:
            a, b = correct_factors(factors["A"], factors["B"], change, scaling)
        else:
            change = change.mT if plan.architecture.experts_transposed else change
            each = zip(*by_expert(factors["A"], factors["B"], experts), change, strict=True)
            corrected = [correct_factors(*own, scaling) for own in each]
            a, b = together(*(torch.stack(parts) for parts in zip(*corrected, strict=True)))
        for part, factor in (("A", a), ("B", b)):
            key = f"base_model.model.{module}.lora_{part}.weight"
            tensors[key] = factor.to(factors[part].dtype)
    return dataclasses.replace(adapter, tensors=tensors)


def correct_factors(a: Tensor, b: Tensor, change: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Apply EMLoC's correction to the LoRA factors of one module (arXiv 2506.12015, section 3.3).

    Let A = U S Vᵀ be the singular value decomposition of A. First the adapter is written with orthonormal input
    directions, A' = Vᵀ and B' = B U S, which does not change the product. Then the effect of the change on these
    directions is subtracted: B' - clip(change V / scaling). The clip shortens each column so that its mean absolute
    value is at most `LIMIT` times that of the same column of B'.

    Args:
        a: lora_A, (r, in_features), with r at most in_features.
        b: lora_B, (out_features, r).
        change: the full model's weight minus the weight that the adapter was trained on, (out_features, in_features).
        scaling: the factor that B·A is multiplied by.

    Returns:
        (A', corrected B'), both float32. If `change` is 0, their product is B·A.
    """
    left, sizes, directions = torch.linalg.svd(a.float(), full_matrices=False)  # (r, r), (r,), (r, in_features)
    b = b.float() @ (left * sizes)
    effect = change @ directions.T / scaling  # (out_features, r)
    limit, size = LIMIT * b.abs().mean(0), effect.abs().mean(0)
    return directions, b - effect * (limit / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)


def best_multiplier(
    base: Checkpoint,
    adapter: Adapter,
    rows: tuple[Sequence[list[int]], Sequence[list[int]]],
    device: torch.device,
) -> tuple[float, dict[float, float]]:
    """Find the multiple of a recovered update with which the full model has the lowest loss on development rows.

    Args:
        base: the full model. It is loaded if it fits in memory, and otherwise streamed once per multiplier.
        adapter: the recovered adapter, in the full model's shapes.
        rows: the token ids and the labels of the development rows.
        device: the device to compute on.

    Returns:
        (the best of `MULTIPLIERS`, each multiplier -> its mean loss in nats per token).
    """
    values = adapted_losses(base, [scaled(adapter, factor) for factor in MULTIPLIERS], device, *rows)
    losses = dict(zip(MULTIPLIERS, values, strict=True))
    best = min(losses, key=losses.__getitem__)
    logger.info("loss on development rows: %s", ", ".join(f"x{factor:g} {loss:.4f}" for factor, loss in losses.items()))
    return best, losses
