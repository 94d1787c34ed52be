"""Checkpoint + criterion + calibration text -> a score for every prunable unit of every layer asked for."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from loram.errors import UserError
from loram.model.architecture import Cut, Geometry, architecture_of
from loram.model.checkpoint import Checkpoint
from loram.model.pruned import load_model
from loram.progress import track
from loram.prune.criteria import CRITERIA, Criterion

Scores = Mapping[int, Mapping[str, Tensor]]  # layer -> space name -> score of each unit, float64
Gradient = Callable[[str], Tensor | None]  # weight name -> gradient, or None where the criterion needs none


def score(
    checkpoint: Checkpoint,
    criterion: str,
    layers: Iterable[int],
    *,
    calibration: Iterable[list[int]] = (),
    seed: int = 42,
    device: torch.device | None = None,
) -> Scores:
    """Importance of every unit: the element importances summed over a unit's part of all matrices of its space.

    Under grouped-query attention a unit is a key-value head with its query heads, and the sum runs over all of them.

    Args:
        checkpoint: the full model.
        criterion: a key of `CRITERIA`.
        layers: decoder layers to score.
        calibration: token ids of the calibration samples, for criteria that need gradients.
        seed: for the random criterion.
        device: where gradients are computed.

    Returns:
        layer -> space name -> scores (units,), float64.
    """
    geometry, architecture = checkpoint.geometry, architecture_of(checkpoint.config)
    rule = CRITERIA[criterion]
    if rule.importance is None:
        return {
            layer: {
                space.name: _random(geometry.units(space), seed, layer, number)
                for number, space in enumerate(architecture.spaces)
            }
            for layer in layers
        }
    gradient = loss_gradient(checkpoint, list(calibration), device) if rule.needs_gradient else lambda _: None
    return {
        layer: {
            space.name: sum(
                (_unit_scores(checkpoint, rule, gradient, layer, cut, geometry) for cut in space.cuts),
                start=torch.zeros(geometry.units(space), dtype=torch.float64),
            )
            for space in architecture.spaces
        }
        for layer in track(list(layers), "Scoring layers")
    }


def _random(count: int, seed: int, layer: int, space: int) -> Tensor:
    """Uniform scores that depend on seed, layer and space alone, not on which other layers are scored."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer * 101 + space)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _unit_scores(
    checkpoint: Checkpoint, rule: Criterion, gradient: Gradient, layer: int, cut: Cut, geometry: Geometry
) -> Tensor:
    name = f"model.layers.{layer}.{cut.linear}.weight"
    assert rule.importance is not None
    elements = rule.importance(checkpoint.tensor(name).float(), gradient(name))
    return unit_sums(elements, cut, geometry)


def unit_sums(elements: Tensor, cut: Cut, geometry: Geometry) -> Tensor:
    """Sum the elements of a matrix over each unit's rows (cut axis 0) or columns (axis 1).

    Args:
        elements: (out_features, in_features) of the full model.

    Returns:
        (units,), float64. Example: o_proj columns (9 heads of 64) in 3 groups -> the 192 columns of each group.
    """
    lines = elements.double().sum(1 - cut.axis)
    return lines.view(-1, geometry.unit_size(cut.unit)).sum(1)


def loss_gradient(checkpoint: Checkpoint, samples: list[list[int]], device: torch.device | None = None) -> Gradient:
    """Gradient of the mean next-token loss over calibration samples, for the linears of the decoder layers.

    Args:
        samples: token ids of each sample.

    Returns:
        weight name -> gradient (float32, CPU) of the weight's shape.

    Raises:
        UserError: there is no sample to learn from, or a gradient is not finite.
    """
    predicted = sum(len(sample) - 1 for sample in samples)
    if predicted <= 0:
        raise UserError("calibration: no text of at least two tokens to compute gradients from")
    model = load_model(checkpoint, dtype=torch.float32).to(device or torch.device("cpu"))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(".layers." in name and parameter.ndim == 2)
    # With frozen embeddings nothing below the first layer needs a gradient; the loss still reaches every layer.
    for sample in track(samples, "Gradients of calibration samples"):
        ids = torch.tensor([sample], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / predicted
        loss.backward()

    def gradient(name: str) -> Tensor:
        grad = parameters[name].grad
        assert grad is not None
        if not torch.isfinite(grad).all():
            raise UserError(f"{checkpoint.name}: the gradient of {name} is not finite; is the model sound?")
        return grad.cpu()

    return gradient
