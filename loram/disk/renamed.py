"""An adapter under other names: those of a wrapped model, those of its text model, or all names in full."""

import dataclasses
from collections.abc import Callable, Mapping

from loram.base.errors import UserError
from loram.disk.adapter import WEIGHTS_NAME, Adapter
from loram.model.wrappers import Wrapper

_PREFIX = "base_model.model."


def in_wrapper(adapter: Adapter, wrapper: Wrapper) -> Adapter:
    """Return an adapter of the text model as one of the wrapped model: what plain PEFT loads there."""
    return _renamed(adapter, wrapper.outside)


def in_full(adapter: Adapter) -> Adapter:
    """Return an adapter whose config names each of its modules in full, and matches nothing else.

    PEFT would give the layers of a full model that a pruned one has dropped an adapter too, and miss its factors.
    """
    return _renamed(adapter, lambda name: name)


def in_text(
    adapter: Adapter, wrapper: Wrapper, shapes: Mapping[str, tuple[int, ...]], model: str, *, full: bool = True
) -> Adapter:
    """Return an adapter of a wrapped model as one of its text model; the inverse of `in_wrapper`.

    Args:
        adapter: the adapter.
        wrapper: the row of the wrapper.
        shapes: (out_features, in_features) of each linear of the text model, by its name there.
        model: what error messages call the wrapped model.
        full: whether that is a full model, and not one around a pruned text model.

    Raises:
        UserError: the adapter has a module outside the text model, or it does not fit that.
    """
    names = {wrapper.outside(module): module for module in shapes}
    for module in adapter.modules:
        if wrapper.inside(module) is None:
            pruned = "if it was trained on a pruned model, run `loram recover` on it first"
            pattern = f"let target_modules be a pattern that names it: '{wrapper.decoder}.*(q_proj|up_proj)'"
            remedy = pruned if full else pattern
            raise UserError(
                f"{adapter.folder / WEIGHTS_NAME}: {_PREFIX}{module}.lora_A.weight is not of {wrapper.decoder}, the "
                f"text model in {model}, and LoRAM knows only adapters of that; {remedy}"
            )
    adapter.check_fits({name: shapes[module] for name, module in names.items()}, model, full=full)
    return _renamed(adapter, lambda name: wrapper.inside(name) or name)


def _renamed(adapter: Adapter, rename: Callable[[str], str]) -> Adapter:
    """Return an adapter whose modules have other names; its config names each of them, and matches nothing else."""
    options, modules = adapter.config, adapter.modules
    ranks = {rename(name): adapter.rank(name) for name in modules}
    experts = sorted(rename(name) for name in adapter.of_experts)
    alphas = {rename(name): adapter.alpha(name) for name in modules}
    config = {
        **options,
        "target_modules": sorted(ranks.keys() - set(experts)),
        **({"target_parameters": experts} if experts else {}),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != options.get("r", 8)},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != options.get("lora_alpha", 8)},
    }
    return dataclasses.replace(
        adapter,
        config=config,
        tensors={_PREFIX + rename(name.removeprefix(_PREFIX)): tensor for name, tensor in adapter.tensors.items()},
        base_weights={rename(weight): key for weight, key in adapter.base_weights.items()},
    )
