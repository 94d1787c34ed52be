"""One estimate: parameters, memory of training, what reduction that is, arithmetic, and every stage's disk and RAM."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loram.model.sparsity import STRUCTURED
from loram.planner.memory import TrainingMemory, training_memory
from loram.planner.settings import Settings, make_settings
from loram.planner.shapes import Model, read_config
from loram.planner.stages import Stage, stages
from loram.planner.weights import adapted, frozen_bytes, trained
from loram.pruning.settings import prune_settings


class Arithmetic(BaseModel):
    """Floating point operations of training, a token: see `docs/estimate.md` for the formula.

    Args:
        flops_per_token: all of them.
        measuring_flops_per_token: those among them that measure the full model's course; 0 where nothing is anchored.
        full_flops_per_token: of LoRA on the full model with the same settings.
        times_fewer: the last, divided by the first; below 1 where anchored training takes more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops_per_token: int
    measuring_flops_per_token: int
    full_flops_per_token: int
    times_fewer: float


class Estimate(BaseModel):
    """What pruning saves and what training takes.

    Args:
        ratio, pattern: of pruning; the ratio is None where the full model is trained.
        parameters, pruned_parameters: exact, embeddings and norms included; `parameter_reduction` is their ratio.
        pruned_layers: how many layers are narrowed, or sparse.
        units: what one of them keeps of each space.
        adapter_parameters: how many are trained.
        settings: how training was taken to be.
        weight_bytes: of the frozen model as it is trained, constants and what is in host memory included.
        counted_reduction: as the paper counts: parameters x 16 bits before, x 4 (or 16) bits after.
        real_reduction: the 16-bit full model's bytes over `weight_bytes`.
        training: bytes at the peak of training.
        arithmetic: of training.
        stages: disk and RAM of every stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    ratio: float | None
    pattern: str
    keep_first: int
    keep_last: int
    parameters: int
    pruned_parameters: int
    parameter_reduction: float
    pruned_layers: int
    units: dict[str, int]
    adapter_parameters: int
    settings: Settings
    weight_bytes: int
    counted_reduction: float
    real_reduction: float
    training: TrainingMemory
    arithmetic: Arithmetic
    stages: tuple[Stage, ...]


def estimate(
    config: str | Path | Mapping[str, Any],
    *,
    ratio: float | None = None,
    pattern: str = STRUCTURED,
    keep_first: int | None = None,
    keep_last: int | None = None,
    load_in_4bit: bool = False,
    offload_embedding: bool = False,
    method: str | None = None,
    lora_r: int | None = None,
    lora_target_modules: Sequence[str] | None = None,
    lora_dtype: str | None = None,
    lora_dropout: float | None = None,
    lora_sp_share: float | None = None,
    max_length: int | None = None,
    per_device_train_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    optim: str | None = None,
    gradient_checkpointing: bool | None = None,
    activation_offloading: bool | None = None,
    anchor_steps: int | None = None,
    anchor_gradients: bool | None = None,
    device: str | None = None,
) -> Estimate:
    """Count parameters as LoRAM's tables do (arXiv 2502.13533), and the memory, disk and arithmetic that they take.

    Args:
        config: a config.json, a folder that has one, a hub id, or the parsed content.
        ratio, pattern, keep_first, keep_last: as for `prune`; without a ratio or n:m the full model is trained.
        load_in_4bit: frozen weights in NF4 with double quantisation, embedding and lm_head too.
        offload_embedding: with that, the embedding in 16 bits in host memory.
        method: lora, rslora, lora-fa or lora-sp.
        lora_r, lora_target_modules, lora_dtype, lora_dropout: of the adapter; by default 8, the seven linears, float32
            and 0.05, with lora-fa 0.
        lora_sp_share: of that method: how much of the adapter trains (0.5).
        max_length: tokens of the longest row (512).
        per_device_train_batch_size: rows of a micro-batch (4).
        gradient_accumulation_steps: micro-batches of a step (1).
        optim: adamw_torch_fused, adamw_torch, adamw_8bit or paged_adamw_8bit.
        gradient_checkpointing: keep only each layer's input; by default on a GPU.
        activation_offloading: keep those in host memory; by default on a GPU with 4-bit weights.
        anchor_steps, anchor_gradients: measure the full model's course every so many steps (0: no), gradients too
            (yes); where a model is pruned.
        device: `cuda` (the default: computes in bfloat16) or `cpu` (in float32).

    Raises:
        UserError: the config is not there or not of a supported family, or a setting is out of range.

    Example: LLaMA-2-70B at 0.85 has 68,976,648,192 parameters before and 16,272,924,672 after: 4.24 times fewer, and
    with 4-bit weights 16.95 times as the paper counts.
    """
    settings = make_settings(
        load_in_4bit=load_in_4bit,
        offload_embedding=offload_embedding,
        method=method,
        lora_r=lora_r,
        lora_target_modules=None if lora_target_modules is None else tuple(lora_target_modules),
        lora_dtype=lora_dtype,
        lora_dropout=lora_dropout,
        lora_sp_share=lora_sp_share,
        max_length=max_length,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        optim=optim,
        gradient_checkpointing=gradient_checkpointing,
        activation_offloading=activation_offloading,
        anchor_steps=anchor_steps if ratio is not None or pattern != STRUCTURED else None,
        anchor_gradients=anchor_gradients,
        device=device,
    )
    values, where = read_config(config)
    return estimate_with(
        values, where, settings, ratio=ratio, pattern=pattern, keep_first=keep_first, keep_last=keep_last
    )


def estimate_with(
    config: Mapping[str, Any],
    where: str,
    settings: Settings,
    *,
    ratio: float | None,
    pattern: str = STRUCTURED,
    keep_first: int | None,
    keep_last: int | None,
) -> Estimate:
    """As `estimate`, of a config.json's content and checked settings."""
    pruned = ratio is not None or pattern != STRUCTURED
    pruning = prune_settings(
        ratio=ratio if pruned else 0.5, pattern=pattern, keep_first=keep_first, keep_last=keep_last
    )
    full = Model.of(config, where, None, 0, 0)
    settings = settings.for_family(full.architecture)
    ratio = pruning.ratio if pruned else None
    model = Model.of(config, where, ratio, pruning.keep_first, pruning.keep_last, pattern)
    weights = frozen_bytes(model, settings).total
    memory = training_memory(model, settings, full)
    measuring = _measuring_flops(full, model, settings) if settings.anchor_steps else 0
    flops, full_flops = _flops(model, settings) + measuring, _flops(full, settings)
    arithmetic = Arithmetic(
        flops_per_token=flops,
        measuring_flops_per_token=measuring,
        full_flops_per_token=full_flops,
        times_fewer=full_flops / flops,
    )
    return Estimate(
        model_type=full.architecture.model_type,
        ratio=ratio,
        pattern=pattern,
        keep_first=pruning.keep_first,
        keep_last=pruning.keep_last,
        parameters=full.parameters,
        pruned_parameters=model.parameters,
        parameter_reduction=full.parameters / model.parameters,
        pruned_layers=len(model.narrowed),
        units=dict(model.units or {space.name: full.geometry.units(space) for space in full.architecture.spaces}),
        adapter_parameters=sum(trained(model, settings)),
        settings=settings,
        weight_bytes=weights,
        counted_reduction=full.parameters * 16 / (model.parameters * (4 if settings.load_in_4bit else 16)),
        real_reduction=full.parameters * 2 / weights,
        training=memory,
        arithmetic=arithmetic,
        stages=stages(full, model, settings, memory),
    )


