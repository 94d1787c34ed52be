"""Liger's Triton kernels in a model, pruned ones included, with the loss left alone."""

import inspect
from collections.abc import Mapping
from typing import Any

from loram.base.errors import UserError


def use_liger_(model: Any, options: Mapping[str, bool] | None = None) -> None:
    """Put Liger's kernels for norms, rotary embeddings and gated MLPs into a causal language model.

    Its losses stay out: they read lm_head's weight, which an adapter, or 4 bits, makes the wrong one.

    Args:
        model: of a supported family, full or pruned; linears may have adapters.
        options: which kernels, under Liger's own names.

    Raises:
        UserError: Liger is not installed, or has no kernels for the family.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN
    except ImportError as error:
        raise UserError("trainer: use_liger_kernel needs Liger (pip install liger-kernel)") from error
    family = model.config.model_type.removeprefix("loram_")
    if family not in KNOWN:
        raise UserError(f"trainer: use_liger_kernel: Liger has no kernels for {family}; leave it out")
    apply = KNOWN[family]
    chosen = {**(options or {}), "cross_entropy": False, "fused_linear_cross_entropy": False}
    apply(model=model, **{key: value for key, value in chosen.items() if key in inspect.signature(apply).parameters})
