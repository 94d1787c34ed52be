"""Floating point operations of training, per token."""

from pydantic import BaseModel, ConfigDict

from loram.planner.settings import Settings
from loram.planner.shapes import Model
from loram.planner.weights import adapted, trained


class Arithmetic(BaseModel):
    """Floating point operations of training per token: see the documentation of `loram estimate` for the formula.

    Args:
        flops_per_token: all operations.
        measuring_flops_per_token: the operations among them that measure the full model's course for anchors; 0 where
            nothing is anchored.
        full_flops_per_token: the operations of LoRA on the full model with the same settings.
        times_fewer: `full_flops_per_token` divided by `flops_per_token`; below 1 where anchored training takes more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops_per_token: int
    measuring_flops_per_token: int
    full_flops_per_token: int
    times_fewer: float


def arithmetic(full: Model, model: Model, settings: Settings) -> Arithmetic:
    """Return the operations of training on a model, and those of LoRA on the full model."""
    measuring = _measuring_flops(full, model, settings) if settings.anchored else 0
    flops, full_flops = training_flops(model, settings) + measuring, training_flops(full, settings)
    return Arithmetic(
        flops_per_token=flops,
        measuring_flops_per_token=measuring,
        full_flops_per_token=full_flops,
        times_fewer=full_flops / flops,
    )


def training_flops(model: Model, settings: Settings) -> int:
    """Return operations per token: 2 per weight forward, 2 backward, 2 if forward is done again, 2 if it trains.

    The logits are always worked out again in the backward pass; a lookup in the embedding costs nothing. Forward passes
    without gradients, of the reference of preference tuning, take 2 per weight of the model each.
    """
    again, alone = 2 if settings.checkpointed else 0, 2 * settings.forward_passes
    layers, head = sum(layer.weights for layer in model.layers), model.vocabulary
    on_head = settings.rank * sum(_head(model)) if model.architecture.head in settings.targets else 0
    in_layers = sum(settings.rank * (rows + columns) for rows, columns in adapted(model, settings)) - on_head
    gradients = 2 * sum(trained(model, settings))
    with_gradients = (4 + again) * layers + 6 * head + (4 + again) * in_layers + 6 * on_head + gradients
    return with_gradients + alone * (layers + head)


def _measuring_flops(full: Model, model: Model, settings: Settings) -> int:
    """Return operations per token that measure the full model; a token is measured each time it is trained on.

    The full model goes forward, and with gradients forward again and backward. The layers that are pruned also go
    forward in their pruned form, and with gradients backward.
    """
    adapter = settings.rank * sum(rows + columns for rows, columns in adapted(full, settings))
    weights = sum(layer.weights for layer in full.layers) + adapter
    own = sum(layer.weights for layer in model.narrowed_layers)
    if not settings.gradients_measured:
        return 2 * weights + 2 * own
    return 6 * weights + 4 * own + 6 * full.vocabulary


def _head(model: Model) -> tuple[int, int]:
    """Return (out_features, in_features) of lm_head."""
    return model.geometry.vocab_size, model.geometry.hidden_size
