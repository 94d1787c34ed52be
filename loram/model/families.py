"""The supported families. Adding a family is adding a row; `CONTRIBUTING.md` has a worked example."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from loram.base.errors import UserError
from loram.model.architecture import Architecture
from loram.model.dense import DENSE, LLAMA
from loram.model.experts import EXPERTS
from loram.model.hybrids import HYBRIDS
from loram.model.varied import VARIED

PRUNED_PREFIX = "loram_"  # the model_type of a pruned llama is `loram_llama`

_ROWS = (*DENSE, *EXPERTS, *HYBRIDS, *VARIED)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.model_type: row for row in _ROWS})
MODEL_CLASSES = tuple(row.model_class for row in _ROWS)
# The modules that an adapter can target, over all families; which of them a model has, its own row says.
KNOWN_TARGETS = tuple(dict.fromkeys(target for row in _ROWS for target in (*row.adapter_targets, row.head)))
# The tensors of experts that an adapter can target, in the order in which the experts' module has them.
EXPERT_MATRICES = tuple(dict.fromkeys(tensor.name for row in _ROWS for tensor in row.expert_matrices))
SPACES = tuple(dict.fromkeys(space.name for row in _ROWS for space in row.spaces))  # all that can be pruned somewhere
LINEARS = LLAMA.adapter_targets  # the default targets before the model is known
# Families that do not fit a row -> why.
_LATENT = "its attention keeps one latent vector per token in place of keys and values, and so has no key-value groups"
_UNFIT = {
    **dict.fromkeys(
        (
            *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
            *("longcat_flash", "minicpm3", "mistral4", "youtu"),
        ),
        _LATENT,
    ),
    "llama4_text": "its layers send every token through all experts, so nothing says which tokens an expert is for",
}


def is_pruned(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a pruned model."""
    return str(config.get("model_type")).startswith(PRUNED_PREFIX)


def architecture_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Return the row of a full model's family.

    Args:
        config: the content of its config.json.
        where: what the error message calls that file.

    Raises:
        UserError: the model is pruned already, or its family has no row; the message lists those that have one.
    """
    if is_pruned(config):
        raise UserError(f"{where}: this model is already pruned; start from the full model that it was made from")
    return family_of(config, where)


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Return the row of a full or pruned model's family; arguments as for `architecture_of`.

    Raises:
        UserError: the family has no row; the message lists those that have one.
    """
    model_type = str(config.get("model_type")).removeprefix(PRUNED_PREFIX)
    if model_type not in ARCHITECTURES:
        text = config.get("text_config")
        inner = text.get("model_type") if isinstance(text, Mapping) else None
        of_text = "" if inner is None else f" around a text model of type {inner!r}"
        reason = _UNFIT.get(model_type) or _UNFIT.get(str(inner))
        missing = "; what is missing is a row in loram/model (see CONTRIBUTING.md, 'Add a family')"
        raise UserError(
            f"{where}: model_type {model_type!r}{of_text} is not supported{f': {reason}' if reason else ''}; supported "
            f"families are {', '.join(ARCHITECTURES)}{'' if reason else missing}"
        )
    return ARCHITECTURES[model_type]
