"""Which answers a model prefers. This module imports nothing heavy, since reports of runs read it."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor


class Preferences(BaseModel):
    """Which answers a model prefers.

    Args:
        accuracy: the share of pairs whose chosen answer is likelier than the rejected one.
        margin: the mean of log p(chosen) - log p(rejected), summed over the tokens of an answer, in nats. β times what
            an adapter adds to it is the mean reward margin of DPO.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: float
    margin: float

    @classmethod
    def of(cls, chosen: "Tensor", rejected: "Tensor") -> "Preferences":
        """Return them from the summed losses of both answers of each pair, (pairs,)."""
        margins = rejected - chosen
        return cls(accuracy=float((margins > 0).double().mean()), margin=float(margins.mean()))
