"""Refit at pruning: output projections fitted anew to what the full model's gave, and a bypass for what they cannot.

All is linear least squares on the full model's own activations. So it needs their products alone, which are gathered
while the calibration text passes a layer, and solved in float64 while the layer is in memory.

Shapes: an output projection (o_proj, down_proj) has the weight W, (hidden, features), and reads h, (tokens, features);
its block (attention, MLP) reads x, (tokens, hidden).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from loram.base import processes
from loram.base.constants import HELD_TOKENS
from loram.data.batches import Batch
from loram.model.architecture import Architecture
from loram.model.plan import BYPASS_IN, BYPASS_OUT, PruningPlan
from loram.model.segments import Linear

logger = logging.getLogger(__name__)

DAMPINGS = (0.02, 0.1, 0.5)  # those that are tried on the held-out tokens; what lies between makes little difference
DAMPING = 0.1  # where there are none
HELD_OUT = 4  # every fourth row is held out, and fewer of them where that is more than HELD_TOKENS
_SAMPLED_OUTPUTS = 128  # about so many outputs decide
_LEAST_RIDGE = 1e-30  # so that a block which reads nothing but zeros keeps its weights
_STRIPES = 8  # a symmetric product is made in so many stripes of rows, each up to the diagonal: 0.56 of the arithmetic


class Products:
    """Sums of products of what an output projection and its block read, in float32, and a few held-out rows of both.

    Args:
        features: the in_features of the output projection.
        hidden: the hidden size where there will be a bypass, else 0.
        held_every: one row of so many is held out; 0 holds none out.
        device: where the sums are.
    """

    def __init__(self, features: int, hidden: int, held_every: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, device=device)
        self.inputs: Tensor = zeros(features, features)  # hᵀh
        self.across: Tensor = zeros(hidden, features)  # xᵀh
        self.block: Tensor = zeros(hidden, hidden)  # xᵀx
        self.held: list[tuple[Tensor, Tensor]] = []  # (h, x) of held-out rows
        self._every, self._rows = held_every, 0

    @torch.no_grad()
    def add_(self, h: Tensor, x: Tensor, real: Tensor) -> None:
        """Add one micro-batch.

        Args:
            h: (rows, width, features).
            x: (rows, width, hidden); (rows, width, 0) where there will be no bypass.
            real: (rows, width) bool, False where padded.
        """
        own = torch.arange(self._rows, self._rows + len(real), device=real.device)
        rows = processes.number() + processes.count() * own  # their places in the whole text
        held = rows % self._every == self._every - 1 if self._every else torch.zeros_like(rows, dtype=torch.bool)
        self._rows += len(real)
        fitted, kept_back = real & ~held[:, None], real & held[:, None]
        self._sum_up_(h[fitted], x[fitted])
        if kept_back.any():
            self.held.append((h[kept_back], x[kept_back]))

    def join_(self) -> None:
        """Take in what the other processes have gathered; held-out rows come to the first process, which refits."""
        for total in (self.inputs, self.across, self.block):
            processes.sum_(total)
        if processes.count() > 1:
            place = self.inputs.device
            held = processes.send_to_first([(h.cpu(), x.cpu()) for h, x in self.held])
            self.held = [(h.to(place), x.to(place)) for pairs in held for h, x in pairs]

    def add_held_(self) -> None:
        """Add the held-out rows to the sums, when they have decided."""
        for pair in self.held:
            self._sum_up_(*pair)
        self.held.clear()

    def _sum_up_(self, h: Tensor, x: Tensor) -> None:
        _add_square_(self.inputs, h)
        self.across.addmm_(x.T, h)
        _add_square_(self.block, x)


def _add_square_(total: Tensor, values: Tensor) -> None:
    """Add vᵀv to a symmetric sum. Stripes of it are computed up to the diagonal, and mirrored."""
    step = max(1, -(-len(total) // _STRIPES))
    for start in range(0, len(total), step):
        stop = start + step
        total[start:stop, :stop].addmm_(values[:, start:stop].T, values[:, :stop])
        total[:start, start:stop] = total[start:stop, :start].T


@dataclass(frozen=True, kw_only=True)
class Refit:
    """A block after the refit.

    Args:
        weight: the output projection's new weight, (hidden, kept features) float64.
        bypass: (bypass_in, bypass_out), (rank, hidden) and (hidden, rank) float64, or None.
        errors: the share of the outputs' squared norm that is missing on the held-out tokens with the old weights, and
            with new ones that were fitted to the other tokens; None where no tokens were held out.
    """

    weight: Tensor
    bypass: tuple[Tensor, Tensor] | None
    errors: tuple[float, float] | None


def refit(products: Products, weight: Tensor, kept: Tensor, rank: int) -> Refit:
    """Fit an output projection anew on the inputs that it keeps, and a bypass to what is left.

    The damping is the one of `DAMPINGS` that does best on the held-out tokens. The fit is then made on all tokens, and
    the bypass is damped alike.

    Args:
        products: what was gathered on the calibration text; its held-out rows are used up.
        weight: the full weight W.
        kept: the columns that stay, sorted.
        rank: the rank of the bypass; 0 is none.
    """
    w, bypass, errors, damping = weight.double(), None, None, DAMPING
    if products.held:
        damping, errors = _best_damping(products, w, kept)
        products.add_held_()
    (fitted,) = solve(products.inputs, w, kept, damping)
    if rank:
        bypass = reduced_rank(products.block, rest_products(products.across, w, kept, fitted), rank, damping)
    return Refit(weight=fitted, bypass=bypass, errors=errors)


def _best_damping(products: Products, weight: Tensor, kept: Tensor) -> tuple[float, tuple[float, float]]:
    """Return the damping that does best on the held-out tokens, and `Refit.errors`, both by a sample of the outputs.

    What is tried is compared in float32, as the tokens are.
    """
    sample = weight[:: max(1, len(weight) // _SAMPLED_OUTPUTS)]
    h = torch.cat([h for h, _ in products.held])
    wanted, read = h @ sample.to(h).T, h[:, kept]

    def missing(fitted: Tensor) -> float:
        return float((wanted - read @ fitted.to(h).T).square().sum() / wanted.square().sum())

    tried = {
        damping: missing(fitted)
        for damping, fitted in zip(DAMPINGS, solve(products.inputs, sample, kept, *DAMPINGS), strict=True)
    }
    best = min(tried, key=tried.__getitem__)
    return best, (missing(sample[:, kept]), tried[best])


def solve(inputs: Tensor, weight: Tensor, kept: Tensor, *dampings: float) -> Iterator[Tensor]:
    """Yield the W' that minimises |h Wᵀ - h_K W'ᵀ|² + λ |W' - W_K|², (hidden, kept features) float64, for each damping.

    Its normal equations are W' (G_KK + λ I) = W G_:K + λ W_K, where G is hᵀh. With the columns R that are removed, they
    say (W' - W_K) (G_KK + λ I) = W_R G_RK, which is less to compute.

    Args:
        inputs: G, (features, features).
        weight: W, (hidden, features) float64.
        kept: the columns K that stay.
        dampings: λ as a share of the mean of the diagonal of G_KK.
    """
    stays = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    stays[kept] = True
    columns = inputs[:, kept]  # (features, kept)
    gram, right = columns[stays].double(), columns[~stays].double().T @ weight[:, ~stays].T
    for damping in dampings:
        yield weight[:, kept] + torch.cholesky_solve(right, _cholesky(gram, damping)).T


def rest_products(across: Tensor, weight: Tensor, kept: Tensor, fitted: Tensor) -> Tensor:
    """Return xᵀR, (hidden, hidden) float64, where the rest R = h Wᵀ - h_K W'ᵀ is what the new weights W' do not give.

    Args:
        across: xᵀh, (hidden, features).
        weight, kept: as for `solve`.
        fitted: W'.
    """
    missing = weight.index_add(1, kept, fitted, alpha=-1)  # h times its transpose is R
    return across.double() @ missing.T


def reduced_rank(block: Tensor, rest: Tensor, rank: int, damping: float) -> tuple[Tensor, Tensor]:
    """Return the factors A (rank, hidden) and B (hidden, rank) that minimise |R - x Aᵀ Bᵀ|² + λ |B A|², in float64.

    This is reduced-rank regression (Izenman 1975). With the Cholesky factor L of xᵀx + λ I, L⁻¹ xᵀR is cut after its
    `rank` largest singular values, and L⁻ᵀ makes coefficients of what is left.

    Args:
        block: xᵀx, (hidden, hidden).
        rest: xᵀR, (hidden, hidden).
        rank: the rank.
        damping: λ as a share of the mean of the diagonal of xᵀx.
    """
    lower = _cholesky(block.double(), damping)
    half = torch.linalg.solve_triangular(lower, rest, upper=False)
    values, vectors = torch.linalg.eigh(half.T @ half)  # squared singular values, upwards
    outputs = vectors[:, -rank:].flip(1)  # (hidden, rank)
    scale = values[-rank:].flip(0).clamp(min=0).sqrt().sqrt()  # shared by both factors, (rank,)
    inputs = torch.linalg.solve_triangular(lower.T, half @ outputs, upper=True)
    safe = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return (inputs / safe).T.contiguous(), outputs * scale


def _cholesky(gram: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of a matrix with a ridge on its diagonal, which is never quite 0."""
    ridged = gram.clone()
    ridged.diagonal().add_((damping * gram.diagonal().mean()).clamp(min=_LEAST_RIDGE))
    lower: Tensor = torch.linalg.cholesky(ridged)
    return lower


def held_every(batches: Sequence[Batch]) -> int:
    """Return which rows of a calibration text are held out: one of so many; 0 where there are too few.

    Args:
        batches: the text, or the share of this process, where all of them call this.
    """
    own = sum(len(batch.rows) for batch in batches), sum(int(batch.real.sum()) for batch in batches)
    rows, tokens = map(sum, zip(*processes.gather(own), strict=True))
    every = max(HELD_OUT, -(-tokens // HELD_TOKENS))
    return every if rows >= every else 0


class Gatherer:
    """Gathers the products of each narrowed layer, while the calibration text passes it.

    Args:
        architecture: the family's row.
        plan: a plan that narrows the layers as the final one will; which units it keeps makes no difference.
        batches: the text, or the share of this process.
    """

    def __init__(self, architecture: Architecture, plan: PruningPlan, batches: Sequence[Batch]) -> None:
        self._architecture, self._held_every, self._bypass = architecture, held_every(batches), bool(plan.bypass_rank)
        self._products: dict[str, Products] = {}  # by the name of the output projection's weight
        self._block_inputs: dict[str, Tensor] = {}  # by the same; (rows, width, hidden) of the micro-batch that passes
        self._outputs: set[str] = set()
        self._readers: dict[str, str] = {}  # weight of the first linear of a block -> that of its output projection
        for layer in plan.layers:
            linears = plan.geometry.layer(architecture, layer).linears
            for output in plan.refitted(layer):
                first = next(linear for linear in linears if linear.block == output.block)
                self._readers[self._name(layer, first)] = name = self._name(layer, output)
                self._outputs.add(name)

    def observe(self, name: str, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Take in what one linear reads of a micro-batch; arguments as for `Stream.forward`."""
        if name in self._readers:
            self._block_inputs[self._readers[name]] = inputs if self._bypass else inputs[..., :0]
        if name in self._outputs:
            x = self._block_inputs.pop(name)
            if name not in self._products:
                self._products[name] = Products(inputs.shape[-1], x.shape[-1], self._held_every, inputs.device)
            self._products[name].add_(inputs, x, real)

    def taken(self, layer: int) -> dict[str, Products]:
        """Return what was gathered of a layer, by the names of weights, and forget it."""
        prefix = f"{self._architecture.layer_path(layer)}."
        taken = {name: self._products.pop(name) for name in list(self._products) if name.startswith(prefix)}
        for products in taken.values():
            products.join_()
        return taken

    def _name(self, layer: int, linear: Linear) -> str:
        return f"{self._architecture.layer_path(layer)}.{linear.path}.weight"


class Refitter:
    """Fits layer after layer anew, and remembers how well that went."""

    def __init__(self) -> None:
        self._errors: list[tuple[float, float]] = []

    def tensors(
        self, layer: int, tensors: Mapping[str, Tensor], products: dict[str, Products], plan: PruningPlan
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the new weights of a layer, in the pruned model's shapes, and the factors of its bypasses.

        Args:
            layer: the layer's index.
            tensors: its weights in the full model, by their full names.
            products: what was gathered, by the names of output projections' weights; emptied, so that whoever still
                holds the layer does not hold them.
            plan: what the layer keeps.
        """
        for linear in plan.refitted(layer):
            path = plan.architecture.layer_path(layer)
            name = f"{path}.{linear.path}.weight"
            kept = plan.kept_elements(layer, linear.columns)
            assert kept is not None
            fit = refit(products.pop(name), tensors[name], kept.to(tensors[name].device), plan.bypass_rank)
            if fit.errors is not None:
                self._errors.append(fit.errors)
            yield name, fit.weight
            if fit.bypass is not None:
                yield f"{path}.{linear.block}.{BYPASS_IN}", fit.bypass[0]
                yield f"{path}.{linear.block}.{BYPASS_OUT}", fit.bypass[1]

    def report(self) -> None:
        """Log how much of the blocks' outputs is missing on the held-out tokens, if there were any."""
        if self._errors:
            before, after = (100 * median(errors) for errors in zip(*self._errors, strict=True))
            logger.info(
                "refit: of what a block gives, %.0f%% is missing after pruning and %.0f%% after the refit (squared "
                "norm on held-out text, median over blocks)",
                before,
                after,
            )
