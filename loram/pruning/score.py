"""Score every prunable unit of a checkpoint, layer by layer from the files, by one or several criteria."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loram.base import processes
from loram.base.constants import BATCH_TOKENS
from loram.base.errors import UserError
from loram.base.progress import track
from loram.compute.streaming import LayerObserver, Of, ResidentLayer, Stream, prefetched
from loram.data.batches import IGNORED, make_batches, share
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan
from loram.model.segments import Linear, Segment, Space
from loram.pruning.criteria import CRITERIA, READS_TEXT, Criterion, ExpertRules
from loram.pruning.evidence import Evidence, InputStatistics
from loram.pruning.experts import ExpertTally
from loram.pruning.refit import Gatherer, Products

Scores = Mapping[int, Mapping[str, Tensor]]  # layer -> space name -> score of each unit, float64
_BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True, kw_only=True)
class ScoredLayer:
    """A decoder layer while its weights are in memory, with its scores.

    Args:
        index: the layer's index.
        scores: criterion -> space name -> (units,) float64; empty where the layer was not to be scored.
        expert_scores: the same for experts and their channels, whatever the criterion.
        tensors: full name -> weight; the mapping is emptied as soon as the next layer is asked for.
        inputs: full weight name -> statistics of the linear's inputs, where a criterion reads them.
        products: full weight name -> what refitting an output projection needs, where it will be refitted.
    """

    index: int
    scores: Mapping[str, Mapping[str, Tensor]]
    expert_scores: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    inputs: Mapping[str, InputStatistics]
    products: dict[str, Products]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Layers that are scored while one iterates.

    Args:
        order: the indices of the layers that come, in their order.
        layers: these layers; it can be gone through once.
    """

    order: Sequence[int]
    layers: Iterator[ScoredLayer]

    def __iter__(self) -> Iterator[ScoredLayer]:
        return self.layers


def score_layers(
    checkpoint: Checkpoint,
    criteria: Sequence[str],
    layers: Sequence[int],
    *,
    calibration: Sequence[list[int]] = (),
    gather_inputs: bool = False,
    refit: PruningPlan | None = None,
    refit_text: Sequence[list[int]] = (),
    experts: ExpertRules | None = None,
    seed: int = 42,
    device: torch.device | None = None,
    scratch: Path | None = None,
    observe_layer: LayerObserver | None = None,
) -> Scoring:
    """Score decoder layers one after the other, with one calibration pass for all criteria.

    The model is never in memory as a whole. Under grouped-query attention a unit is a key-value head with its query
    heads, and sums run over all of them. Every layer is read once, or twice with gradients. Layers come in the order in
    which they are read; those that had to be read but are not to be scored come too. With gradients, the forward pass
    is over when this returns.

    Several processes share the text, and each of them reads the layers. All get the same scores; but layers that are
    scored by their weights alone come in the first process only.

    Args:
        checkpoint: the full model.
        criteria: keys of `CRITERIA`.
        layers: the decoder layers to score.
        calibration: token ids of the calibration samples, for criteria that read text.
        gather_inputs: give the statistics of inputs also where no criterion reads them.
        refit: a plan whose output projections will be refitted, so that what they need is gathered too; which units it
            keeps makes no difference.
        refit_text: token ids of further samples, which only the refit reads.
        experts: how experts and their channels are scored, which stand beside the scores by any criterion; None where
            they are not.
        seed: the seed of the random criterion.
        device: where the layers compute, in float32.
        scratch: the folder for hidden states that do not fit in memory.
        observe_layer: called in the forward pass, if there is one (see `Stream.forward`).

    Raises:
        UserError: there is no text of at least two tokens, or an importance is not finite.
    """
    rules = experts or ExpertRules()
    tally = _Tally(checkpoint, criteria, layers, rules, seed)
    reads = {CRITERIA[criterion].reads for criterion in criteria} | ({"inputs"} if gather_inputs else set())
    reads |= rules.reads
    if refit is None and not reads & READS_TEXT:
        return Scoring(order=layers, layers=_from_weights(checkpoint, layers, tally))
    stream = calibration_stream(checkpoint, calibration, beside=refit_text, device=device, scratch=scratch)
    gather = None
    if refit is not None:
        tally.gatherer = Gatherer(checkpoint.architecture, refit, stream.batches)
        gather = tally.gatherer.observe
    passing: Iterator[ResidentLayer] = stream.forward(
        tally.observe if "inputs" in reads else None,
        keep_from=min(layers) if "gradient" in reads else None,
        observe_experts=tally.experts.observe if "outputs" in reads else None,
        observe_layer=observe_layer,
        gather=None if "gradient" in reads else gather,
    )
    order = range(checkpoint.geometry.num_hidden_layers)
    if "gradient" in reads:
        order = range(len(order) - 1, min(layers) - 1, -1)
        deque(passing, maxlen=0)
        wanted: Of = "weights and experts" if "gradient" in rules.reads else "weights"
        tally.share = stream.predicted / sum(processes.gather(stream.predicted))
        passing = stream.backward(min(layers), tally.on_gradient, of=wanted, gather=gather)
    return Scoring(order=order, layers=(tally.finished(resident.index, resident.tensors) for resident in passing))


