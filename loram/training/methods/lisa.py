"""LISA (arXiv 2403.17919): all weights train, but only a few decoder layers at a time, which are drawn anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from loram.base import processes
from loram.base.errors import UserError
from loram.base.options import Options, option
from loram.training.methods.full import Full

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from loram.training.options import TrainOptions


class LisaOptions(Options):
    """The options of LISA."""

    active_layers: PositiveInt = option(
        2,
        "LISA: the number of decoder layers that train at a time.",
        flag="lisa-layers",
        also="lisa_n_layers lisa_activated_layers",
    )
    interval_steps: PositiveInt = option(
        20, "LISA: draw other layers after this many steps.", flag="lisa-interval-steps", also="lisa_step_interval"
    )
    train_embeddings: bool = option(
        True,
        "LISA on a full model: the embedding, the last norm and lm_head train throughout.",
        flag="lisa-train-embeddings",
    )


@dataclass(frozen=True, kw_only=True)
class Lisa(Full):
    """Full fine-tuning of a few decoder layers at a time."""

    def check(self, options: "TrainOptions", lora: Mapping[str, Any]) -> None:
        """Also refuse to train in several processes."""
        super().check(options, lora)
        if processes.count() > 1:
            raise UserError(
                f"method {self.name}: trains in one process; several would wait for gradients of the layers it freezes"
            )

    def specialise_(self, model: "nn.Module", own: Options | None, *, pruned: bool) -> None:
        """Let all decoder layers train, since the optimiser is made with all of them, and what is around them."""
        from loram.training.methods.weights import unfreeze_

        assert isinstance(own, LisaOptions)
        unfreeze_(model, pruned=pruned, around=own.train_embeddings)

    def callbacks(self, model: "nn.Module", own: Options | None, seed: int) -> Sequence["TrainerCallback"]:
        """Return the callback that draws layers.

        Raises:
            UserError: the model has fewer layers than should train at a time.
        """
        from loram.training.methods.layer_draws import LayerDraws
        from loram.training.methods.weights import trained_layers

        assert isinstance(own, LisaOptions)
        layers = trained_layers(model)
        return [LayerDraws(layers, active_layers=own.active_layers, interval_steps=own.interval_steps, seed=seed)]

    def layers_at_once(self, layers: int, own: Options | None) -> int:
        """Return as many as `active_layers` says."""
        assert isinstance(own, LisaOptions)
        return min(own.active_layers, layers)


LISA = Lisa(
    name="lisa",
    summary="all weights, those of a few decoder layers at a time (arXiv 2403.17919)",
    section="lisa",
    options=LisaOptions,
)
