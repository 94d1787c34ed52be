"""What the streamed engine cannot train, and why. This module imports nothing heavy."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from loram.base.errors import UserError
from loram.training.methods.table import METHODS, method_of

if TYPE_CHECKING:
    from loram.training.options import TrainOptions

STREAMED: Final = "streamed"
# Options of the Trainer that would do nothing to a model that is never in memory, and why.
_ABOUT_MODULES = {
    "activation_offloading": "it keeps the hidden states before each layer in RAM or in a file anyway",
    "use_liger_kernel": "it computes with each family's own layers",
    "torch_compile": "there is no model in memory to compile",
    "torch_compile_backend": "there is no model in memory to compile",
    "torch_compile_mode": "there is no model in memory to compile",
    "router_aux_loss_coef": "it has one layer's router at a time",
    "neftune_noise_alpha": "it adds no noise to embeddings",
    "fp16": "it computes in bfloat16 where a GPU can, and otherwise in float32",
    "bf16": "it computes in bfloat16 where a GPU can, and otherwise in float32",
}


def check_engine(options: "TrainOptions", lora: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Refuse what the streamed engine cannot train.

    Args:
        options: the options as the user gave them.
        lora: the options of LoraConfig with every default filled in.
        trainer: those of the Trainer.

    Raises:
        UserError: names the option and what to do.
    """
    if options.engine != STREAMED:
        return
    remedy = "take engine resident"
    if not method_of(options.method).streamed:
        names = ", ".join(row.name for row in METHODS.values() if row.streamed)
        raise UserError(f"engine streamed: cannot train by method {options.method}; take {names}, or engine resident")
    if options.mask_update:
        raise UserError(f"engine streamed: has no gradients of a masked update; {remedy}, or leave mask_update out")
    if lora.get("target_parameters"):
        raise UserError(f"engine streamed: has no gradients of adapters on experts; {remedy}, or leave them out")
    if lora["lora_dropout"]:
        raise UserError("engine streamed: works without dropout; leave lora_dropout out, which is 0 with this engine")
    if lora.get("init_lora_weights") == "eva":
        raise UserError(f"engine streamed: init_lora_weights eva needs the model in memory; leave it out, or {remedy}")
    for key, why in _ABOUT_MODULES.items():
        if trainer.get(key):
            raise UserError(f"trainer: {key} has no place with engine streamed: {why}; leave it out")