def _from_weights(checkpoint: Checkpoint, layers: Sequence[int], tally: "_Tally") -> Iterator[ScoredLayer]:
    """Score layers by their weights alone, which the first process does alone."""
    if not processes.first():
        return
    loads = prefetched(layers, checkpoint.layer_tensors)
    for layer in track(list(layers), "Layers"):
        tensors = next(loads)
        yield tally.finished(layer, tensors)
        tensors.clear()  # whoever still holds the layer does not hold its weights


def calibration_stream(
    checkpoint: Checkpoint,
    calibration: Sequence[list[int]],
    *,
    beside: Sequence[list[int]] = (),
    device: torch.device | None = None,
    scratch: Path | None = None,
) -> Stream:
    """Return the stream of a model on calibration text, in float32; arguments as for `score_layers`.

    Text that is `beside` it passes too, and has no token in the loss. Several processes share both.

    Raises:
        UserError: there is no text of at least two tokens, or not for every process.
    """
    if not any(len(sample) > 1 for sample in calibration):
        raise UserError("calibration: no text of at least two tokens to compute importance from")
    nowhere = [[IGNORED] * len(row) for row in beside]
    further = make_batches(beside, nowhere, max_tokens=BATCH_TOKENS, rows=share(beside))
    scored = make_batches(calibration, max_tokens=BATCH_TOKENS, rows=share(calibration, after=len(beside)))
    if not all(processes.gather(any(batch.counts for batch in scored))):
        raise UserError(
            f"calibration: {len(calibration)} rows do not give each of {processes.count()} processes a text of at "
            "least two tokens; take more rows, or fewer processes"
        )
    return Stream(
        checkpoint, [*further, *scored], device=device or torch.device("cpu"), dtype=torch.float32, scratch=scratch
    )


def score(
    checkpoint: Checkpoint, criteria: Sequence[str], layers: Sequence[int], **options: object
) -> dict[str, Scores]:
    """Return the scores of all layers, by criterion; arguments as for `score_layers`."""
    by_criterion: dict[str, dict[int, Mapping[str, Tensor]]] = {criterion: {} for criterion in criteria}
    for layer in score_layers(checkpoint, criteria, layers, **options):  # type: ignore[arg-type]
        for criterion, spaces in layer.scores.items():
            by_criterion[criterion][layer.index] = spaces
    return {criterion: dict(sorted(scores.items())) for criterion, scores in by_criterion.items()}


