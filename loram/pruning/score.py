"""Checkpoint + criteria + calibration text -> a score for every prunable unit, layer by layer, from the files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loram.base.errors import UserError
from loram.base.progress import track
from loram.compute.streaming import BATCH_TOKENS, Stream, prefetched
from loram.data.batches import make_batches
from loram.disk.checkpoint import Checkpoint
from loram.model.architecture import CUTS, Cut, Geometry, Space, architecture_of
from loram.pruning.criteria import CRITERIA, Criterion
from loram.pruning.evidence import Evidence, InputStatistics

Scores = Mapping[int, Mapping[str, Tensor]]  # layer -> space name -> score of each unit, float64
_BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True, kw_only=True)
class ScoredLayer:
    """A decoder layer while its weights are in memory, and what is known of it.

    Args:
        index: which.
        scores: criterion -> space name -> (units,) float64; empty where the layer was not to be scored.
        tensors: full name -> weight; empty as soon as the next layer is asked for.
        inputs: full weight name -> statistics of the linear's inputs, where a criterion reads them.
    """

    index: int
    scores: Mapping[str, Mapping[str, Tensor]]
    tensors: Mapping[str, Tensor]
    inputs: Mapping[str, InputStatistics]


def score_layers(
    checkpoint: Checkpoint,
    criteria: Sequence[str],
    layers: Sequence[int],
    *,
    calibration: Sequence[list[int]] = (),
    gather_inputs: bool = False,
    seed: int = 42,
    device: torch.device | None = None,
    scratch: Path | None = None,
) -> Iterator[ScoredLayer]:
    """Score decoder layers one after the other, the model never in memory, with one calibration pass for all criteria.

    Under grouped-query attention a unit is a key-value head with its query heads, and sums run over all of them.
    Every layer is read once, and twice with gradients. Layers come in the order they are read in; those that had to be
    read but are not to be scored come too.

    Args:
        checkpoint: the full model.
        criteria: keys of `CRITERIA`.
        layers: decoder layers to score.
        calibration: token ids of the calibration samples, for criteria that read text.
        gather_inputs: give the statistics of inputs also where no criterion reads them.
        seed: for the random criterion.
        device: where layers compute, in float32.
        scratch: folder for hidden states that do not fit in memory.

    Raises:
        UserError: there is no text of at least two tokens, or an importance is not finite.
    """
    tally = _Tally(checkpoint, criteria, layers, seed)
    reads = {CRITERIA[criterion].reads for criterion in criteria} | ({"inputs"} if gather_inputs else set())
    if not reads & {"inputs", "gradient"}:
        names = {layer: [n for n in checkpoint.names() if n.startswith(f"model.layers.{layer}.")] for layer in layers}
        loads = prefetched(layers, lambda layer: {name: checkpoint.tensor(name) for name in names[layer]})
        for layer in track(list(layers), "Layers"):
            tensors = next(loads)
            yield tally.finished(layer, tensors)
            tensors.clear()  # whoever still holds the layer does not hold its weights
        return
    if not any(len(sample) > 1 for sample in calibration):
        raise UserError("calibration: no text of at least two tokens to compute importance from")
    stream = Stream(
        checkpoint,
        make_batches(calibration, max_tokens=BATCH_TOKENS),
        device=device or torch.device("cpu"),
        dtype=torch.float32,
        scratch=scratch,
    )
    observe = tally.observe if "inputs" in reads else None
    if "gradient" not in reads:
        for resident in stream.forward(observe):
            yield tally.finished(resident.index, resident.tensors)
        return
    for _ in stream.forward(observe, keep_from=min(layers)):
        pass
    for resident in stream.backward(min(layers), tally.on_gradient):
        yield tally.finished(resident.index, resident.tensors)


def score(
    checkpoint: Checkpoint, criteria: Sequence[str], layers: Sequence[int], **options: object
) -> dict[str, Scores]:
    """Criterion -> scores of all layers; arguments as for `score_layers`."""
    found: dict[str, dict[int, Mapping[str, Tensor]]] = {criterion: {} for criterion in criteria}
    for layer in score_layers(checkpoint, criteria, layers, **options):  # type: ignore[arg-type]
        for criterion, spaces in layer.scores.items():
            found[criterion][layer.index] = spaces
    return {criterion: dict(sorted(scores.items())) for criterion, scores in found.items()}


class _Tally:
    """Adds up importance over the units of layers, as evidence comes in."""

    def __init__(self, checkpoint: Checkpoint, criteria: Sequence[str], layers: Sequence[int], seed: int) -> None:
        self.geometry, self.name = checkpoint.geometry, checkpoint.name
        self.spaces = architecture_of(checkpoint.config).spaces
        self.rows = {criterion: CRITERIA[criterion] for criterion in criteria}
        self.layers, self.seed = frozenset(layers), seed
        self.inputs: dict[str, InputStatistics] = {}
        self.sums: dict[tuple[str, int, str], Tensor] = {}  # (criterion, layer, space)

    def observe(self, name: str, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Gather statistics of a linear's inputs."""
        if _layer(name) not in self.layers:
            return
        if name not in self.inputs:
            _, cut = _place(name)
            width = self.geometry.head_dim if cut.axis == 1 and cut.unit == "group" else 1
            self.inputs[name] = InputStatistics(inputs.shape[-1], width, inputs.device)
        self.inputs[name].add_(inputs, real)

    def on_gradient(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Take in a weight's gradient."""
        if _layer(name) not in self.layers:
            return
        self._add(name, weight, gradient)

    def finished(self, layer: int, tensors: Mapping[str, Tensor]) -> ScoredLayer:
        """A layer whose evidence is complete."""
        if layer not in self.layers:
            return ScoredLayer(index=layer, scores={}, tensors=tensors, inputs={})
        for linear in CUTS:
            name = f"model.layers.{layer}.{linear}.weight"
            self._add(name, tensors[name], None)
        scores = {
            criterion: {
                space.name: self._random(layer, number, space)
                if rule.importance is None
                else self.sums.pop((criterion, layer, space.name)).cpu()
                for number, space in enumerate(self.spaces)
            }
            for criterion, rule in self.rows.items()
        }
        inputs = {name: self.inputs.pop(name) for name in tensors if name in self.inputs}
        return ScoredLayer(index=layer, scores=scores, tensors=tensors, inputs=inputs)

    def _add(self, name: str, weight: Tensor, gradient: Tensor | None) -> None:
        """Add a weight's importance by all criteria that read the gradient, or by all that do not."""
        space, cut = _place(name)
        for criterion, rule in self.rows.items():
            skipped = rule.importance is None or (rule.consumers and cut.axis == 0)
            if skipped or (rule.reads == "gradient") != (gradient is not None):
                continue
            added = _unit_scores(rule, weight, gradient, self.inputs.get(name), cut, self.geometry)
            if not torch.isfinite(added).all():
                raise UserError(f"{self.name}: the {criterion} importance of {name} is not finite; is the model sound?")
            key = (criterion, _layer(name), space.name)
            self.sums[key] = added + self.sums[key] if key in self.sums else added

    def _random(self, layer: int, number: int, space: Space) -> Tensor:
        """Uniform scores that depend on seed, layer and space alone, not on which other layers are scored."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer * 101 + number)
        return torch.rand(self.geometry.units(space), generator=generator, dtype=torch.float64)


def _unit_scores(
    rule: Criterion,
    weight: Tensor,
    gradient: Tensor | None,
    inputs: InputStatistics | None,
    cut: Cut,
    geometry: Geometry,
) -> Tensor:
    """A weight's importance by unit, (units,) float64; its elements' is worked out some rows at a time.

    Example: o_proj's columns (9 heads of 64) in 3 groups -> the sums over the 192 columns of each group.
    """
    assert rule.importance is not None
    if rule.by_input:
        lines = rule.importance(Evidence(weight=weight, inputs=inputs))
    else:
        step, parts = max(1, _BLOCK_ELEMENTS // weight.shape[1]), []
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            part = None if gradient is None else gradient[rows]
            elements = rule.importance(Evidence(weight=weight[rows].float(), gradient=part, inputs=inputs))
            parts.append(elements.sum(1 - cut.axis).double())
        lines = torch.cat(parts) if cut.axis == 0 else torch.stack(parts).sum(0)
    return lines.view(-1, geometry.unit_size(cut.unit)).sum(1)


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _place(name: str) -> tuple[Space, Cut]:
    """Which space a weight (`model.layers.3.mlp.up_proj.weight`) belongs to, and where that cuts it."""
    return CUTS[".".join(name.split(".")[3:5])]
