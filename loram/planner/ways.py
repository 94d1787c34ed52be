"""The ways to train one adapter, side by side: on the full model, on the pruned one, or on the streamed full model."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from loram.planner.memory import training_memory
from loram.planner.settings import Settings
from loram.planner.shapes import Model
from loram.planner.streamed import read_per_step
from loram.planner.work import arithmetic
from loram.training.methods.table import METHODS


class Way(BaseModel):
    """A way to train.

    Args:
        name: which model trains, and where it is.
        memory: bytes on the device that trains, at the peak.
        flops_per_token: operations of training per token.
        read_per_step: bytes of a streamed model that an optimiser step reads; None where the model is in memory.
        exact: whether the gradients are those of the full model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory: int
    flops_per_token: int
    read_per_step: int | None
    exact: bool


def ways(full: Model, model: Model, settings: Settings) -> Iterator[Way]:
    """Yield the ways to train with these settings, the one that wants most memory first.

    Args:
        full: the full model.
        model: the pruned one, or the full one where nothing is pruned.
        settings: how the model is trained. Anchors are those of the pruned model; what is kept of a streamed one in RAM
            is that of the streamed way.
    """
    yield _way("full model, in memory", full, full, settings.resident(), exact=True)
    if model.pruned and settings.anchored:
        yield _way("pruned model, in memory, anchored", full, model, settings, exact=False)
    elif model.pruned:
        yield _way("pruned model, in memory", full, model, settings.resident(), exact=False)
    if METHODS[settings.method].streamed:
        yield _way("full model, streamed", full, full, settings.out_of_core(), exact=True)


def _way(name: str, full: Model, model: Model, settings: Settings, *, exact: bool) -> Way:
    return Way(
        name=name,
        memory=training_memory(model, settings, full).total,
        flops_per_token=arithmetic(full, model, settings).flops_per_token,
        read_per_step=read_per_step(model, settings) if settings.streamed else None,
        exact=exact,
    )


def advice(ways: tuple[Way, ...], memory: int | None) -> str:
    """Return a few sentences that say which way to take.

    Args:
        ways: as `ways` yields them.
        memory: bytes of the device that trains; None where nobody has said.
    """
    whole, pruned = ways[0], next((way for way in ways if not way.exact), None)
    streamed = any(way.read_per_step is not None for way in ways)
    if memory is not None and whole.memory <= memory:
        return "The full model fits, so train it as it is: no other way is as fast and as exact."
    sentences = ["Train the full model in memory where it fits." if memory is None else "The full model does not fit."]
    if pruned is not None:
        less = whole.flops_per_token / pruned.flops_per_token
        why = f": {less:.1f}x less arithmetic" if less > 1 else ""
        sentences.append(f"Train the pruned model where time counts{why}.")
    if streamed:
        sentences.append("Train the streamed full model (train --engine streamed) where exactness counts.")
    if pruned is not None and streamed:
        sentences.append("To have some of both, train the pruned model, recover the adapter, and polish it.")
    return " ".join(sentences)