def _flops(model: Model, settings: Settings) -> int:
    """Of one token: 2 a weight forward and 2 backward, 2 more where forward is done again, 2 if it trains.

    lm_head's logits are always worked out again in backward; a lookup in the embedding costs nothing.
    """
    again = 2 if settings.gradient_checkpointing else 0
    layers, head = sum(layer.weights for layer in model.layers), model.vocabulary
    on_head = settings.lora_r * sum(_head(model)) if model.architecture.head in settings.lora_target_modules else 0
    in_layers = sum(settings.lora_r * (rows + columns) for rows, columns in adapted(model, settings)) - on_head
    gradients = 2 * sum(trained(model, settings))
    return (4 + again) * layers + 6 * head + (4 + again) * in_layers + 6 * on_head + gradients


def _measuring_flops(full: Model, model: Model, settings: Settings) -> int:
    """Of one token, once measured for every time that it is trained on.

    The full model goes forward, and with gradients forward again and backward; what was pruned of it goes forward, and
    with gradients backward.
    """
    adapter = settings.lora_r * sum(rows + columns for rows, columns in adapted(full, settings))
    weights = sum(layer.weights for layer in full.layers) + adapter
    own = sum(model.layers[index].weights for index in model.narrowed)
    if not settings.anchor_gradients:
        return 2 * weights + 2 * own
    return 6 * weights + 4 * own + 6 * full.vocabulary


def _head(model: Model) -> tuple[int, int]:
    """(out_features, in_features) of lm_head."""
    return model.geometry.vocab_size, model.geometry.hidden_size
