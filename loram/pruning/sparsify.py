"""Which weights of a linear stay, and what they become: small pure functions, a linear at a time."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from loram.model.sparsity import kept_values, n_of_m
from loram.pruning.criteria import Evidence, InputStatistics, magnitude, wanda

BLOCK_COLUMNS, DAMPING = 128, 0.01
_BLOCK_ELEMENTS = 1 << 23

# What a sparse criterion reads of the inputs: nothing, their norms, or how they go together.
READS: Mapping[str, str | None] = MappingProxyType(
    {"sparsegpt": "hessian", "wanda": "norms", "magnitude": None, "random": None}
)


class Hessian:
    """The sum of x xᵀ over a linear's inputs, (features, features) float32."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(features, features, device=device)

    def add_(self, inputs: Tensor, real: Tensor) -> None:
        """Take in one micro-batch: inputs (rows, width, features), and where they are not padding, (rows, width)."""
        x = inputs[real].float()
        self.total.addmm_(x.T, x)
        self.count += len(x)


Inputs = Hessian | InputStatistics


def sparsify(
    weight: Tensor, inputs: Inputs | None, *, criterion: str, pattern: str, ratio: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Prune one linear.

    Exactly `loram.model.sparsity.kept_values` weights stay. With n:m, exactly n of every m neighbouring inputs of an
    output. Unstructured: `magnitude` and `random` compare all weights of the linear; `wanda` those of each output, as
    its paper does, each keeping the count divided by the outputs, rounded down, and the first outputs one more until
    the count is reached; `sparsegpt` those of each block of 128 inputs, the first c inputs together keeping
    ceil(outputs * c * (1 - ratio)). Of equal importances the earlier stays.

    Args:
        weight: (out_features, in_features) float32.
        inputs: what the criterion reads of them: `READS`.
        criterion: a key of `READS`.
        pattern, ratio: see `loram.model.sparsity`.
        generator: of the random criterion.

    Returns:
        The new weight, zero where pruned, and where it stays: (out_features, in_features), float32 and bool.
    """
    if criterion == "sparsegpt":
        assert isinstance(inputs, Hessian)
        return sparsegpt(weight, inputs.total, pattern=pattern, ratio=ratio)
    if criterion == "random":
        importance = torch.rand(weight.shape, generator=generator).to(weight.device)
    else:
        assert inputs is None or isinstance(inputs, InputStatistics)
        importance = (wanda if criterion == "wanda" else magnitude)(Evidence(weight=weight, inputs=inputs))
    kept = _kept(importance, pattern, ratio, by_row=criterion == "wanda")
    return weight * kept, kept


def _kept(importance: Tensor, pattern: str, ratio: float, *, by_row: bool) -> Tensor:
    """Where the most important weights are, (rows, columns) bool."""
    rows, columns = importance.shape
    if (group := n_of_m(pattern)) is not None:
        return _best_of_rows(importance.view(-1, group[1]), torch.tensor(group[0])).view(rows, columns)
    count = kept_values(rows, columns, pattern, ratio)
    if not by_row:
        return best(importance.flatten(), count).view(rows, columns)
    each, more = divmod(count, rows)
    return _best_of_rows(importance, each + (torch.arange(rows) < more).long())


def best(importance: Tensor, count: int) -> Tensor:
    """Where the `count` highest of a vector are, as bool; of equal ones the first."""
    if not 0 < count < len(importance):
        return torch.full_like(importance, count > 0, dtype=torch.bool)
    threshold = importance.kthvalue(len(importance) - count + 1).values
    kept = importance > threshold
    equal = (importance == threshold).nonzero()[: count - int(kept.sum()), 0]
    return kept.index_fill_(0, equal, True)


def _best_of_rows(importance: Tensor, counts: Tensor) -> Tensor:
    """Where each row's highest are, as bool; `counts` is one for all rows, or one a row. Of equals the first."""
    counts, kept = counts.to(importance.device).expand(len(importance)), []
    step = max(1, _BLOCK_ELEMENTS // importance.shape[1])
    for start in range(0, len(importance), step):
        part = importance[start : start + step]
        order = part.argsort(dim=1, descending=True, stable=True)
        places = torch.arange(part.shape[1], device=part.device) < counts[start : start + step, None]
        kept.append(torch.zeros_like(part, dtype=torch.bool).scatter_(1, order, places))
    return torch.cat(kept)


def sparsegpt(weight: Tensor, hessian: Tensor, *, pattern: str, ratio: float) -> tuple[Tensor, Tensor]:
    """Prune, and let the weights that stay make up for those that go (SparseGPT, arXiv 2301.00774, algorithm 1).

    Columns are visited from the first to the last. What a pruned weight leaves undone is shared out over the columns
    not yet visited, by the inverse Hessian's Cholesky factor; in a block at once, beyond it when the block is done. A
    weight's importance is w² / d² with d its column's diagonal entry of that factor, as updated so far: at the start of
    its block of 128 columns where unstructured, at the start of its group of m in n:m.

    Args:
        weight: (out_features, in_features).
        hessian: (in_features, in_features), the sum of x xᵀ over the inputs; its scale makes no difference. 1% of its
            mean diagonal is added to the diagonal; an input that never was anything but zero loses its weights' values.
        pattern, ratio: see `loram.model.sparsity`.

    Returns:
        As `sparsify`, in the weight's dtype.
    """
    weight, factor = weight.clone(), _inverse_factor(hessian)
    weight[:, hessian.diagonal() == 0] = 0
    rows, columns = weight.shape
    group, kept = n_of_m(pattern), torch.ones_like(weight, dtype=torch.bool)
    width = BLOCK_COLUMNS if group is None else max(1, BLOCK_COLUMNS // group[1]) * group[1]
    so_far = 0
    for first in range(0, columns, width):
        block = slice(first, min(first + width, columns))
        part, square = weight[:, block].clone(), factor[block, block]
        importance = square.diagonal() ** -2.0
        if group is None:
            count = kept_values(rows, block.stop, pattern, ratio) - so_far
            chosen = best((part**2 * importance).flatten(), count).view_as(part)
            so_far += count
        else:
            chosen = torch.ones_like(part, dtype=torch.bool)
        errors = torch.empty_like(part)
        for column in range(part.shape[1]):
            if group is not None and column % group[1] == 0:
                here = slice(column, column + group[1])
                chosen[:, here] = _best_of_rows(part[:, here] ** 2 * importance[here], torch.tensor(group[0]))
            errors[:, column] = part[:, column] * ~chosen[:, column] / square[column, column]
            part[:, column] *= chosen[:, column]
            part[:, column + 1 :] -= errors[:, column, None] * square[column, column + 1 :]
        weight[:, block], kept[:, block] = part, chosen
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return weight, kept


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse: column by column, the inverses of what is left."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
