"""The options that the planner counts, and their values with every default filled in.

Almost no option is declared here. The options of pruning and training that are marked `planned` become the keyword
arguments of `estimate` and `fit`, the flags of `loram estimate`, and the fields of `Settings`; all of these are called
as on the command line: `lora_r`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic.fields import FieldInfo

from loram.base.errors import UserError
from loram.base.options import Options, explain, extra_of, fields_below, flag_of, help_of, option, without_none
from loram.base.size import parse_size
from loram.disk.lora_keys import ALL_LINEAR, is_all_linear
from loram.model.architecture import Architecture
from loram.model.families import KNOWN_TARGETS, LINEARS
from loram.pruning.options import PruneOptions
from loram.training.engine import STREAMED
from loram.training.methods.method import Method
from loram.training.methods.table import METHODS, method_of
from loram.training.options import TrainOptions

# optim -> (bytes of state per trained parameter, 0 for those of its dtype; whether the GPU's driver may page it)
OPTIMIZERS: dict[str, tuple[int, bool]] = {
    "adamw_torch": (0, False),
    "adamw_torch_fused": (0, False),
    "adamw_8bit": (2, False),
    "paged_adamw_8bit": (2, True),
}
# what an option is where it is left out and its declaration has no default
_LEFT_OUT: Mapping[str, Any] = {
    "lora_target_modules": LINEARS,
    "gradient_accumulation_steps": 1,
    "ram_budget": "",
}
PLANNED = tuple(method.name for method in METHODS.values() if method.planned)
Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class PlannedOption:
    """An option that the planner counts: its section within its stage's, its name there, and its declaration."""

    section: str
    name: str
    field: FieldInfo


def planned_options(stage: type[Options]) -> dict[str, PlannedOption]:
    """Return the options of a stage that the planner counts, by their names in Python and on the command line.

    Example: `lora_r` is the option `r` in the section `lora` of training.
    """
    return {
        flag_of(name, field).replace("-", "_"): PlannedOption(section, name, field)
        for section, name, field in fields_below(stage)
        if extra_of(field).get("planned")
    }


PRUNING = planned_options(PruneOptions)
TRAINING = planned_options(TrainOptions)


class _PlannerOptions(Options):
    """The options of `estimate` and `fit`; one that is left out has the default of pruning or training."""

    stage: ClassVar[str] = "estimate"

    device: Device | None = option(
        None, "The device that trains: cuda, which computes in bfloat16, or cpu, in float32 (default: cuda)."
    )

    if TYPE_CHECKING:  # the options that are added below

        def __getattr__(self, name: str) -> Any: ...

    def pruning(self) -> PruneOptions:
        """Return the options of pruning among these."""
        return PruneOptions.of(**_given(self, PRUNING))

    def training(self, *, pruned: bool, in_4bit: bool | None = None) -> dict[str, Any]:
        """Return the options of training that were given, and the device.

        Args:
            pruned: whether a pruned model trains; a full one is never anchored.
            in_4bit: whether the frozen weights are in 4 bits; None leaves it as it was given.
        """
        given = _given(self, [*TRAINING, "device"])
        if in_4bit is not None:
            given["load_in_4bit"] = in_4bit
        if not pruned:
            given.pop("anchor_steps", None)
        return given

    @property
    def in_4bit(self) -> bool | None:
        """Return whether the frozen weights are in 4 bits; None where that is left open."""
        given: bool | None = self.load_in_4bit
        return True if given is None and self.offload_embedding else given


def _given(options: BaseModel, names: Any) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _left_open(name: str, field: FieldInfo) -> tuple[Any, Any]:
    """Return (type, field) of the same option. Its default is None, which stands for the stage's, and it has a flag."""
    extra = {**extra_of(field), "flag": name}
    kind: Any = field.annotation
    return _bounded(kind | None, field), Field(None, description=help_of(field), json_schema_extra=extra)


