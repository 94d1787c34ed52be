"""Which layers are dropped as a whole: those that change their input least, or random ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from loram.base import processes
from loram.base.errors import UserError


class Influence:
    """The block influence of decoder layers (ShortGPT, arXiv 2403.03853), gathered in a forward pass.

    It is the mean over all tokens of 1 - cosine(x, y), where x is the layer's input and y its output.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # float64 scalars
        self._tokens: dict[int, int] = {}

    def observe(self, layer: int, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Add one micro-batch.

        Args:
            layer: the layer's index.
            inputs, outputs: (rows, width, hidden).
            real: (rows, width) bool, False where padded.
        """
        change = 1 - cosine_similarity(inputs[real].double(), outputs[real].double(), dim=-1)  # (tokens,)
        self._sums[layer] = change.sum() + self._sums.get(layer, 0)
        self._tokens[layer] = len(change) + self._tokens.get(layer, 0)

    def scores(self) -> dict[int, float]:
        """Return the influence of each layer that was observed: 0 where its output is its input, 2 at most.

        Where several processes share the text, all of them have to call this.
        """
        sums = {layer: float(total) for layer, total in self._sums.items()}
        shares = processes.gather((sums, self._tokens))
        return {layer: sum(s[layer] for s, _ in shares) / sum(n[layer] for _, n in shares) for layer in sums}

    def least(self, layers: Sequence[int], count: int) -> tuple[int, ...]:
        """Return the `count` layers with the least influence among some, sorted; of equal ones the later layers.

        Raises:
            UserError: an influence is not finite.
        """
        scores = self.scores()
        for layer in layers:
            if not math.isfinite(scores[layer]):
                raise UserError(f"the influence of layer {layer} is not finite; is the model sound?")
        return tuple(sorted(sorted(layers, key=lambda layer: (scores[layer], -layer))[:count]))


def random_layers(layers: Sequence[int], count: int, seed: int) -> tuple[int, ...]:
    """Return `count` random layers, sorted, which depend on the seed alone."""
    order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(layers[place] for place in order[:count].tolist()))
