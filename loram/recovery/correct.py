"""Correction at recovery: an adapter was trained on a base that alignment or 4 bits changed; the full model's is not.

EMLoC (arXiv 2506.12015) takes the difference of the two bases, as far as the adapter's own input directions see it, out
of the adapter. And the update as a whole may be worth more or less on the full model than on the pruned one, so that a
multiplier can be chosen on development rows.
"""

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from loram.base.progress import track
from loram.compute.likelihood import adapted_losses
from loram.compute.nf4 import as_4bit
from loram.disk.adapter import Adapter, scaled
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan
from loram.model.resize import narrow

logger = logging.getLogger(__name__)

LIMIT = 3.0  # EMLoC's lambda
MULTIPLIERS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)


def correct_adapter(
    adapter: Adapter, plan: PruningPlan, base: Checkpoint, pruned: Checkpoint, *, in_4bit: bool
) -> Adapter:
    """Take what changed in the kept part of the base out of an adapter, module by module, from the files.

    Args:
        adapter: as it was trained on the pruned model.
        plan: what is kept.
        base: the full model, in 16 or 32 bits.
        pruned: the folder that the adapter was trained on.
        in_4bit: whether its weights were in NF4 while training; they are then compared as NF4 has them.

    Returns:
        An adapter of the same shapes, names and options.
    """
    tensors = dict(adapter.tensors)
    for module in track(list(adapter.modules), "Correcting"):
        name = f"{module}.weight"
        full, trained = base.tensor(base.holder(name)), pruned.tensor(pruned.holder(name))
        in_layer = plan.architecture.split(module) is not None
        kept = trained != 0 if pruned.sparse and in_layer else torch.ones_like(trained, dtype=torch.bool)
        if in_4bit:
            trained = trained.masked_scatter(kept, as_4bit(trained[kept]))
        change = (narrow(name, full, plan).float() - trained.float()) * kept
        factors = adapter.modules[module]
        a, b = corrected(factors["A"], factors["B"], change, adapter.scaling(module))
        for part, factor in (("A", a), ("B", b)):
            key = f"base_model.model.{module}.lora_{part}.weight"
            tensors[key] = factor.to(factors[part].dtype)
    return dataclasses.replace(adapter, tensors=tensors)


def corrected(a: Tensor, b: Tensor, change: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """EMLoC's correction of one module (arXiv 2506.12015, section 3.3).

    With A = U S V', the adapter is first written with orthonormal input directions, A' = V' and B' = B U S, which
    changes nothing. Then what the base's change does to these directions is taken out: B' - clip(change V / scaling),
    each column of it shortened so that its mean size is `LIMIT` times that of B''s column at most.

    Args:
        a: lora_A, (r, in_features), r at most in_features.
        b: lora_B, (out_features, r).
        change: full weight - weight that was trained on, (out_features, in_features).
        scaling: what B·A is multiplied by.

    Returns:
        (A', corrected B'), float32. Where `change` is 0 their product is B·A.
    """
    left, sizes, directions = torch.linalg.svd(a.float(), full_matrices=False)
    b = b.float() @ (left * sizes)
    seen = change @ directions.T / scaling
    limit, size = LIMIT * b.abs().mean(0), seen.abs().mean(0)
    return directions, b - seen * (limit / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)


def best_multiplier(
    base: Checkpoint,
    adapter: Adapter,
    rows: tuple[Sequence[list[int]], Sequence[list[int]]],
    device: torch.device,
) -> tuple[float, dict[float, float]]:
    """Which multiple of a recovered update the full model does best with on development rows.

    Args:
        base: the full model; loaded if it fits in memory, else streamed once a multiplier.
        adapter: of the full model's shapes.
        rows: (input ids, labels).
        device: where it computes.

    Returns:
        (the best of `MULTIPLIERS`, mean loss in nats for each).
    """
    found = adapted_losses(base, [scaled(adapter, factor) for factor in MULTIPLIERS], device, *rows)
    losses = dict(zip(MULTIPLIERS, found, strict=True))
    best = min(losses, key=losses.__getitem__)
    logger.info("loss on development rows: %s", ", ".join(f"x{factor:g} {loss:.4f}" for factor, loss in losses.items()))
    return best, losses
