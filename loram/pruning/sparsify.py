"""Sparse pruning of one linear: small pure functions that choose the weights that stay, and their new values."""

import torch
from torch import Tensor

from loram.model.sparsity import kept_values, n_of_m
from loram.pruning.criteria import SPARSE
from loram.pruning.evidence import Evidence, Hessian, Inputs, InputStatistics

BLOCK_COLUMNS, DAMPING = 128, 0.01  # the block size and the dampening of the SparseGPT paper
_BLOCK_ELEMENTS = 1 << 23  # how many elements are sorted at a time


def sparsify(
    weight: Tensor, inputs: Inputs | None, *, criterion: str, pattern: str, ratio: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Prune one linear.

    Exactly `loram.model.sparsity.kept_values` weights stay. An n:m pattern keeps exactly n of every m neighbouring
    inputs of each output. The unstructured pattern depends on the criterion:

    - `magnitude` and `random` compare all weights of the linear.
    - `wanda` compares the weights of each output, as its paper does. Every output keeps the same number, rounded down,
      and the first outputs keep one more until the total is reached.
    - `sparsegpt` compares the weights of each block of 128 inputs. The first c inputs together keep
      ceil(outputs * c * (1 - ratio)) weights.

    If two weights are equally important, the earlier one stays.

    Args:
        weight: (out_features, in_features) float32.
        inputs: the statistics of the inputs that the criterion reads.
        criterion: a key of `SPARSE`.
        pattern, ratio: the sparse pattern; see `loram.model.sparsity`.
        generator: the random generator of the random criterion.

    Returns:
        (the new weight, zero where pruned; a mask that is True where a weight stays), both (out_features, in_features),
        float32 and bool.
    """
    row = SPARSE[criterion]
    if row.reads == "hessian":
        assert isinstance(inputs, Hessian)
        return sparsegpt(weight, inputs.total, pattern=pattern, ratio=ratio)
    if row.importance is None:
        importance = torch.rand(weight.shape, generator=generator).to(weight.device)
    else:
        assert inputs is None or isinstance(inputs, InputStatistics)
        importance = row.importance(Evidence(weight=weight, inputs=inputs))
    kept = _kept(importance, pattern, ratio, by_row=row.by_row)
    return weight * kept, kept


def _kept(importance: Tensor, pattern: str, ratio: float, *, by_row: bool) -> Tensor:
    """Mark the most important weights, (rows, columns) bool."""
    rows, columns = importance.shape
    if (group := n_of_m(pattern)) is not None:
        n, m = group
        return _best_of_rows(importance.view(-1, m), torch.tensor(n)).view(rows, columns)
    count = kept_values(rows, columns, pattern, ratio)
    if not by_row:
        return best(importance.flatten(), count).view(rows, columns)
    per_row, rest = divmod(count, rows)
    return _best_of_rows(importance, per_row + (torch.arange(rows) < rest).long())


def best(importance: Tensor, count: int) -> Tensor:
    """Mark the `count` highest values of a vector, as bool; of equal values the first ones."""
    if not 0 < count < len(importance):
        return torch.full_like(importance, count > 0, dtype=torch.bool)
    threshold = importance.kthvalue(len(importance) - count + 1).values
    kept = importance > threshold
    equal = (importance == threshold).nonzero()[: count - int(kept.sum()), 0]
    return kept.index_fill_(0, equal, True)


def _best_of_rows(importance: Tensor, counts: Tensor) -> Tensor:
    """Mark the highest values of each row, as bool; of equal values the first ones.

    Args:
        importance: (rows, columns).
        counts: how many values to mark: a scalar for all rows, or (rows,).
    """
    counts, kept = counts.to(importance.device).expand(len(importance)), []
    step = max(1, _BLOCK_ELEMENTS // importance.shape[1])
    for start in range(0, len(importance), step):
        part = importance[start : start + step]
        order = part.argsort(dim=1, descending=True, stable=True)
        places = torch.arange(part.shape[1], device=part.device) < counts[start : start + step, None]
        kept.append(torch.zeros_like(part, dtype=torch.bool).scatter_(1, order, places))
    return torch.cat(kept)


def sparsegpt(weight: Tensor, hessian: Tensor, *, pattern: str, ratio: float) -> tuple[Tensor, Tensor]:
    """Prune weights, and update the others to make up for them (SparseGPT, arXiv 2301.00774, algorithm 1).

    The columns (inputs) are visited from the first to the last. The error that a pruned weight causes is distributed
    over the columns that have not been visited yet, through the Cholesky factor of the inverse Hessian: at once within
    a block, and after the block for the columns beyond it.

    The importance of a weight is w² / d², where w is its updated value and d the diagonal entry of the Cholesky factor
    for its column. It is computed at the start of a block of 128 columns for the unstructured pattern, and at the start
    of a group of m columns for n:m.

    Args:
        weight: (out_features, in_features).
        hessian: (in_features, in_features), the sum of x xᵀ over the inputs; its scale makes no difference. 1% of the
            mean of its diagonal is added to the diagonal. If an input was always zero, its weights become zero.
        pattern, ratio: the sparse pattern; see `loram.model.sparsity`.

    Returns:
        As in `sparsify`, in the dtype of `weight`.
    """
    weight, factor = weight.clone(), _inverse_factor(hessian)
    weight[:, hessian.diagonal() == 0] = 0
    rows, columns = weight.shape
    group, kept = n_of_m(pattern), torch.ones_like(weight, dtype=torch.bool)
    width = BLOCK_COLUMNS if group is None else max(1, BLOCK_COLUMNS // group[1]) * group[1]
    kept_so_far = 0
    for first in range(0, columns, width):
        block = slice(first, min(first + width, columns))
        part, square = weight[:, block].clone(), factor[block, block]
        importance = square.diagonal() ** -2.0
        if group is None:
            count = kept_values(rows, block.stop, pattern, ratio) - kept_so_far
            chosen = best((part**2 * importance).flatten(), count).view_as(part)
            kept_so_far += count
        else:
            chosen = torch.ones_like(part, dtype=torch.bool)
        errors = torch.empty_like(part)  # (out_features, columns of the block)
        for column in range(part.shape[1]):
            if group is not None and column % group[1] == 0:
                columns_of_group = slice(column, column + group[1])
                importances = part[:, columns_of_group] ** 2 * importance[columns_of_group]
                chosen[:, columns_of_group] = _best_of_rows(importances, torch.tensor(group[0]))
            errors[:, column] = part[:, column] * ~chosen[:, column] / square[column, column]
            part[:, column] *= chosen[:, column]
            part[:, column + 1 :] -= errors[:, column, None] * square[column, column + 1 :]
        weight[:, block], kept[:, block] = part, chosen
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return weight, kept


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, (in_features, in_features).

    Its row i gives the update of the columns from i on, once the columns before i are fixed.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
