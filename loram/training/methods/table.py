"""The methods as a table. It imports nothing heavy, since the command line and the planner read it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loram.base.errors import UserError
from loram.training.methods.dora import DORA
from loram.training.methods.full import FULL
from loram.training.methods.lisa import LISA
from loram.training.methods.lora_fa import LORA_FA
from loram.training.methods.lora_sp import LORA_SP
from loram.training.methods.method import Method
from loram.training.methods.preference import DPO, KTO, ORPO

if TYPE_CHECKING:
    from loram.training.options import TrainOptions

_ROWS = (
    Method(
        name="lora",
        summary="both factors of every adapted linear (arXiv 2106.09685)",
        masked=True,
        experts=True,
        streamed=True,
        sharded=True,
        continues=True,
        planned=True,
    ),
    Method(
        name="rslora",
        summary="the same, scaled by alpha / sqrt(r) (arXiv 2312.03732)",
        lora={"use_rslora": True},
        masked=True,
        experts=True,
        streamed=True,
        sharded=True,
        planned=True,
    ),
    DORA,
    LORA_FA,
    LORA_SP,
    LISA,
    FULL,
    DPO,
    ORPO,
    KTO,
)
METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})


def method_of(name: str) -> Method:
    """Return a row of the table.

    Raises:
        UserError: no method has that name.
    """
    if name not in METHODS:
        raise UserError(f"method {name!r} is not known; known are {', '.join(METHODS)}")
    return METHODS[name]


def methods_with(section: str | None) -> str:
    """Return the names of the methods that share a section of options: `methods dpo, orpo and kto`."""
    *names, last = [row.name for row in METHODS.values() if row.section == section]
    return f"methods {', '.join(names)} and {last}" if names else f"method {last}"


def check_method(options: "TrainOptions", lora: Mapping[str, Any]) -> None:
    """Refuse options that contradict the method, that it would ignore, or that make another method.

    Args:
        options: the options as the user gave them.
        lora: the options of LoraConfig with every default filled in.

    Raises:
        UserError: names the option and what to do.
    """
    method = method_of(options.method)
    for other in METHODS.values():
        if other is not method:
            _check_other(other, options)
    if options.mask_update and not method.masked:
        names = " and ".join(row.name for row in METHODS.values() if row.masked)
        raise UserError(f"mask_update: is for methods {names}, and the method is {method.name}")
    if lora.get("target_parameters") and not method.experts:
        names = " and ".join(row.name for row in METHODS.values() if row.experts)
        raise UserError(f"lora: target_parameters is for methods {names}, and the method is {method.name}")
    if method.in_float32 and options.lora_dtype != "float32":
        raise UserError(f"lora_dtype: with method {method.name} {method.in_float32}; leave it out")
    if method.weights and options.load_in_4bit:
        *others, last = [row.name for row in METHODS.values() if not row.weights]
        raise UserError(
            f"load_in_4bit: method {method.name} trains the weights themselves, and weights in 4 bits cannot be "
            f"trained; take {', '.join(others)} or {last}, or the model in 16 or 32 bits"
        )
    method.check(options, lora)


def _check_other(other: Method, options: "TrainOptions") -> None:
    """Refuse what belongs to a method that is not the one that trains."""
    if other.section not in (None, METHODS[options.method].section) and getattr(options, other.section) is not None:
        raise UserError(
            f"{other.section}: these are options of {methods_with(other.section)}, and the method is {options.method}"
        )
    if other.adds_files:  # PEFT's switch alone would leave them out, and the adapter could not be recovered
        for key, value in other.lora.items():
            if options.lora.get(key) == value:
                raise UserError(f"lora: {key} cannot be used with method {options.method}; take method {other.name}")