def _filled_in(name: str, field: FieldInfo) -> tuple[Any, Any]:
    """Return (type, default) of the same option if it is never None; without a default that depends on the device."""
    kind = without_none(field.annotation)
    if get_origin(kind) is list:  # a frozen value holds tuples
        kind = tuple.__class_getitem__((*get_args(kind), ...))
    return _bounded(kind, field), _LEFT_OUT.get(name, ...) if field.default is None else field.default


def _bounded(kind: Any, field: FieldInfo) -> Any:
    return Annotated[kind, *field.metadata] if field.metadata else kind


class _Settings(BaseModel):
    """How a model is trained, with every default filled in. The fields are `device` and the names in `TRAINING`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Device = "cuda"

    if TYPE_CHECKING:  # the options that are added below

        def __getattr__(self, name: str) -> Any: ...

    @field_validator("lora_target_modules", check_fields=False)
    @classmethod
    def _known_modules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value != (ALL_LINEAR,) and (not value or set(value) - set(KNOWN_TARGETS)):
            raise ValueError(f"should be some of {', '.join(KNOWN_TARGETS)}")
        return value

    @field_validator("method", check_fields=False)
    @classmethod
    def _planned_method(cls, value: str) -> str:
        if value in METHODS and value not in PLANNED:
            raise ValueError(f"the memory of {value!r} cannot be estimated; that of {', '.join(PLANNED)} can")
        return value

    @field_validator("ram_budget", check_fields=False)
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if value:
            parse_size(value, "ram_budget")
        return value

    @field_validator("optim", check_fields=False)
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in OPTIMIZERS:
            raise ValueError(f"{value!r} cannot be estimated; known are {', '.join(OPTIMIZERS)}")
        return value

    def for_family(self, architecture: Architecture) -> "Settings":
        """Return the settings with the family's own linears as targets, unless single targets were given.

        Raises:
            UserError: the family has no module of a given name.
        """
        if "lora_target_modules" not in self.model_fields_set:
            return self.model_copy(update={"lora_target_modules": architecture.default_targets})
        if self.targets == (ALL_LINEAR,):
            return self.model_copy(update={"lora_target_modules": architecture.adapter_targets})
        known = (*architecture.adapter_targets, architecture.head)
        if set(self.lora_target_modules) - set(known):
            raise UserError(f"lora_target_modules: should be some of {', '.join(known)}")
        return self

    # The planner reads the options through the facts below, which have types.

    @property
    def quantised(self) -> bool:
        """Return whether all frozen weights are in 4 bits."""
        return bool(self.load_in_4bit)

    @property
    def embedding_in_host(self) -> bool:
        """Return whether the embedding of a model in 4 bits waits in host memory, in 16 bits."""
        return bool(self.offload_embedding)

    @property
    def checkpointed(self) -> bool:
        """Return whether only the input of each layer is kept for the backward pass."""
        return bool(self.gradient_checkpointing) or self.streamed

    @property
    def streamed(self) -> bool:
        """Return whether the model goes forward and backward layer by layer, and is never in memory."""
        return bool(self.engine == STREAMED)

    @property
    def ram_bytes(self) -> int:
        """Return how many bytes of a streamed model may stay in RAM."""
        return parse_size(self.ram_budget, "ram_budget") if self.ram_budget else 0

    @property
    def offloaded(self) -> bool:
        """Return whether the activations for the backward pass wait in host memory."""
        return bool(self.activation_offloading) and not self.streamed

    @property
    def anchored(self) -> bool:
        """Return whether the full model's course is measured during training."""
        return bool(self.anchor_steps)

    @property
    def gradients_measured(self) -> bool:
        """Return whether the course includes gradients."""
        return bool(self.anchor_gradients)

    @property
    def rank(self) -> int:
        """The rank of the adapter."""
        return int(self.lora_r)

    @property
    def trained_ranks(self) -> tuple[int, int]:
        """Return how many ranks train in lora_A, and how many in lora_B."""
        method = METHODS[self.method]
        chosen = {
            option.name: getattr(self, name) for name, option in TRAINING.items() if option.section == method.section
        }
        return method.trained_ranks(self.rank, None if method.options is None else method.options(**chosen))

    @property
    def targets(self) -> tuple[str, ...]:
        """The linears that have an adapter, by their last name."""
        return tuple(self.lora_target_modules)

    @property
    def dropout(self) -> float:
        """The dropout before lora_A."""
        return float(self.lora_dropout)

    @property
    def optimizer(self) -> tuple[int, bool]:
        """The optimiser's row of `OPTIMIZERS`."""
        return OPTIMIZERS[self.optim]

    @property
    def length(self) -> int:
        """Return how many tokens the longest row has."""
        return int(self.max_length)

    @property
    def rows(self) -> int:
        """Return how many sequences of tokens a micro-batch has: one per row, or the two answers of each pair."""
        return int(self.per_device_train_batch_size) * (2 if self.of_pairs else 1)

    @property
    def of_pairs(self) -> bool:
        """Return whether rows are pairs of answers."""
        return METHODS[self.method].learns == "pairs"

    @property
    def forward_passes(self) -> int:
        """Return how many forward passes without gradients a micro-batch has beside the one with gradients."""
        return METHODS[self.method].forward_passes

    @property
    def micro_batches(self) -> int:
        """Return how many micro-batches an optimiser step has."""
        return int(self.gradient_accumulation_steps)

    @property
    def tokens(self) -> int:
        """Return how many tokens a micro-batch has if all its rows are as long as the longest."""
        return self.rows * self.length

    @property
    def course_tokens(self) -> int:
        """Return how many tokens are in the steps whose course is measured at a time."""
        return self.tokens * self.micro_batches * int(self.anchor_steps)

    def measuring(self, rows: int) -> "Settings":
        """Return the settings while the full model's course is measured: that many rows at a time, and no dropout."""
        measured = {"per_device_train_batch_size": rows, "lora_dropout": 0.0, "gradient_checkpointing": False}
        return self.model_copy(update=measured)

    def resident(self) -> "Settings":
        """Return the settings with the model in memory, and nothing measured on the full one."""
        return self.model_copy(update={"engine": "resident", "ram_budget": "", "anchor_steps": 0})

    def out_of_core(self) -> "Settings":
        """Return the settings with the model streamed, without what the streamed engine does not take."""
        without = {"lora_dropout": 0.0, "offload_embedding": False, "anchor_steps": 0}
        return self.model_copy(update={"engine": STREAMED, **without})

    @property
    def compute_bytes(self) -> int:
        """Bytes per value that is computed with."""
        return 2 if self.device == "cuda" else 4

    @property
    def lora_bytes(self) -> int:
        """Bytes per trained value."""
        return 2 if self.lora_dtype == "bfloat16" else 4

    def describe(self, adapter_parameters: int) -> str:
        """Return one line for people.

        Example: `4-bit weights, lora of rank 8 (19,988,480 parameters in float32), 4 x 512 tokens, adamw_torch_fused`.
        """
        parts = [
            f"{4 if self.quantised else 8 * self.compute_bytes}-bit weights",
            f"{self.method} of rank {self.rank} ({adapter_parameters:,} parameters in {self.lora_dtype})",
            f"{self.per_device_train_batch_size}{' pairs' if self.of_pairs else ''} x {self.length} tokens",
            str(self.optim),
        ]
        parts += ["streamed layer by layer"] if self.streamed else []
        parts += ["activation checkpointing"] if self.checkpointed and not self.streamed else []
        parts += [f"anchored every {self.anchor_steps} steps"] if self.anchored else []
        parts += ["offloaded"] if self.offloaded else []
        return ", ".join(parts)

    def advice(self) -> list[str]:
        """Flags of `loram estimate` with which training would take less memory."""
        flags = [] if self.quantised else ["--load-in-4bit"]
        flags += ["--per-device-train-batch-size 1"] if self.per_device_train_batch_size > 1 else []
        flags += [] if self.checkpointed else ["--gradient-checkpointing"]
        return [*flags, "a smaller --max-length"]


