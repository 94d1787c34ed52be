"""LoRA factors of experts: how PEFT names them in files, and how they are laid out.

PEFT's `target_parameters` puts a wrapper around the experts' module for each of its tensors that has an adapter, one
around the other, and names factors by these wrappers. The wrapper of the last tensor is the outermost one. If both
`gate_up_proj` and `down_proj` have an adapter, `mlp.experts.lora_A` is down_proj's and `mlp.experts.base_layer.lora_A`
is gate_up_proj's. LoRAM calls them `mlp.experts.down_proj.lora_A` and `mlp.experts.gate_up_proj.lora_A`.
"""

import re
from collections.abc import Sequence

from torch import Tensor

from loram.model.families import EXPERT_MATRICES

_FACTOR = re.compile(r"(?P<module>.+?)(?P<wrappers>(\.base_layer)*)\.(?P<part>lora_[AB]\.weight)")


def is_of_experts(module: str) -> bool:
    """Return whether a path (`model.layers.3.mlp.experts.down_proj`) is that of a tensor of experts."""
    return any(module.endswith(f".{tensor}") for tensor in EXPERT_MATRICES)


def is_targeted(tensor: str, targets: Sequence[str] | None) -> bool:
    """Return whether PEFT's `target_parameters` name a tensor."""
    return any(tensor == target or tensor.endswith(f".{target}") for target in targets or ())


def own_name(name: str, targets: Sequence[str] | None) -> str:
    """Return LoRAM's name of a tensor of an adapter.

    Args:
        name: the name in the file.
        targets: the adapter's `target_parameters`.

    Returns:
        For a factor of experts, the name with the targeted tensor in it; any other name as it is.
    """
    match = _FACTOR.fullmatch(name)
    tensors = [] if match is None else _targeted_tensors(match["module"], targets)
    if match is None or (depth := match["wrappers"].count(".")) >= len(tensors):
        return name
    return f"{match['module']}.{tensors[-1 - depth]}.{match['part']}"


def peft_name(name: str, targets: Sequence[str] | None) -> str:
    """Return the name in the file of a tensor of an adapter; the inverse of `own_name`."""
    match = _FACTOR.fullmatch(name)
    if match is None or not is_of_experts(match["module"]):
        return name
    module, _, tensor = match["module"].rpartition(".")
    tensors = _targeted_tensors(module, targets)
    return f"{module}{'.base_layer' * (len(tensors) - 1 - tensors.index(tensor))}.{match['part']}"


def _targeted_tensors(module: str, targets: Sequence[str] | None) -> list[str]:
    """Return the last names of the targeted tensors of a module, in the order in which PEFT wraps them."""
    names = [tensor.rpartition(".") for tensor in EXPERT_MATRICES]
    own = dict.fromkeys(tensor for path, _, tensor in names if module.endswith(f".{path}"))  # paths may end alike
    return [tensor for tensor in own if is_targeted(f"{module}.{tensor}", targets)]


def by_expert(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return views of the LoRA factors of a tensor of experts, expert by expert.

    Args:
        a: lora_A, (experts * r, in_features).
        b: lora_B, (out_features, r * experts), where the experts of one rank are neighbours.
        experts: the number of experts.

    Returns:
        (experts, r, in_features) and (experts, out_features, r).
    """
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B of all experts together; the inverse of `by_expert`."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1, 2)
