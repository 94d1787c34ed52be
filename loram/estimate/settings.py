"""How a training is set up, as far as it decides what that takes; the defaults are those of `loram train`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, field_validator

from loram.errors import UserError, first_problem
from loram.model.architecture import LINEARS

# optim -> (bytes of state a trained parameter, or None for those of its dtype; whether the GPU's driver may page it)
OPTIMIZERS: dict[str, tuple[int, bool]] = {
    "adamw_torch": (0, False),
    "adamw_torch_fused": (0, False),
    "adamw_8bit": (2, False),
    "paged_adamw_8bit": (2, True),
}


class Settings(BaseModel):
    """How to train; see `loram.estimate.estimate`. Names are those of a recipe, PEFT and TRL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["cuda", "cpu"] = "cuda"
    load_in_4bit: bool = False
    offload_embedding: bool = False
    lora_r: PositiveInt = 8
    lora_target_modules: tuple[str, ...] = LINEARS
    lora_dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: PositiveInt = 512
    per_device_train_batch_size: PositiveInt = 4
    gradient_accumulation_steps: PositiveInt = 1
    optim: str
    gradient_checkpointing: bool
    activation_offloading: bool

    @field_validator("lora_target_modules")
    @classmethod
    def _known_modules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = (*LINEARS, "lm_head")
        if not value or set(value) - set(known):
            raise ValueError(f"should be some of {', '.join(known)}")
        return value

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in OPTIMIZERS:
            raise ValueError(f"{value!r} cannot be estimated; known are {', '.join(OPTIMIZERS)}")
        return value

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch whose rows all have `max_length`."""
        return self.per_device_train_batch_size * self.max_length

    @property
    def compute_bytes(self) -> int:
        """Bytes of a value that is computed with."""
        return 2 if self.device == "cuda" else 4

    @property
    def lora_bytes(self) -> int:
        """Bytes of a trained value."""
        return 2 if self.lora_dtype == "bfloat16" else 4


def make_settings(**given: Any) -> Settings:
    """Settings with the defaults that `loram train` has on the device; None stands for the default.

    On a GPU activations are checkpointed; with 4-bit weights also offloaded, and AdamW keeps pageable 8-bit states.

    Raises:
        UserError: a value is out of range, or two do not go together.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    on_gpu = chosen.get("device", "cuda") == "cuda"
    frugal = on_gpu and bool(chosen.get("load_in_4bit"))
    defaults = {
        "optim": "paged_adamw_8bit" if frugal else "adamw_torch_fused",
        "gradient_checkpointing": on_gpu,
        "activation_offloading": frugal,
    }
    try:
        settings = Settings(**{**defaults, **chosen})
    except ValidationError as error:
        raise UserError(first_problem(error)) from error
    if settings.activation_offloading and not on_gpu:
        raise UserError("activation_offloading moves activations from a GPU to host memory; on a cpu there is no use")
    if settings.optim.startswith("paged") and not on_gpu:
        raise UserError(f"optim {settings.optim!r} pages a GPU's memory; on a cpu take adamw_8bit")
    if settings.offload_embedding and not settings.load_in_4bit:
        raise UserError("offload_embedding leaves the embedding of a model in 4 bits in host memory; add load_in_4bit")
    return settings
