"""Training of the model's own weights: which ones train, and how the result becomes a model or an adapter."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loram.base.progress import track
from loram.disk.checkpoint import EMBEDDING, HEAD, Checkpoint
from loram.disk.files import copy_side_files
from loram.disk.writer import ShardedWriter
from loram.model.architecture import CUTS

logger = logging.getLogger(__name__)

ENOUGH = 0.9  # the share of the squared update that the extracted adapter should keep


def unfreeze_(model: Any, *, pruned: bool, around: bool) -> None:
    """Let the weights of a model train, and nothing else.

    In a pruned model these are the linears of the decoder layers: an adapter has no place for anything else that could
    change, so the full model could not be given it.

    Args:
        model: a causal language model.
        pruned: whether it is a pruned one.
        around: whether the embedding, the last norm and lm_head of a full model train too.
    """
    model.requires_grad_(around and not pruned)
    linears = {f"{linear}.weight" for linear in CUTS}
    for layer in model.model.layers:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not pruned or name in linears)


def trained_layers(model: Any) -> list[list[nn.Parameter]]:
    """The parameters that train in each decoder layer."""
    return [[parameter for parameter in layer.parameters() if parameter.requires_grad] for layer in model.model.layers]


def write_model(out: Path, trained: Checkpoint, base: Checkpoint) -> None:
    """Write trained weights as an ordinary model folder with the names, dtypes, config and tokenizer of the base."""
    with ShardedWriter(out, {name: base.spec(name) for name in base.names()}) as writer:
        for name in track(base.names(), "Writing the model"):
            source = EMBEDDING if name == HEAD and base.tied else name
            for row, block in trained.blocks(source):
                writer.write(name, block.to(base.spec(name).dtype), row)
    copy_side_files(base.folder, out)
    (out / "config.json").write_bytes((base.folder / "config.json").read_bytes())


def extract(trained: Checkpoint, base: Checkpoint, r: int) -> tuple[dict[str, Any], dict[str, Tensor], float]:
    """Extract the LoRA adapter of rank `r` that is nearest to what training changed in the decoder layers' linears.

    For each linear, W_trained - W_start = U S Vᵀ is cut after the r largest singular values (Eckart, Young 1936);
    lora_B is U √S and lora_A is √S Vᵀ. A linear with a side below r has fewer singular values; its factors are padded
    with zeros to rank r.

    Args:
        trained: the model after training.
        base: the model before training.
        r: the rank.

    Returns:
        The values of adapter_config.json, the tensors of adapter_model.safetensors, and the share of the squared update
        that the adapter keeps.
    """
    tensors, kept, total = {}, 0.0, 0.0
    for module in track(list(_linears(base)), "Extracting the update"):
        name = f"{module}.weight"
        left, values, right = torch.linalg.svd(trained.tensor(name).float() - base.tensor(name).float(), False)
        squares, root, missing = values.double().square(), values[:r].sqrt(), max(0, r - len(values))
        kept, total = kept + float(squares[:r].sum()), total + float(squares.sum())
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = pad(root[:, None] * right[:r], (0, 0, 0, missing))
        tensors[f"{prefix}.lora_B.weight"] = pad(left[:, :r] * root, (0, missing))
    share = kept / total if total else 1.0
    logger.info("the extracted update of rank %d keeps %.1f%% of what training changed", r, 100 * share)
    if share < ENOUGH:
        logger.warning("that is little: train with a larger lora.r than %d, or take method lora", r)
    return _config(r), tensors, share


def _linears(model: Checkpoint) -> Iterator[str]:
    for name in model.names():
        module = name.removesuffix(".weight")
        if module != name and module.removeprefix("model.layers.").partition(".")[2] in CUTS:
            yield module


def _config(r: int) -> dict[str, Any]:
    """The values of adapter_config.json, as PEFT writes it after a training."""
    from peft import LoraConfig

    targets = [linear.rpartition(".")[2] for linear in CUTS]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=targets, task_type="CAUSAL_LM", inference_mode=True)
    values: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    return {key: list(value) if isinstance(value, set) else value for key, value in values.items()}