if TYPE_CHECKING:
    PlannerOptions = _PlannerOptions
    Settings = _Settings
else:
    PlannerOptions = create_model(
        "PlannerOptions",
        __base__=_PlannerOptions,
        __module__=__name__,
        __doc__=_PlannerOptions.__doc__,
        **{name: _left_open(name, option.field) for name, option in {**PRUNING, **TRAINING}.items()},
    )
    Settings = create_model(
        "Settings",
        __base__=_Settings,
        __module__=__name__,
        __doc__=_Settings.__doc__,
        **{name: _filled_in(name, option.field) for name, option in TRAINING.items()},
    )


def make_settings(**given: Any) -> Settings:
    """Return settings with the defaults that `loram train` has on the device; None stands for the default.

    On a GPU activations are checkpointed; with 4-bit weights they are also offloaded, and AdamW keeps pageable 8-bit
    states.

    Raises:
        UserError: a value is out of range, or two do not go together.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if is_all_linear(chosen.get("lora_target_modules")):
        chosen["lora_target_modules"] = (ALL_LINEAR,)
    on_gpu = chosen.get("device", "cuda") == "cuda"
    method = method_of(chosen.get("method", "lora"))
    try:
        defaults = _defaults(method, on_gpu, bool(chosen.get("load_in_4bit")))
        if chosen.get("engine") == STREAMED:
            defaults["lora_dropout"] = 0.0
        settings = Settings(**{**defaults, **chosen})
    except ValidationError as error:
        raise UserError(explain(error, Settings)) from error
    if settings.offloaded and not on_gpu:
        raise UserError("activation_offloading moves activations from a GPU to host memory; on a cpu there is no use")
    if settings.optim.startswith("paged") and not on_gpu:
        raise UserError(f"optim {settings.optim!r} pages a GPU's memory; on a cpu take adamw_8bit")
    if settings.embedding_in_host and not settings.quantised:
        raise UserError("offload_embedding leaves the embedding of a model in 4 bits in host memory; add load_in_4bit")
    for other in METHODS.values():
        own = (name for name in chosen if name in TRAINING and TRAINING[name].section == other.section)
        if other.section != method.section and (name := next(own, None)) is not None:
            raise UserError(f"{name} is an option of method {other.name}, and the method is {method.name}")
    _check_streamed(settings, method)
    _ = settings.trained_ranks  # raises where the share cannot be had exactly
    return settings


def _check_streamed(settings: Settings, method: Method) -> None:
    """Refuse what the streamed engine cannot train, as training does."""
    if not settings.streamed:
        if settings.ram_budget and not settings.anchored:
            raise UserError("ram_budget is for what is streamed; add engine streamed or anchor_steps")
        return
    if not method.streamed:
        raise UserError(f"engine streamed cannot train by method {method.name}")
    if settings.anchored or settings.dropout or settings.embedding_in_host:
        raise UserError("engine streamed takes no anchor_steps, lora_dropout or offload_embedding; leave it out")


def _defaults(method: Method, on_gpu: bool, quantised: bool) -> dict[str, Any]:
    """Return the defaults that depend on method, device and precision."""
    own: Mapping[str, Mapping[str, Any]] = {"lora": method.defaults, "trainer": method.trainer}
    of_method = {
        name: own[option.section][option.name]
        for name, option in TRAINING.items()
        if option.name in own.get(option.section, {})
    }
    return {
        "optim": "paged_adamw_8bit" if on_gpu and quantised else "adamw_torch_fused",
        "gradient_checkpointing": on_gpu,
        "activation_offloading": on_gpu and quantised,
        **of_method,
    }
