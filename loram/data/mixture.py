"""Several data sets as one mixture: which rows of each are in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, concatenate_datasets

from loram.base.errors import UserError
from loram.data.spec import Kind, WeightedSpec
from loram.data.tokens import Tokens, load_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The tokenised rows of several data sets.

    Args:
        sources: the tokens of each data set, all of them.
        shares: the indices of the rows of each data set that are in the mixture, as `draw` returns them.
    """

    sources: Sequence[Tokens]
    shares: Sequence[Sequence[int]]

    @cached_property
    def rows(self) -> Dataset:
        """The rows of the mixture, in the order of the data sets; what lies on disk stays there."""
        parts = [
            tokens.rows if len(share) == len(tokens.rows) else tokens.rows.select(share, keep_in_memory=True)
            for tokens, share in zip(self.sources, self.shares, strict=True)
        ]
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def load_mixture(
    specs: Sequence[WeightedSpec],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    vocabulary: int,
    seed: int,
    now: datetime | None = None,
    kinds: Sequence[Kind] = ("text",),
) -> Mixture:
    """Read and tokenise data sets, and choose the rows of their mixture.

    Args:
        specs: the data sets, with their weights.
        tokenizer, max_length, vocabulary, now, kinds: as in `loram.data.tokens.load_tokens`.
        seed: the seed of the draw.

    Raises:
        UserError: as in `loram.data.tokens.load_tokens` and `draw`.
    """
    sources = [load_tokens(spec, tokenizer, max_length, vocabulary=vocabulary, now=now, kinds=kinds) for spec in specs]
    shares = draw([len(tokens.rows) for tokens in sources], [spec.weight for spec in specs], seed)
    return Mixture(sources=sources, shares=shares)


def draw(lengths: Sequence[int], weights: Sequence[float | None], seed: int) -> list[Sequence[int]]:
    """Choose the rows of a mixture.

    Without weights, the mixture has all rows of all sources. With weights, each source gives its share of the rows,
    drawn without repetition, and the mixture is as large as possible: one source gives all its rows.

    Example: lengths (10, 90) and weights (0.5, 0.5) choose all rows of the first source and 10 of the second.

    Args:
        lengths: how many rows each source has.
        weights: the weight of each source, or None for all of them.
        seed: the seed of the draw.

    Returns:
        The indices of the rows of each source that are chosen, in ascending order.

    Raises:
        UserError: some sources have a weight and some have none.
    """
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return [range(length) for length in lengths]
    if len(shares) < len(weights):
        raise UserError("weights: give every data set a weight (FILE=0.7), or none of them")
    size = min(length / share for length, share in zip(lengths, shares, strict=True))
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Sequence[int]] = []
    for length, share in zip(lengths, shares, strict=True):
        count = min(length, max(1, round(size * share)))
        chosen.append(torch.randperm(length, generator=generator)[:count].sort().values.tolist())
    return chosen
