"""LoRA on experts: the tensors that PEFT's `target_parameters` names, and what does not go together with them."""

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from loram.base.errors import UserError
from loram.model.architecture import Architecture
from loram.model.families import EXPERT_MATRICES

if TYPE_CHECKING:
    from loram.training.options import TrainOptions

ALL_EXPERTS = "experts"  # the word for all tensors of a model's experts
_INITIALISATIONS = (True, False, "gaussian")  # the others of PEFT are for linears


def expert_targets(given: Any, architecture: Architecture | None) -> list[str]:
    """Return the names of the tensors of experts that get an adapter, as PEFT's `target_parameters` has them.

    Args:
        given: the value of `target_parameters`: names, or the word `experts` for all tensors of the model's experts.
        architecture: the model's family; None where no model is known yet.

    Raises:
        UserError: the family has no such tensor, or no experts.
    """
    names = [given] if isinstance(given, str) else given
    known = EXPERT_MATRICES if architecture is None else [tensor.name for tensor in architecture.expert_matrices]
    if architecture is not None and not known:
        raise UserError(f"lora: target_parameters is for experts, and {architecture.model_type} has none; leave it out")
    if not isinstance(names, Sequence) or (odd := [name for name in names if name not in (*known, ALL_EXPERTS)]):
        what = f"has {odd[0]!r}" if isinstance(names, Sequence) else f"is {given!r}"
        raise UserError(f"lora: target_parameters {what}; known are {ALL_EXPERTS}, {', '.join(known)}")
    return sorted(known) if ALL_EXPERTS in names else list(names)


def check_expert_targets(options: "TrainOptions", lora: Mapping[str, Any]) -> None:
    """Refuse options that adapters on experts do not go with.

    PEFT adds such an adapter to the experts' weights in each forward pass, so nothing can come between inputs and
    lora_A.

    Args:
        options: the options as the user gave them.
        lora: the options of LoraConfig with every default filled in.

    Raises:
        UserError: names the option and what to do.
    """
    targets = lora["target_parameters"]
    if lora["lora_dropout"]:
        raise UserError(
            "lora: target_parameters needs lora_dropout 0, since PEFT adds the update to the experts' weights; leave "
            "lora_dropout out"
        )
    if options.mask_update:
        raise UserError("mask_update: masks the updates of linears; drop it, or leave target_parameters out")
    if (initial := lora.get("init_lora_weights", True)) not in _INITIALISATIONS:
        raise UserError(f"lora: init_lora_weights {initial!r} is for linears; with target_parameters leave it out")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or {}:
            if any(re.match(rf"(.*\.)?({pattern})$", f"model.layers.0.{name}") for name in targets):
                raise UserError(f"lora: {key} has {pattern!r}, which PEFT says it ignores for experts; leave it out")


def check_linear_targets(targets: Sequence[str], architecture: Architecture) -> None:
    """Refuse linears that PEFT would take for experts; arguments as for `taken_for_experts`.

    Raises:
        UserError: names the linear.
    """
    if taken := taken_for_experts(targets, architecture):
        raise UserError(
            f"lora: target_modules has {taken!r}, which PEFT takes for experts in {architecture.model_type} when it "
            f"loads the adapter; take {', '.join(architecture.default_targets)}, and target_parameters for experts"
        )


def taken_for_experts(targets: Sequence[str], architecture: Architecture) -> str | None:
    """Return the first name of linears that PEFT takes for experts when it loads an adapter on the full model, or None.

    Old adapters name experts as if they were linears, and PEFT gives such names of some families to the tensors that
    the experts are in today. So an adapter on an ordinary MLP of the same name would end up there.

    Args:
        targets: names of linears, as in `target_modules`.
        architecture: the model's family.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=architecture.model_type))
    for target in targets if architecture.experts is not None else ():
        config = LoraConfig(target_modules=[target])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it is one of several that became one tensor, and PEFT wants them all
            return target
        if config.target_parameters:
            return target
    return None
