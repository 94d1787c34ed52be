"""The figures of a run's page as numbers that its template draws: nothing here knows of SVG or HTML."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loram.model.plan import PruningPlan

_NAMES = {"kv_groups": "key-value groups"}
LOSSES = {  # a key of a log -> what its curve is called
    "loss": "training loss",
    "recovered_loss": "loss of the recovered probe",
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A loss over the steps of a training. Places are shares of the width, and of the height from above, in 0..1.

    Args:
        title: what it shows.
        points: (step, loss) as logged.
        places: where each point is drawn.
        steps, losses: (value, place) of the ticks of both axes.
    """

    title: str
    points: tuple[tuple[float, float], ...]
    places: tuple[tuple[float, float], ...]
    steps: tuple[tuple[float, float], ...]
    losses: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What one layer keeps: a share of 0..1, how much of what in words, and whether the layer is gone."""

    layer: int
    share: float
    text: str
    dropped: bool


def curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Curve]:
    """Return the curves of all logs; a loss with one finite value, or none, has no curve."""
    drawn = []
    for folder, entries in logs.items():
        for key, name in LOSSES.items():
            points = [
                (float(entry["step"]), float(entry[key])) for entry in entries if key in entry and "step" in entry
            ]
            points = [point for point in points if all(map(math.isfinite, point))]
            if len(points) > 1:
                drawn.append(_curve(f"{folder}: {name}", points))
    return drawn


def _curve(title: str, points: Sequence[tuple[float, float]]) -> Curve:
    steps, losses = ticks([step for step, _ in points]), ticks([loss for _, loss in points])
    across, up = _scale(steps), _scale(losses)
    return Curve(
        title=title,
        points=tuple(points),
        places=tuple((across(step), 1 - up(loss)) for step, loss in points),
        steps=tuple((step, across(step)) for step in steps),
        losses=tuple((loss, 1 - up(loss)) for loss in losses),
    )


def ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Return about `count` round numbers, evenly spaced, from the least value or below to the greatest or above.

    Example: of values from 1.83 to 3.4 they are 1.5, 2.0, 2.5, 3.0, 3.5.
    """
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / (count - 1)
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _scale(values: Sequence[float]) -> Callable[[float], float]:
    low, high = values[0], values[-1]
    return lambda value: (value - low) / (high - low)


def kept(plan: PruningPlan | None) -> dict[str, list[Bar]]:
    """Return what each layer keeps: the name of what is kept -> one bar per layer.

    Spaces of which no layer loses anything are left out, unless whole layers are dropped.
    """
    if plan is None:
        return {}
    layers = range(plan.geometry.num_hidden_layers)
    if plan.sparse:
        return {"weights": [_sparse_bar(plan, layer) for layer in layers]}
    bars: dict[str, list[Bar]] = {}
    for layer in layers:
        units, full = plan.units(layer), plan.geometry.at(layer)
        for space in plan.spaces(layer):
            name, total = _NAMES.get(space.name, space.name.replace("_", " ")), full.units(space)
            count = 0 if layer in plan.dropped else units[space.name]
            text = f"layer {layer}: {'dropped' if layer in plan.dropped else f'{count:,} of {total:,} {name}'}"
            bar = Bar(layer=layer, share=count / total, text=text, dropped=layer in plan.dropped)
            bars.setdefault(name, []).append(bar)
    return {name: row for name, row in bars.items() if any(bar.share < 1 for bar in row)}


def _sparse_bar(plan: PruningPlan, layer: int) -> Bar:
    share = 1.0
    if layer in plan.sparse_layers:
        shapes = {linear.path: plan.geometry.linear_shape(linear) for linear in plan.architecture.linears}
        counts = plan.kept_values()
        share = sum(counts.values()) / sum(math.prod(shapes[path]) for path in counts)
    text = f"layer {layer}: {100 * share:.0f}% of the weights in its linears"
    return Bar(layer=layer, share=share, text=text, dropped=False)