class _Tally:
    """Adds up importance over the units of layers, as evidence comes in."""

    def __init__(
        self, checkpoint: Checkpoint, criteria: Sequence[str], layers: Sequence[int], rules: ExpertRules, seed: int
    ) -> None:
        self.experts = ExpertTally(checkpoint, layers, rules, seed)
        self.geometry, self.name = checkpoint.geometry, checkpoint.name
        self.architecture, self.rows_by_layer = checkpoint.architecture, checkpoint.rows_by_layer
        self.rows = {criterion: CRITERIA[criterion] for criterion in criteria}
        self.layers, self.seed = frozenset(layers), seed
        self.inputs: dict[str, InputStatistics] = {}
        self.gatherer: Gatherer | None = None
        self.share = 1.0  # of the tokens in the loss, those of this process
        self.sums: dict[tuple[str, int, str], Tensor] = {}  # (criterion, layer, space)

    def observe(self, name: str, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Gather statistics of a linear's inputs."""
        layer, linear = self._place(name)
        if layer not in self.layers or not linear.has_units:
            return
        if name not in self.inputs:
            heads = any(segment.unit in ("head", "group") for segment in linear.columns)
            width = self.geometry.at(layer).head_dim if heads else 1
            self.inputs[name] = InputStatistics(inputs.shape[-1], width, inputs.device)
        self.inputs[name].add_(inputs, real)

    def on_gradient(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Take in a weight's gradient; that of the mean loss over all processes is the weighted sum of theirs."""
        if processes.count() > 1:
            processes.sum_(gradient.mul_(self.share))
        layer, rest = self._split(name)
        tensors = {part.name: part for part in self.rows_by_layer[layer].expert_tensors}
        if rest in tensors:
            self.experts.on_gradient(layer, tensors[rest], weight, gradient)
        elif layer in self.layers:
            self._add(name, weight, gradient)

    def finished(self, layer: int, tensors: Mapping[str, Tensor]) -> ScoredLayer:
        """Return a layer whose evidence is complete."""
        if layer not in self.layers:
            return ScoredLayer(index=layer, scores={}, expert_scores={}, tensors=tensors, inputs={}, products={})
        inputs = {name: self.inputs[name] for name in tensors if name in self.inputs}
        for statistics in inputs.values():
            statistics.join_()
        for linear in self.rows_by_layer[layer].linears:
            name = f"{self.architecture.layer_path(layer)}.{linear.path}.weight"
            self._add(name, tensors[name], None)
        prefix = f"{self.architecture.layer_path(layer)}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        scores = {
            criterion: {
                space.name: self._random(layer, number, space)
                if rule.importance is None
                else self.sums.pop((criterion, layer, space.name)).cpu()
                for number, space in enumerate(self.rows_by_layer[layer].linear_spaces)
            }
            for criterion, rule in self.rows.items()
        }
        for name in inputs:
            del self.inputs[name]
        expert_scores = self.experts.scores(layer, own)
        return ScoredLayer(
            index=layer,
            scores=scores,
            expert_scores=expert_scores,
            tensors=tensors,
            inputs=inputs,
            products={} if self.gatherer is None else self.gatherer.taken(layer),
        )

    def _add(self, name: str, weight: Tensor, gradient: Tensor | None) -> None:
        """Add a weight's importance, (out_features, in_features), to its units' scores.

        With a gradient that is done for all criteria that read it, and without one for all others.
        """
        layer, linear = self._place(name)
        for criterion, rule in self.rows.items():
            if rule.importance is None or (rule.reads == "gradient") != (gradient is not None):
                continue
            for axis, segments in enumerate(linear.sides):
                if (rule.consumers and axis == 0) or all(segment.space is None for segment in segments):
                    continue
                lines = _importance_by_line(rule, weight, gradient, self.inputs.get(name), axis)
                if not torch.isfinite(lines).all():
                    raise UserError(
                        f"{self.name}: the {criterion} importance of {name} is not finite; is the model sound?"
                    )
                self._add_lines(criterion, layer, segments, lines)

    def _add_lines(self, criterion: str, layer: int, segments: Sequence[Segment], lines: Tensor) -> None:
        """Add up the importance of rows or columns by unit, segment by segment.

        Example: o_proj's 576 columns (9 heads of 64) in 3 groups -> the sums over the 192 columns of each group.
        """
        geometry = self.geometry.at(layer)
        sizes = [geometry.size([segment]) for segment in segments]
        for segment, part in zip(segments, torch.split(lines, sizes), strict=True):
            if segment.space is not None:
                added = part.view(-1, geometry.unit_size(segment.unit)).sum(1)  # (units,)
                key = (criterion, layer, segment.space.name)
                self.sums[key] = added + self.sums[key] if key in self.sums else added

    def _place(self, name: str) -> tuple[int, Linear]:
        """Return the layer and the linear that a weight (`model.layers.3.mlp.up_proj.weight`) belongs to."""
        layer, rest = self._split(name)
        return layer, self.rows_by_layer[layer].linear(rest.removesuffix(".weight"))

    def _split(self, name: str) -> tuple[int, str]:
        """Return the layer that a tensor is in, and its name inside that."""
        place = self.architecture.split(name)
        assert place is not None
        return place

    def _random(self, layer: int, number: int, space: Space) -> Tensor:
        """Uniform scores that depend on seed, layer and space alone, not on which other layers are scored."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer * 101 + number)
        return torch.rand(self.geometry.at(layer).units(space), generator=generator, dtype=torch.float64)


def _importance_by_line(
    rule: Criterion, weight: Tensor, gradient: Tensor | None, inputs: InputStatistics | None, axis: int
) -> Tensor:
    """Return a weight's importance, summed over the other axis, in float64: (out_features,) or (in_features,).

    The importance of single elements is worked out some rows at a time.
    """
    assert rule.importance is not None
    if rule.by_input:
        return rule.importance(Evidence(weight=weight, inputs=inputs))
    step, parts = max(1, _BLOCK_ELEMENTS // weight.shape[1]), []
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        part = None if gradient is None else gradient[rows]
        elements = rule.importance(Evidence(weight=weight[rows].float(), gradient=part, inputs=inputs))
        parts.append(elements.sum(1 - axis).double())
    return torch.cat(parts) if axis == 0 else torch.stack(parts).sum(0)
