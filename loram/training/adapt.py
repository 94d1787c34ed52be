"""The model that trains: frozen with PEFT's adapter on it, or with its own weights unfrozen."""

from collections.abc import Callable, Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, initialize_lora_eva_weights
from torch import Tensor
from transformers import PreTrainedModel

from loram.compute.device import compute_dtype
from loram.compute.loading import load_model
from loram.compute.masked import mask_updates_
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import find_plan
from loram.trainer.adapted import add_adapter, frozen_model
from loram.training.engine import STREAMED
from loram.training.methods.table import METHODS
from loram.training.options import TrainOptions
from loram.training.start import put_factors_
from loram.training.streamed import shell_of


def trainable_model(
    checkpoint: Checkpoint,
    adapter: LoraConfig,
    options: TrainOptions,
    device: torch.device,
    batches: Callable[[], Sequence[Mapping[str, Tensor]]],
    start: Adapter | None = None,
) -> PreTrainedModel | PeftModel:
    """Return the model with the parameters that the method trains; everything else is frozen.

    Args:
        checkpoint: the pruned or full model.
        adapter: PEFT's options.
        options: the options of the training.
        device: the device that computes; it decides the dtype of frozen weights.
        batches: gives batches of the training rows, for an adapter that begins with directions of the data.
        start: the adapter to go on with; None for a new one.

    Raises:
        UserError: as in `add_adapter`.
    """
    method = METHODS[options.method]
    own, pruned = method.own_options(options), find_plan(checkpoint.folder) is not None
    if method.weights:  # in float32; a GPU computes with them in 16 bits
        model = load_model(checkpoint, dtype=torch.float32)
        method.specialise_(model, own, pruned=pruned)
        return model
    frozen = _frozen_model(checkpoint, options, device)
    from_data = start is None and options.lora.get("init_lora_weights") == "eva"
    if options.load_in_4bit and adapter.target_parameters:
        adapted = _add_to_4bit_experts(frozen, adapter)
    else:
        adapted = add_adapter(frozen, adapter, low_cpu_mem_usage=from_data)
    if from_data:
        _draw_from_data_(adapted, batches())
    if start is not None:
        put_factors_(adapted, start)
    method.specialise_(adapted, own, pruned=pruned)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, options.lora_dtype))
    if options.mask_update:
        mask_updates_(adapted)
    return adapted


def _add_to_4bit_experts(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Return a model in NF4 with LoRA factors at its experts too; as `add_adapter`."""
    from loram.compute.nf4_experts import open_experts_, share_no_stacks_

    open_experts_(model)
    adapted = add_adapter(model, config)
    share_no_stacks_(adapted)
    return adapted


def _frozen_model(checkpoint: Checkpoint, options: TrainOptions, device: torch.device) -> PreTrainedModel:
    """Return the model that gets an adapter; a streamed one is a shell."""
    if options.engine == STREAMED:
        return shell_of(checkpoint, compute_dtype(device))
    return frozen_model(checkpoint, device, in_4bit=options.load_in_4bit, offload_embedding=options.offload_embedding)


def _draw_from_data_(adapted: PeftModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Draw lora_A from the directions that a linear's inputs vary most in, with more ranks where they explain more.

    This is EVA (arXiv 2410.07170), as PEFT does it.

    Args:
        adapted: a model whose adapter has `init_lora_weights` "eva".
        batches: the batches that the inputs are gathered on.
    """
    device = next(adapted.parameters()).device
    inputs = [{name: batch[name].to(device) for name in ("input_ids", "attention_mask")} for batch in batches]
    initialize_lora_eva_weights(adapted.eval(), inputs, show_progress_bar=False)
