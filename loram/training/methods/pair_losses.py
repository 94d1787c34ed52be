"""The losses of DPO as a table, under TRL's names. It imports nothing heavy, since the table of methods reads it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What is known of some answers, one per prompt; all tensors are (pairs,) float32.

    Args:
        log_prob: the sum of the log-probabilities of an answer's tokens, under the model with its adapter.
        reference: the same under the reference model.
        tokens: how many tokens an answer has.
    """

    log_prob: "Tensor"
    reference: "Tensor"
    tokens: "Tensor"

    @property
    def ratio(self) -> "Tensor":
        """Return log(π(y|x) / π_ref(y|x))."""
        return self.log_prob - self.reference


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Some pairs of answers, and the numbers that losses of pairs read; see `PreferenceOptions`."""

    chosen: Answers
    rejected: Answers
    beta: float
    smoothing: float
    tau: float

    @property
    def margin(self) -> "Tensor":
        """Return β (log-ratio of the chosen answer - log-ratio of the rejected one)."""
        return self.beta * (self.chosen.ratio - self.rejected.ratio)


def log_sigmoid(values: "Tensor") -> "Tensor":
    """Return log(1 / (1 + exp(-x))) of each value."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def _sigmoid(pairs: Pairs) -> "Tensor":
    """Return the loss of DPO (arXiv 2305.18290, equation 7)."""
    return -log_sigmoid(pairs.margin)


def _hinge(pairs: Pairs) -> "Tensor":
    """Return that of SLiC-HF (arXiv 2305.10425)."""
    return (1 - pairs.margin).relu()


def _ipo(pairs: Pairs) -> "Tensor":
    """Return that of IPO (arXiv 2310.12036, equation 17), with log-ratios per token, as its authors use them."""
    return (_margin_per_token(pairs) - 1 / (2 * pairs.beta)).square()


def _exo_pair(pairs: Pairs) -> "Tensor":
    """Return that of EXO (arXiv 2402.00856, equation 16): how far the choice between two answers is from (1 - ε, ε)."""
    better, worse = log_sigmoid(pairs.margin), log_sigmoid(-pairs.margin)
    above, below = math.log1p(-pairs.smoothing), math.log(pairs.smoothing)
    return better.exp() * (better - above) + worse.exp() * (worse - below)


def _nca_pair(pairs: Pairs) -> "Tensor":
    """Return that of NCA (arXiv 2402.05369)."""
    chosen, rejected = pairs.beta * pairs.chosen.ratio, pairs.beta * pairs.rejected.ratio
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def _robust(pairs: Pairs) -> "Tensor":
    """Return that of robust DPO (arXiv 2403.00409), where a share of the preferences is the wrong way round."""
    flipped = pairs.smoothing * log_sigmoid(-pairs.margin)
    return (flipped - (1 - pairs.smoothing) * log_sigmoid(pairs.margin)) / (1 - 2 * pairs.smoothing)


def _bco_pair(pairs: Pairs) -> "Tensor":
    """Return that of BCO (arXiv 2404.04656), without its shift."""
    return -log_sigmoid(pairs.beta * pairs.chosen.ratio) - log_sigmoid(-pairs.beta * pairs.rejected.ratio)


def _sppo_hard(pairs: Pairs) -> "Tensor":
    """Return that of SPPO (arXiv 2405.00675, equation 4.7), where the chosen answer wins with probability 1."""
    half = 0.5 / pairs.beta
    return (pairs.chosen.ratio - half).square() + (pairs.rejected.ratio + half).square()


def _aot(pairs: Pairs) -> "Tensor":
    """Return that of AOT (arXiv 2406.05882), which compares the answers of a batch in order of their log-ratios."""
    model = (pairs.chosen.log_prob - pairs.rejected.log_prob).sort().values
    reference = (pairs.chosen.reference - pairs.rejected.reference).sort().values
    return _smoothed(pairs, model - reference)


def _aot_unpaired(pairs: Pairs) -> "Tensor":
    """Return the same where prompts differ."""
    return _smoothed(pairs, pairs.chosen.ratio.sort().values - pairs.rejected.ratio.sort().values)


def _apo_zero(pairs: Pairs) -> "Tensor":
    """Return that of APO-zero (arXiv 2408.06266, equation 7): chosen answers become likelier, rejected ones less."""
    return 1 - (pairs.beta * pairs.chosen.ratio).sigmoid() + (pairs.beta * pairs.rejected.ratio).sigmoid()


def _apo_down(pairs: Pairs) -> "Tensor":
    """Return that of APO-down (the same, equation 8): both become less likely, rejected ones more so."""
    return (pairs.beta * pairs.chosen.ratio).sigmoid() + 1 - pairs.margin.sigmoid()


def _discopop(pairs: Pairs) -> "Tensor":
    """Return that of DiscoPOP (arXiv 2406.08414, equation 5)."""
    share = (pairs.margin / pairs.tau).sigmoid()
    return -log_sigmoid(pairs.margin) * (1 - share) + (-pairs.margin).exp() * share


def _sft(pairs: Pairs) -> "Tensor":
    """Return the mean cross entropy of the chosen answers' tokens, once per pair."""
    mean = -pairs.chosen.log_prob.sum() / pairs.chosen.tokens.sum()
    return mean.expand(len(pairs.chosen.tokens))


def _sigmoid_norm(pairs: Pairs) -> "Tensor":
    """Return the loss of DPO with log-ratios per token, as in Tülu 3 (arXiv 2411.15124)."""
    return -log_sigmoid(pairs.beta * _margin_per_token(pairs))


def _margin_per_token(pairs: Pairs) -> "Tensor":
    return pairs.chosen.ratio / pairs.chosen.tokens - pairs.rejected.ratio / pairs.rejected.tokens


def _smoothed(pairs: Pairs, delta: "Tensor") -> "Tensor":
    scaled = pairs.beta * delta
    return -(1 - pairs.smoothing) * log_sigmoid(scaled) - pairs.smoothing * log_sigmoid(-scaled)


PAIR_LOSSES: Mapping[str, Callable[[Pairs], "Tensor"]] = MappingProxyType(
    {
        "sigmoid": _sigmoid,
        "hinge": _hinge,
        "ipo": _ipo,
        "exo_pair": _exo_pair,
        "nca_pair": _nca_pair,
        "robust": _robust,
        "bco_pair": _bco_pair,
        "sppo_hard": _sppo_hard,
        "aot": _aot,
        "aot_unpaired": _aot_unpaired,
        "apo_zero": _apo_zero,
        "apo_down": _apo_down,
        "discopop": _discopop,
        "sft": _sft,
        "sigmoid_norm": _sigmoid_norm,
    }
)
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # those that read `smoothing`
