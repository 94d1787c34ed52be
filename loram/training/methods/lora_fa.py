"""LoRA-FA (arXiv 2308.03303): only lora_B trains, so the inputs of adapted linears need not be kept for backward."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loram.base.options import Options
from loram.training.methods.method import Method

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LoraFa(Method):
    """LoRA with lora_A frozen as it was drawn."""

    def specialise_(self, model: "nn.Module", own: Options | None, *, pruned: bool) -> None:
        """Freeze every lora_A."""
        from loram.training.methods.adapters import adapted_linears

        for _, layer in adapted_linears(model):
            layer.lora_A.requires_grad_(False)

    def trained_ranks(self, r: int, own: Options | None) -> tuple[int, int]:
        """Return that no rank of lora_A trains and all ranks of lora_B do."""
        return 0, r


LORA_FA = LoraFa(
    name="lora-fa",
    summary="lora_B; lora_A stays as drawn, so no input is kept for it (arXiv 2308.03303)",
    defaults={"lora_dropout": 0.0},  # dropout keeps a mask of the input's size
    experts=True,
    streamed=True,
    continues=True,
    planned=True,
)
