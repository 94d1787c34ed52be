"""The methods as a table, and the options that only one of them has. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pydantic import PositiveInt

from loram.base.errors import UserError
from loram.base.options import Options, option

ANCHOR_STEPS = 8  # of recipes that prune, where the full model is at hand


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train.

    Args:
        summary: in one line.
        weights: whether it trains the model's own weights, and not an adapter.
        lora: options of PEFT's LoraConfig that make the method; they cannot be set otherwise.
        defaults: options of LoraConfig with another default than plain LoRA's.
        trainer: options of the Trainer with another default.
    """

    summary: str
    weights: bool = False
    lora: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "lora": Method(summary="both factors of every adapted linear (arXiv 2106.09685)"),
        "rslora": Method(
            summary="the same, scaled by alpha / sqrt(r) (arXiv 2312.03732)",
            lora={"use_rslora": True},
        ),
        "dora": Method(
            summary="both factors, and the length of every row of the adapted weight (arXiv 2402.09353)",
            lora={"use_dora": True},
            defaults={"lora_dropout": 0.0},  # with one, PEFT computes the base's output a second time
        ),
        "lora-fa": Method(
            summary="lora_B; lora_A stays as drawn, so no input is kept for it (arXiv 2308.03303)",
            defaults={"lora_dropout": 0.0},
        ),
        "lora-sp": Method(
            summary="a share of the factors' parameters; the others stay as drawn (arXiv 2403.08822)",
        ),
        "lisa": Method(
            summary="all weights, those of a few decoder layers at a time (arXiv 2403.17919)",
            weights=True,
            defaults={"r": 64},
            trainer={"learning_rate": 2e-5},
        ),
        "full": Method(
            summary="all weights",
            weights=True,
            defaults={"r": 64},
            trainer={"learning_rate": 2e-5},
        ),
    }
)


class LisaOptions(Options):
    """The options of LISA (arXiv 2403.17919)."""

    active_layers: PositiveInt = option(
        2,
        "LISA: how many decoder layers train at a time.",
        flag="lisa-layers",
        also="lisa_n_layers lisa_activated_layers",
    )
    interval_steps: PositiveInt = option(
        20, "LISA: other layers are drawn after so many steps.", flag="lisa-interval-steps", also="lisa_step_interval"
    )
    train_embeddings: bool = option(
        True,
        "LISA on a full model: the embedding, the last norm and lm_head train throughout.",
        flag="lisa-train-embeddings",
    )


class LoraSpOptions(Options):
    """The options of LoRA-SP (arXiv 2403.08822)."""

    share: float = option(
        0.5,
        "LoRA-SP: the share of the adapter's parameters that trains, from 0.5 to 1.",
        ge=0.5,
        le=1,
        flag="lora-sp-share",
        planned=True,
    )


# method -> (its section in a recipe and parameter of `train`, what stands there)
OPTIONS: Mapping[str, tuple[str, type[Options]]] = MappingProxyType(
    {"lisa": ("lisa", LisaOptions), "lora-sp": ("lora_sp", LoraSpOptions)}
)


def method_of(name: str) -> Method:
    """A row of the table.

    Raises:
        UserError: there is none of that name.
    """
    if name not in METHODS:
        raise UserError(f"method {name!r} is not known; known are {', '.join(METHODS)}")
    return METHODS[name]


def frozen_ranks(r: int, share: float) -> int:
    """Of how many ranks LoRA-SP freezes lora_A; of as many others it freezes lora_B.

    A rank whose both factors were frozen would add nothing, so no share is below a half; and since both sides freeze
    as many, a share is the same in every linear, whatever its shape: (r - k) / r for k frozen on each side.

    Raises:
        UserError: no k gives the share exactly; names the nearest that can be had.

    Example: of r 8, a share of 0.5 freezes four, 0.75 two.
    """
    nearest = min(range(r // 2 + 1), key=lambda k: abs((r - k) / r - share))
    if abs((r - nearest) / r - share) < 1e-6:  # two thirds have no end as a decimal
        return nearest
    raise UserError(
        f"lora_sp.share: {share} of a rank {r} adapter cannot be had exactly; the nearest is {(r - nearest) / r:g}"
    )
