"""Scores of experts and of their channels: from the tokens that a router sends to each, weights, and gradients."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loram.base import processes
from loram.base.errors import UserError
from loram.disk.checkpoint import Checkpoint
from loram.model.architecture import Architecture
from loram.model.geometry import Geometry
from loram.model.segments import Parameter, Space
from loram.pruning.criteria import CRITERIA, EXPERT_CRITERIA, ExpertRules
from loram.pruning.evidence import Evidence


class ExpertStatistics:
    """Sums over the calibration text for each expert of a layer, gathered one micro-batch at a time.

    Args:
        experts: the number of experts.
        device: the device that holds the sums.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self.tokens: Tensor = torch.zeros(experts, dtype=torch.float64, device=device)  # sent to each expert
        self.outputs: Tensor = torch.zeros_like(self.tokens)  # the summed gate value × norm of the expert's output

    def add_(self, module: nn.Module, hidden: Tensor, experts: Tensor, weights: Tensor, real: Tensor) -> None:
        """Add one micro-batch: the experts' outputs are computed once more, with one expert per token at a time.

        Args:
            module: the module that holds all experts; it is called without its hooks.
            hidden: the hidden states that it reads, (tokens, hidden).
            experts: the numbers of each token's experts, (tokens, k).
            weights: the gate values that their outputs are multiplied by, (tokens, k).
            real: (tokens,) bool, False where padded.
        """
        hidden, experts, weights = hidden[real], experts[real], weights[real]
        run: Any = module.forward
        for place in range(experts.shape[1]):
            expert, weight = experts[:, place], weights[:, place]
            output = run(hidden, expert[:, None], torch.ones_like(weight)[:, None])  # (tokens, hidden)
            norms = torch.linalg.vector_norm(output.double(), dim=-1) * weight.double()
            self.outputs.index_add_(0, expert, norms)
            self.tokens.index_add_(0, expert, torch.ones_like(norms))

    def join_(self) -> None:
        """Take in what the other processes have gathered, where several share the text."""
        processes.sum_(self.tokens)
        processes.sum_(self.outputs)

    @property
    def mean_output(self) -> Tensor:
        """The mean over an expert's tokens of gate value × norm of its output, (experts,); 0 where it has no token."""
        return self.outputs / self.tokens.clamp(min=1)


class ExpertTally:
    """Gathers what scores of experts need, layer by layer.

    Args:
        checkpoint: the full model.
        layers: the layers to score.
        rules: how they are scored.
        seed: the seed of random scores.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Collection[int], rules: ExpertRules, seed: int) -> None:
        self.geometry, self.name, self.rows = checkpoint.geometry, checkpoint.name, checkpoint.rows_by_layer
        self.layers, self.rules, self.seed = frozenset(layers), rules, seed
        self._outputs: dict[int, ExpertStatistics] = {}
        self._gradients: dict[tuple[int, str], Tensor] = {}  # (layer, space) -> sums of |w·g|

    def observe(
        self, layer: int, module: nn.Module, hidden: Tensor, experts: Tensor, weights: Tensor, real: Tensor
    ) -> None:
        """Take in what a layer's experts make of one micro-batch; arguments as for `ExpertStatistics.add_`."""
        if layer in self.layers:
            if layer not in self._outputs:
                assert self.geometry.num_experts is not None
                self._outputs[layer] = ExpertStatistics(self.geometry.num_experts, hidden.device)
            self._outputs[layer].add_(module, hidden, experts, weights, real)

    def on_gradient(self, layer: int, part: Parameter, weight: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of a tensor that holds experts."""
        row = self.rows[layer]
        for space, rule in self._rules(row):
            if layer in self.layers and rule == "taylor":
                added = _importance("taylor", self.geometry, part, space, weight, gradient)
                self._gradients[layer, space.name] = self._gradients.get((layer, space.name), 0) + added

    def scores(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's scores by the space's name, (units,) float64.

        Args:
            layer: its index.
            tensors: its tensors by their names inside the layer.

        Raises:
            UserError: a score is not finite.
        """
        row, scores = self.rows[layer], dict[str, Tensor]()
        for number, (space, rule) in enumerate(self._rules(row)):
            scores[space.name] = self._score(layer, number, space, rule, tensors).cpu()
            if not torch.isfinite(scores[space.name]).all():
                raise UserError(
                    f"{self.name}: the {rule} importance of {space.name} of layer {layer} is not finite; is the model "
                    "sound?"
                )
        return scores

    def _rules(self, row: Architecture) -> Iterator[tuple[Space, str]]:
        """Yield (space, its criterion) of what is scored in a layer."""
        for space in row.spaces if row.experts is not None else ():
            rule = self.rules.experts if space.within is None else self.rules.channels
            if space not in row.linear_spaces and rule is not None:
                yield space, rule

    def _score(self, layer: int, number: int, space: Space, rule: str, tensors: Mapping[str, Tensor]) -> Tensor:
        row = self.rows[layer]
        if rule == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer * 101 + 50 + number)
            return torch.rand(self.geometry.units(space), generator=generator, dtype=torch.float64)
        if rule == "taylor":
            return self._gradients.pop((layer, space.name))
        if space.within is not None:
            parts = row.expert_tensors
            scores = [_importance(rule, self.geometry, part, space, tensors[part.name]) for part in parts]
            return torch.stack(scores).sum(0)
        assert row.experts is not None
        if (by_outputs := EXPERT_CRITERIA[rule].by_outputs) is not None:
            statistics = self._outputs.pop(layer)
            statistics.join_()
            return by_outputs(statistics)
        norms: Tensor = torch.linalg.vector_norm(tensors[row.experts.router].double(), dim=1)
        return norms


def _importance(
    criterion: str,
    geometry: Geometry,
    part: Parameter,
    space: Space,
    weight: Tensor,
    gradient: Tensor | None = None,
) -> Tensor:
    """Return the importance of each unit of a space in a tensor that holds experts, (units,) float64.

    Args:
        criterion: a key of `CRITERIA`.
        geometry: the model's sizes.
        part: what the tensor is.
        space: the experts, or their channels.
        weight, gradient: the tensor and its gradient.
    """
    importance, outer = CRITERIA[criterion].importance, space.within or space
    assert importance is not None
    axis_of = {axis[0].space: number for number, axis in enumerate(part.axes)}
    segments = part.axes[axis_of[space]] if space in axis_of else ()
    units: list[Tensor] = []
    for expert in range(weight.shape[axis_of[outer]]):
        own = weight.select(axis_of[outer], expert)
        slope = None if gradient is None else gradient.select(axis_of[outer], expert)
        elements = importance(Evidence(weight=own.float(), gradient=slope)).double()
        if space is outer:
            units.append(elements.sum().view(1))
            continue
        channels = torch.zeros(geometry.per_unit(space), dtype=torch.float64, device=weight.device)
        if segments:
            axis = axis_of[space] - (axis_of[space] > axis_of[outer])  # one dimension is gone
            lines = elements.movedim(axis, 0).flatten(1).sum(1) if elements.ndim > 1 else elements
            sizes = [geometry.size([segment]) for segment in segments]
            for segment, lines_of_segment in zip(segments, torch.split(lines, sizes), strict=True):
                channels += lines_of_segment.view(-1, geometry.unit_size(segment.unit)).sum(1)
        units.append(channels)
    return torch.cat(units)
