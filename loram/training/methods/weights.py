"""Methods that train the model's own weights: which weights train, and how they become an adapter."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loram.base.progress import track
from loram.disk.checkpoint import Checkpoint
from loram.model.families import family_of

logger = logging.getLogger(__name__)

ENOUGH = 0.9  # the share of the squared update that an extracted adapter should keep


def unfreeze_(model: Any, *, pruned: bool, around: bool) -> None:
    """Let the weights of a model train, and nothing else.

    In a pruned model only the linears of the decoder layers train: nothing else has a place in an adapter, so the full
    model could not be given it.

    Args:
        model: a causal language model.
        pruned: whether it is a pruned model.
        around: whether the embedding, the final norm and the head of a full model train too.
    """
    model.requires_grad_(around and not pruned)
    row = family_of(model.config.to_dict())
    linears = {f"{linear.path}.weight" for linear in row.linears}
    for layer in model.get_submodule(row.layers_path):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not pruned or name in linears)


def trained_layers(model: Any) -> list[list[nn.Parameter]]:
    """Return the parameters that train in each decoder layer; a layer that was dropped has none and is left out."""
    layers = model.get_submodule(family_of(model.config.to_dict()).layers_path)
    trained = [[parameter for parameter in layer.parameters() if parameter.requires_grad] for layer in layers]
    return [parameters for parameters in trained if parameters]


def extract(trained: Checkpoint, base: Checkpoint, r: int) -> tuple[dict[str, Any], dict[str, Tensor], float]:
    """Find the LoRA adapter of rank `r` that is nearest to what training changed in the decoder layers' linears.

    The update of each linear, W_trained - W_start = U S Vᵀ, is cut after its r largest singular values (Eckart, Young
    1936): lora_B is U √S and lora_A is √S Vᵀ. A linear with fewer than r rows or columns has fewer singular values; its
    factors have zeros beyond them.

    Args:
        trained: the model after training.
        base: the model before training.
        r: the rank.

    Returns:
        The content of adapter_config.json, the tensors of adapter_model.safetensors, and the share of the squared
        update that the adapter keeps.
    """
    tensors, kept, total = {}, 0.0, 0.0
    linears = {
        f"{base.architecture.layer_path(layer)}.{linear.path}.weight"
        for layer, row in enumerate(base.rows_by_layer)
        for linear in row.linears
    }
    for name in track([name for name in base.names() if name in linears], "Extracting the update"):
        left, values, right = torch.linalg.svd(trained.tensor(name).float() - base.tensor(name).float(), False)
        squares, root, missing = values.double().square(), values[:r].sqrt(), max(0, r - len(values))
        kept, total = kept + float(squares[:r].sum()), total + float(squares.sum())
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{prefix}.lora_A.weight"] = pad(root[:, None] * right[:r], (0, 0, 0, missing))
        tensors[f"{prefix}.lora_B.weight"] = pad(left[:, :r] * root, (0, missing))
    share = kept / total if total else 1.0
    logger.info("the extracted update of rank %d keeps %.1f%% of what training changed", r, 100 * share)
    if share < ENOUGH:
        logger.warning("that is little: train with a larger lora.r than %d, or take method lora", r)
    return _config(r, base.architecture.adapter_targets), tensors, share


def _config(r: int, targets: Sequence[str]) -> dict[str, Any]:
    """Return the content of adapter_config.json, as PEFT writes it after training."""
    from peft import LoraConfig

    config = LoraConfig(r=r, lora_alpha=r, target_modules=list(targets), task_type="CAUSAL_LM", inference_mode=True)
    options: dict[str, Any] = config.to_dict()
    return {key: list(value) if isinstance(value, set) else value for key, value in options.items()}
