"""How a training is set up, as far as it decides what that takes; the defaults are those of `loram train`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

from loram.base.errors import UserError, first_problem
from loram.model.architecture import Architecture
from loram.model.families import KNOWN_TARGETS, LINEARS
from loram.training.methods.table import METHODS, LoraSpOptions, frozen_ranks, method_of

# optim -> (bytes of state a trained parameter, or None for those of its dtype; whether the GPU's driver may page it)
OPTIMIZERS: dict[str, tuple[int, bool]] = {
    "adamw_torch": (0, False),
    "adamw_torch_fused": (0, False),
    "adamw_8bit": (2, False),
    "paged_adamw_8bit": (2, True),
}
PLANNED = ("lora", "rslora", "lora-fa", "lora-sp")  # the methods whose memory is known here
_DROPOUT = 0.05  # of LoRA: loram.training.options.LORA_DEFAULTS


class Settings(BaseModel):
    """How to train; see `loram.planner.estimate`. Names are those of a recipe, PEFT and TRL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["cuda", "cpu"] = "cuda"
    load_in_4bit: bool = False
    offload_embedding: bool = False
    method: str = "lora"
    lora_r: PositiveInt = 8
    lora_dropout: float = Field(ge=0, lt=1)
    lora_sp_share: float = LoraSpOptions().share
    lora_target_modules: tuple[str, ...] = LINEARS
    lora_dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: PositiveInt = 512
    per_device_train_batch_size: PositiveInt = 4
    gradient_accumulation_steps: PositiveInt = 1
    optim: str
    gradient_checkpointing: bool
    activation_offloading: bool
    anchor_steps: NonNegativeInt = 0
    anchor_gradients: bool = True

    @field_validator("lora_target_modules")
    @classmethod
    def _known_modules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or set(value) - set(KNOWN_TARGETS):
            raise ValueError(f"should be some of {', '.join(KNOWN_TARGETS)}")
        return value

    @field_validator("method")
    @classmethod
    def _planned_method(cls, value: str) -> str:
        if value in METHODS and value not in PLANNED:
            raise ValueError(f"the memory of {value!r} cannot be estimated; that of {', '.join(PLANNED)} can")
        return value

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in OPTIMIZERS:
            raise ValueError(f"{value!r} cannot be estimated; known are {', '.join(OPTIMIZERS)}")
        return value

    def for_family(self, architecture: Architecture) -> "Settings":
        """The settings with the family's own linears as targets, unless targets were given.

        Raises:
            UserError: the family has no module of a given name.
        """
        if "lora_target_modules" not in self.model_fields_set:
            return self.model_copy(update={"lora_target_modules": architecture.adapter_targets})
        known = (*architecture.adapter_targets, architecture.head)
        if set(self.lora_target_modules) - set(known):
            raise UserError(f"lora_target_modules: should be some of {', '.join(known)}")
        return self

    @property
    def trained_ranks(self) -> tuple[int, int]:
        """How many of the ranks train in lora_A, and in lora_B."""
        if self.method == "lora-fa":
            return 0, self.lora_r
        frozen = frozen_ranks(self.lora_r, self.lora_sp_share) if self.method == "lora-sp" else 0
        return self.lora_r - frozen, self.lora_r - frozen

    @property
    def course_tokens(self) -> int:
        """Tokens whose course is measured at a time."""
        return self.tokens * self.gradient_accumulation_steps * self.anchor_steps

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
    method = method_of(chosen.get("method", "lora"))
    defaults = {
        "lora_dropout": method.defaults.get("lora_dropout", _DROPOUT),
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
    if settings.method != "lora-sp" and "lora_sp_share" in chosen:
        raise UserError(f"lora_sp_share is an option of method lora-sp, and the method is {settings.method}")
    if settings.method == "lora-sp":
        frozen_ranks(settings.lora_r, settings.lora_sp_share)
    return settings
