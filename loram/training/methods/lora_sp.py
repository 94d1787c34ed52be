"""LoRA-SP (arXiv 2403.08822): a share of the adapter's parameters trains, and the others stay as they were drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loram.base.errors import UserError
from loram.base.options import Options, option
from loram.training.methods.method import Method

if TYPE_CHECKING:
    from torch import nn

    from loram.training.options import TrainOptions


class LoraSpOptions(Options):
    """The options of LoRA-SP."""

    share: float = option(
        0.5,
        "LoRA-SP: the share of the adapter's parameters that trains, from 0.5 to 1.",
        ge=0.5,
        le=1,
        flag="lora-sp-share",
        planned=True,
    )


@dataclass(frozen=True, kw_only=True)
class LoraSp(Method):
    """LoRA with some ranks of lora_A frozen, and as many others of lora_B."""

    def check(self, options: "TrainOptions", lora: Mapping[str, Any]) -> None:
        """Also refuse ranks and initialisations that differ between linears, and a share that no split gives."""
        super().check(options, lora)
        for key in ("rank_pattern", "init_lora_weights"):
            if lora.get(key, True) not in (True, None, {}):
                raise UserError(
                    f"lora: {key} cannot be used with method {self.name}, which splits and draws all ranks alike"
                )
        self.trained_ranks(lora["r"], self.own_options(options))

    def specialise_(self, model: "nn.Module", own: Options | None, *, pruned: bool) -> None:
        """Split the two factors of every adapted linear into a frozen and a trained part."""
        from loram.training.methods.adapters import adapted_linears
        from loram.training.methods.split import split_

        assert isinstance(own, LoraSpOptions)
        for _, layer in adapted_linears(model):
            split_(layer, frozen_ranks(layer.r["default"], own.share))

    def trained_ranks(self, r: int, own: Options | None) -> tuple[int, int]:
        """Return all ranks but the frozen ones; both factors freeze the same number.

        Raises:
            UserError: no number of frozen ranks gives the share exactly.
        """
        assert isinstance(own, LoraSpOptions)
        trained = r - frozen_ranks(r, own.share)
        return trained, trained


def frozen_ranks(r: int, share: float) -> int:
    """Return how many ranks LoRA-SP freezes in lora_A; it freezes as many others in lora_B.

    A rank whose two factors were both frozen would add nothing, so no share is below a half. Since both factors freeze
    the same number k of ranks, the share is the same in every linear, whatever its shape: (r - k) / r.

    Raises:
        UserError: no k gives the share exactly; the error names the nearest share that can be had.

    Example: with r 8, a share of 0.5 freezes four ranks, and a share of 0.75 freezes two.
    """
    nearest = min(range(r // 2 + 1), key=lambda k: abs((r - k) / r - share))
    if abs((r - nearest) / r - share) < 1e-6:  # two thirds have no end as a decimal
        return nearest
    raise UserError(
        f"lora_sp.share: {share} of a rank {r} adapter cannot be had exactly; the nearest is {(r - nearest) / r:g}"
    )


LORA_SP = LoraSp(
    name="lora-sp",
    summary="a share of the factors' parameters; the others stay as drawn (arXiv 2403.08822)",
    section="lora_sp",
    options=LoraSpOptions,
    streamed=True,
    planned=True,
)
