"""Liger's Triton kernels in full and pruned models, without Liger's losses."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from loram.base.errors import UserError


def use_liger_(model: nn.Module, options: Mapping[str, bool] | None = None) -> None:
    """Put Liger's kernels for norms, rotary embeddings and gated MLPs into a causal language model.

    Liger's losses stay out. They read the weight of lm_head, which is not what the model computes with if lm_head has
    an adapter or is in 4 bits.

    Args:
        model: a model of a supported family, full or pruned; its linears may have adapters.
        options: the kernels to use, under Liger's own names (default: all).

    Raises:
        UserError: Liger is not installed, or has no kernels for the family, or the model has dropped layers.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as APPLY_FUNCTIONS
    except ImportError as error:
        raise UserError("trainer: use_liger_kernel needs Liger (pip install liger-kernel)") from error
    config: Any = model.config  # Any: nn.Module does not declare it
    family = config.model_type.removeprefix("loram_")
    if family not in APPLY_FUNCTIONS:
        raise UserError(f"trainer: use_liger_kernel: Liger has no kernels for {family}; leave it out")
    if getattr(config, "dropped_layers", None):
        raise UserError("trainer: use_liger_kernel: Liger does not know models with dropped layers; leave it out")
    apply = APPLY_FUNCTIONS[family]
    parameters = inspect.signature(apply).parameters
    kernels = {**(options or {}), "cross_entropy": False, "fused_linear_cross_entropy": False}
    apply(model=model, **{key: value for key, value in kernels.items() if key in parameters})
