"""The keys of PEFT's LoraConfig: which LoRAM understands, and which of their values change the model under an adapter.

The list says what is allowed, so that what the next version of PEFT adds is refused until somebody has looked at it.
This module imports nothing heavy.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from loram.base.options import library_defaults

# What an adapter is made of; LoRAM reads these keys as PEFT does.
_UNDERSTOOD = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    "target_parameters",
)
# What makes no difference to a finished adapter, whatever the value is, and why.
HARMLESS: Mapping[str, str] = MappingProxyType(
    {
        "task_type": "says what the model is for",
        "auto_mapping": "says which class to load the base with",
        "peft_version": "says which PEFT wrote the file",
        "base_model_name_or_path": "says where the base was",
        "revision": "says which revision of the base it was",
        "inference_mode": "PEFT writes true whenever it saves",
        "lora_dropout": "works in training only",
        "runtime_config": "says where PEFT computes",
        "loftq_config": "is for init_lora_weights loftq, which is refused itself",
        "eva_config": "is for init_lora_weights eva, whose results are in the factors and in rank_pattern",
        "corda_config": "is for init_lora_weights corda, which is refused itself",
        "lora_ga_config": "is for init_lora_weights lora_ga, which is refused itself",
        "megatron_core": "is for megatron_config, which is refused itself",
        "qalora_group_size": "is for use_qalora, which is refused itself",
    }
)
# What to train instead of what an adapter of another trainer may have.
_NO_EMBEDDING = "LoRAM's adapters leave the embedding as it is"
INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "modules_to_save": "it trains whole weights; target lm_head with LoRA instead (target_modules), and leave the "
        f"embedding out, since {_NO_EMBEDDING}",
        "trainable_token_indices": f"it trains rows of the embedding; leave it out, since {_NO_EMBEDDING}",
        "lora_embedding": f"adapts the embedding; leave it out of target_modules, since {_NO_EMBEDDING}",
    }
)
READ = frozenset([*_UNDERSTOOD, *HARMLESS])
TRAINED = frozenset(_UNDERSTOOD) - {"peft_type", "fan_in_fan_out"} | {"lora_dropout", "eva_config"}
# The first values of the factors that leave the model's own weights as they are: those that we train with, and those
# that an adapter may come from. Others (pissa, olora, corda, loftq, lora_ga) take a part out of the weights.
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
_READ_INITIALISATIONS = (*INITIALISATIONS, "mica", None)
ALL_LINEAR = "all-linear"  # PEFT's word for all linears but the output layer
_EMPTY_IS_OFF = ("modules_to_save", "layer_replication")  # in PEFT an empty dict is often "on"


def refused_key(config: Mapping[str, Any], allowed: Collection[str]) -> str | None:
    """Return the first key that is not allowed and whose value is not PEFT's default, or None.

    A key that this version of PEFT does not know is off when it is None, False or empty.

    Args:
        config: keys of LoraConfig -> values, as in adapter_config.json.
        allowed: `READ` for a finished adapter, `TRAINED` for a training.
    """
    from peft import LoraConfig

    defaults = library_defaults(LoraConfig)
    for key, value in config.items():
        off = [defaults[key], *([None] if not defaults[key] else [])] if key in defaults else [None, False, {}, [], ""]
        if key not in allowed and value not in off and not (key in _EMPTY_IS_OFF and value == []):
            return key
    return None


def changes_the_base(initialisation: Any) -> bool:
    """Return whether an adapter with this `init_lora_weights` was trained beside other weights than the base's."""
    name = initialisation.lower() if isinstance(initialisation, str) else initialisation
    return name not in _READ_INITIALISATIONS


def is_all_linear(targets: Any) -> bool:
    """Return whether target modules are PEFT's word for all linears: the word itself or, from a flag, a list of it."""
    word = targets[0] if isinstance(targets, list | tuple) and len(targets) == 1 else targets
    return isinstance(word, str) and word.lower() == ALL_LINEAR
