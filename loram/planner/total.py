"""One estimate: parameters, memory and arithmetic of training, the reduction, and the disk and RAM of every stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loram.model.counts import kept_by_space
from loram.model.wrappers import wrapper_of
from loram.planner.memory import TrainingMemory, training_memory
from loram.planner.settings import PlannerOptions, Settings, make_settings
from loram.planner.shapes import Model, read_config
from loram.planner.stages import Stage, stages
from loram.planner.streamed import read_per_step
from loram.planner.ways import Way, ways
from loram.planner.weights import frozen_bytes, trained
from loram.planner.work import Arithmetic, arithmetic
from loram.pruning.options import PruneOptions


class Narrowed(BaseModel):
    """Narrowed layers that keep the same numbers of units.

    Args:
        layers: how many layers these are.
        units: how many units of each space each of them keeps; of a space that is not here, it has nothing to remove.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int
    units: dict[str, int]


class Estimate(BaseModel):
    """The result of `estimate`: what pruning saves and what training needs.

    Args:
        model_type: the family of the model; of a wrapped model, of its text model, which alone is counted.
        wrapper: the wrapped model's own model_type; None for an ordinary model.
        ratio, pattern: how the model is pruned; the ratio is None where no layer is narrowed or sparse by it.
        ratios: space -> the ratio of its own, where it has one.
        round_to: what the numbers of channels that stay are rounded up to a multiple of.
        parameters, pruned_parameters: exact counts, embeddings and norms included; `parameter_reduction` is their
            ratio.
        active_parameters, pruned_active_parameters: how many of these a token meets, which are all but those of experts
            that it does not go to.
        pruned_layers: how many layers are narrowed, or sparse.
        dropped_layers: how many layers are dropped.
        bypass_rank: the rank of the bypass beside each block whose output projection has lost inputs; 0 is none.
        units: how many units of each space (key-value groups, channels, experts, channels of each expert) such a layer
            keeps, if it has that space; of layers that differ in size, the last.
        narrowed: the narrowed layers by the numbers of units that they keep.
        adapter_parameters: how many parameters are trained.
        settings: how the model is trained, with every default filled in.
        weight_bytes: bytes of the frozen model as it is trained, with the constants of 4-bit weights and with what
            waits in host memory.
        counted_reduction: the reduction as the paper counts it: parameters x 16 bits before, x 4 (or 16) bits after.
        real_reduction: the 16-bit full model's bytes over `weight_bytes`.
        training: bytes at the peak of training.
        read_per_step: how many bytes of a streamed model an optimiser step reads; 0 where the model is in memory.
        arithmetic: floating point operations of training.
        ways: the ways to train such an adapter, and what each takes.
        stages: disk and RAM of every stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    wrapper: str | None
    ratio: float | None
    ratios: dict[str, float]
    round_to: int
    pattern: str
    keep_first: int
    keep_last: int
    parameters: int
    pruned_parameters: int
    parameter_reduction: float
    active_parameters: int
    pruned_active_parameters: int
    pruned_layers: int
    dropped_layers: int
    bypass_rank: int
    units: dict[str, int]
    narrowed: tuple[Narrowed, ...]
    adapter_parameters: int
    settings: Settings
    weight_bytes: int
    counted_reduction: float
    real_reduction: float
    training: TrainingMemory
    read_per_step: int
    arithmetic: Arithmetic
    ways: tuple[Way, ...]
    stages: tuple[Stage, ...]


def estimate(
    config: str | Path | Mapping[str, Any], *, options: PlannerOptions | None = None, **fields: Any
) -> Estimate:
    """Count parameters as LoRAM's tables do (arXiv 2502.13533), and the memory, disk and arithmetic that they take.

    Args:
        config: a config.json, a folder that has one, a hub id, or the parsed content.
        options: how to prune and to train; without a ratio, n:m or layers to drop, the full model is trained.
        fields: single options by name, over `options`: `ratio=0.85`, `lora_r=16`. They are the flags of
            `loram estimate`, which says what they mean.

    Raises:
        UserError: the config is not there or not of a supported family, or a setting is out of range.

    Example: LLaMA-2-70B at 0.85 has 68,976,648,192 parameters before and 16,272,924,672 after: 4.24 times fewer, and
    with 4-bit weights 16.95 times as the paper counts.
    """
    chosen = PlannerOptions.of(options, **fields)
    pruning = chosen.pruning()
    settings = make_settings(**chosen.training(pruned=pruning.prunes))
    return estimate_with(*read_config(config), settings, pruning)


def estimate_with(config: Mapping[str, Any], where: str, settings: Settings, options: PruneOptions) -> Estimate:
    """Return the same estimate from a config.json's content and checked settings."""
    if (wrapper := wrapper_of(config)) is not None:
        config = wrapper.text_config(config, where)
    full = Model.of(config, where)
    settings = settings.for_family(full.architecture)
    pruning = (options if options.prunes else PruneOptions.of(options, ratio=0.5)).resolved()
    if options.prunes:
        pruning.check_fits(full.geometry, full.architecture, config)
    model = Model.of(config, where, pruning) if options.prunes else full
    weights = frozen_bytes(model, settings).total
    memory = training_memory(model, settings, full)
    return Estimate(
        model_type=full.architecture.model_type,
        wrapper=None if wrapper is None else wrapper.model_type,
        ratio=pruning.ratio if options.prunes else None,
        ratios=pruning.own_ratios if options.prunes else {},
        round_to=pruning.round_to,
        pattern=pruning.pattern,
        keep_first=pruning.keep_first,
        keep_last=pruning.keep_last,
        parameters=full.parameters,
        pruned_parameters=model.parameters,
        parameter_reduction=full.parameters / model.parameters,
        active_parameters=full.active_parameters,
        pruned_active_parameters=model.active_parameters,
        pruned_layers=len(model.narrowed_layers),
        dropped_layers=len(model.dropped),
        bypass_rank=model.bypass_rank,
        units=_units(model),
        narrowed=_narrowed(model),
        adapter_parameters=sum(trained(model, settings)),
        settings=settings,
        weight_bytes=weights,
        counted_reduction=full.parameters * 16 / (model.parameters * (4 if settings.quantised else 16)),
        real_reduction=full.parameters * 2 / weights,
        training=memory,
        read_per_step=read_per_step(model, settings) if settings.streamed else 0,
        arithmetic=arithmetic(full, model, settings),
        ways=tuple(ways(full, model, settings)),
        stages=stages(full, model, settings, memory),
    )


def _units(model: Model) -> dict[str, int]:
    """Return how many units of each space narrowed layers keep, or all layers where none is narrowed.

    A space within another counts once per unit of that. A space that none of these layers has is left out.
    """
    geometry, units = model.geometry, dict[str, int]()
    for layer in model.units or range(geometry.num_hidden_layers):
        spaces = geometry.layer(model.architecture, layer).spaces
        kept = model.units[layer] if model.units else kept_by_space(geometry, spaces, {})
        units |= {space.name: kept[space.name] // (kept[space.within.name] if space.within else 1) for space in spaces}
    return units


def _narrowed(model: Model) -> tuple[Narrowed, ...]:
    """Return the narrowed layers by the numbers of units that they keep, those of the first layer first."""
    spaces = {space.name: space.within for space in model.architecture.spaces}
    alike: dict[tuple[tuple[str, int], ...], int] = {}
    for kept in (model.units or {}).values():
        each = {
            name: kept[name] // (kept[outer.name] if outer else 1) for name, outer in spaces.items() if name in kept
        }
        alike[tuple(each.items())] = alike.get(tuple(each.items()), 0) + 1
    return tuple(Narrowed(layers=layers, units=dict(units)) for units, layers in alike.items())
