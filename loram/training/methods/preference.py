"""Preference tuning: DPO, ORPO and KTO, under TRL's names. The model with its adapter off is the reference."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat

from loram.base import processes
from loram.base.errors import UserError
from loram.base.options import Options, option
from loram.training.methods.method import Method
from loram.training.methods.pair_losses import PAIR_LOSSES, SMOOTHED, Answers, Pairs, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from loram.training.options import TrainOptions

    Batch = Mapping[str, Tensor]
    # (token ids, attention mask, labels), each (rows, width) -> the log-probabilities of the labels, (rows, width - 1)
    # float32, 0 where there is none
    Model = Callable[[Tensor, Tensor, Tensor], Tensor]

_KTO_LOSSES = ("kto", "apo_zero_unpaired")


class PreferenceOptions(Options):
    """The options of preference tuning, under TRL's names; what they are for is said in each."""

    beta: PositiveFloat = option(
        0.1,
        "Preference tuning: how strongly the reference holds the model; with orpo, the weight of the odds ratio.",
        also="pref_beta rl_beta orpo_alpha",
    )
    loss_type: list[str] | str | None = option(
        None,
        f"The loss of dpo: {', '.join(PAIR_LOSSES)} (default: sigmoid); or of kto: {', '.join(_KTO_LOSSES)} (default: "
        "kto). The losses of dpo may be several, which are added.",
        also="pref_loss",
    )
    loss_weights: list[float] | None = option(None, "With dpo: the weight of each loss_type (default: 1 each).")
    label_smoothing: float = option(
        0.0,
        f"With dpo and {', '.join(SMOOTHED)}: the probability that a preference is the wrong way round.",
        also="dpo_label_smoothing",
        ge=0,
        lt=0.5,
    )
    discopop_tau: PositiveFloat = option(0.05, "With dpo and discopop: the temperature of the mixture.")
    desirable_weight: PositiveFloat = option(
        1.0, "With kto: the weight of answers whose label is true.", also="kto_desirable_weight kto_chosen_weight"
    )
    undesirable_weight: PositiveFloat = option(
        1.0, "With kto: the weight of those whose label is false.", also="kto_undesirable_weight kto_rejected_weight"
    )


@dataclass(frozen=True, kw_only=True)
class Preference(Method, ABC):
    """LoRA that learns from preferences.

    Args:
        reads: the options of `PreferenceOptions` that belong to the method.
    """

    section: str | None = "preference"
    options: type[Options] | None = PreferenceOptions
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"lora_dropout": 0.0})
    trainer: Mapping[str, Any] = field(default_factory=lambda: {"learning_rate": 1e-5})
    continues: bool = True
    planned: bool = True
    reads: tuple[str, ...] = ()

    def check(self, options: "TrainOptions", lora: Mapping[str, Any]) -> None:
        """Also refuse options of another of these methods, and what works on one text per row or on its loss."""
        super().check(options, lora)
        own = self.own_options(options)
        assert isinstance(own, PreferenceOptions)
        default = PreferenceOptions()
        changed = (name for name in PreferenceOptions.model_fields if getattr(own, name) != getattr(default, name))
        if others := [name for name in changed if name not in self.reads]:
            raise UserError(f"preference: {others[0]} has no use with method {self.name}; leave it out")
        for key in ("packing", "padding_free"):
            if options.trainer.get(key):
                raise UserError(f"trainer: {key} puts rows together, and {self.name} compares them; leave it out")
        if options.trainer.get("router_aux_loss_coef"):
            raise UserError(f"trainer: router_aux_loss_coef is not added to the loss of {self.name}; leave it out")

    @abstractmethod
    def loss(
        self, batch: "Batch", policy: "Model", reference: "Model", own: PreferenceOptions
    ) -> tuple["Tensor", dict[str, "Tensor"]]:
        """Return the loss of a batch, a scalar, and what is logged beside it, each a scalar, under TRL's names.

        Args:
            batch: `input_ids`, `attention_mask` and `labels`, (rows, width), where of pairs the first half are the
                chosen answers; of answers with a label also `desirable`, (rows,), and the same three tensors of
                mismatched answers under names that begin with `kl_`.
            policy: the model with its adapter.
            reference: the model without it, or with that which the training began with; without gradients. It is to be
                called before what `policy` gives is differentiated.
            own: the method's options.
        """


@dataclass(frozen=True, kw_only=True)
class Dpo(Preference):
    """Direct preference optimisation (arXiv 2305.18290) and its variants."""

    def check(self, options: "TrainOptions", lora: Mapping[str, Any]) -> None:
        """Also refuse unknown losses, weights that do not belong to them, and smoothing where it does not work."""
        super().check(options, lora)
        own = self.own_options(options)
        assert isinstance(own, PreferenceOptions)
        losses = _losses(own)
        if unknown := [name for name in losses if name not in PAIR_LOSSES]:
            raise _unknown(unknown[0], self.name, PAIR_LOSSES)
        if own.loss_weights is not None and len(own.loss_weights) != len(losses):
            raise UserError(
                f"preference: loss_weights has {len(own.loss_weights)} numbers, and loss_type {len(losses)} losses; "
                "give one for each"
            )
        if own.label_smoothing and not set(losses) & set(SMOOTHED):
            raise UserError(f"preference: label_smoothing is for loss_type {', '.join(SMOOTHED)}; leave it out")
        if "exo_pair" in losses and not own.label_smoothing:
            raise UserError("preference: loss_type exo_pair needs label_smoothing above 0; its paper takes 1e-3")
        if own.discopop_tau != PreferenceOptions().discopop_tau and "discopop" not in losses:
            raise UserError("preference: discopop_tau is for loss_type discopop; leave it out")

    def loss(
        self, batch: "Batch", policy: "Model", reference: "Model", own: PreferenceOptions
    ) -> tuple["Tensor", dict[str, "Tensor"]]:
        """Return the weighted sum of the chosen losses' means."""
        rows = batch["input_ids"], batch["attention_mask"], batch["labels"]
        before, now = reference(*rows).sum(1), policy(*rows).sum(1)
        tokens = (batch["labels"] >= 0).sum(1)
        parts = zip(now.chunk(2), before.chunk(2), tokens.chunk(2), strict=True)
        chosen, rejected = (Answers(log_prob=now, reference=before, tokens=count) for now, before, count in parts)
        pairs = Pairs(
            chosen=chosen, rejected=rejected, beta=own.beta, smoothing=own.label_smoothing, tau=own.discopop_tau
        )
        losses = _losses(own)
        weights = own.loss_weights or [1.0] * len(losses)
        summed = sum(weight * PAIR_LOSSES[name](pairs).mean() for name, weight in zip(losses, weights, strict=True))
        rewards = own.beta * chosen.ratio.detach(), own.beta * rejected.ratio.detach()
        assert not isinstance(summed, int)
        return summed, _of_pairs(*rewards, chosen.log_prob, rejected.log_prob)


@dataclass(frozen=True, kw_only=True)
class Orpo(Preference):
    """Odds ratio preference optimisation (arXiv 2403.07691), which has no reference."""

    def loss(
        self, batch: "Batch", policy: "Model", reference: "Model", own: PreferenceOptions
    ) -> tuple["Tensor", dict[str, "Tensor"]]:
        """Return equation 6: the cross entropy of chosen rows, prompt and answer, and β times that of the odds ratio.

        The likelihood of an answer is that of its tokens on average.
        """
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        pairs = len(ids) // 2
        every = ids.masked_fill(mask == 0, -100)
        every[pairs:] = labels[pairs:]
        log_probs = policy(ids, mask, every)
        entropy = -log_probs[:pairs].sum() / (every[:pairs, 1:] >= 0).sum()
        answer = labels[:, 1:] >= 0
        chosen, rejected = ((log_probs * answer).sum(1) / answer.sum(1)).chunk(2)
        odds = chosen - rejected - (_log_of_rest(chosen) - _log_of_rest(rejected))
        ratio = log_sigmoid(odds).mean()
        figures = _of_pairs(own.beta * chosen.detach(), own.beta * rejected.detach(), chosen, rejected)
        figures |= {"nll_loss": entropy, "log_odds_ratio": ratio, "log_odds_chosen": odds.mean()}
        return entropy - own.beta * ratio, figures


@dataclass(frozen=True, kw_only=True)
class Kto(Preference):
    """Kahneman-Tversky optimisation (arXiv 2402.01306), which learns from single answers with a label."""

    def check(self, options: "TrainOptions", lora: Mapping[str, Any]) -> None:
        """Also refuse unknown losses, and micro-batches of one row, whose mismatched answer is its own."""
        super().check(options, lora)
        own = self.own_options(options)
        assert isinstance(own, PreferenceOptions)
        losses = _losses(own, "kto")
        if len(losses) != 1 or losses[0] not in _KTO_LOSSES:
            raise _unknown(", ".join(losses), self.name, _KTO_LOSSES)
        if losses[0] == "kto" and options.trainer.get("per_device_train_batch_size") == 1:
            raise UserError(
                "trainer: per_device_train_batch_size 1: kto compares each row with another of its micro-batch; take 2 "
                "or more, or loss_type apo_zero_unpaired"
            )

    def loss(
        self, batch: "Batch", policy: "Model", reference: "Model", own: PreferenceOptions
    ) -> tuple["Tensor", dict[str, "Tensor"]]:
        """Return equation 7; with apo_zero_unpaired the same without the divergence (arXiv 2408.06266)."""
        from torch import where

        rows = batch["input_ids"], batch["attention_mask"], batch["labels"]
        before = reference(*rows).sum(1)
        divergence = before.new_zeros(())
        if _losses(own, "kto") == ["kto"]:
            divergence = _divergence(batch, policy, reference)
        now, good = policy(*rows).sum(1), batch["desirable"]
        shift = now - before - divergence
        weight = where(good, own.desirable_weight, own.undesirable_weight)
        losses = weight * (1 - (own.beta * where(good, shift, -shift)).sigmoid())
        rewards = own.beta * (now - before).detach()
        return losses.mean(), {**_figures(rewards[good], rewards[~good], now[good], now[~good]), "kl": divergence}


DPO = Dpo(
    name="dpo",
    summary="LoRA, to prefer one answer to another (arXiv 2305.18290)",
    learns="pairs",
    forward_passes=1,
    reads=("beta", "loss_type", "loss_weights", "label_smoothing", "discopop_tau"),
)
ORPO = Orpo(
    name="orpo",
    summary="LoRA, to write the chosen answer and not the other (arXiv 2403.07691)",
    learns="pairs",
    reads=("beta",),
)
KTO = Kto(
    name="kto",
    summary="LoRA, from answers that are good or bad (arXiv 2402.01306)",
    learns="labels",
    forward_passes=3,
    reads=("beta", "loss_type", "desirable_weight", "undesirable_weight"),
)


def _divergence(batch: "Batch", policy: "Model", reference: "Model") -> "Tensor":
    """Estimate how far the model is from the reference: the mean log-ratio of mismatched answers, 0 if it is below."""
    from torch import no_grad

    rows = batch["kl_input_ids"], batch["kl_attention_mask"], batch["kl_labels"]
    with no_grad():
        mean = (policy(*rows).sum(1) - reference(*rows).sum(1)).mean()
    everywhere = processes.gather(mean.item())
    return mean.new_tensor(max(0.0, sum(everywhere) / len(everywhere)))


def _figures(chosen: "Tensor", rejected: "Tensor", log_chosen: "Tensor", log_rejected: "Tensor") -> dict[str, "Tensor"]:
    """Return the means of rewards and log-probabilities under TRL's names; those of no answers are left out."""
    values = {"chosen": (chosen, log_chosen), "rejected": (rejected, log_rejected)}
    parts = {name: part for name, part in values.items() if len(part[0])}
    figures = {f"rewards/{name}": rewards.mean() for name, (rewards, _) in parts.items()}
    figures |= {f"logps/{name}": log_probs.detach().mean() for name, (_, log_probs) in parts.items()}
    if len(parts) == 2:
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    return figures


def _of_pairs(chosen: "Tensor", rejected: "Tensor", *log_probs: "Tensor") -> dict[str, "Tensor"]:
    """Return the same of pairs, and how many of the chosen answers have the higher reward."""
    return {**_figures(chosen, rejected, *log_probs), "rewards/accuracies": (chosen > rejected).float().mean()}


def _losses(own: PreferenceOptions, default: str = "sigmoid") -> Sequence[str]:
    """Return the names of the losses."""
    chosen = own.loss_type or default
    return [chosen] if isinstance(chosen, str) else chosen


def _unknown(name: str, method: str, known: Any) -> UserError:
    return UserError(f"preference: loss_type {name!r} is not known with method {method}; known are {', '.join(known)}")


def _log_of_rest(values: "Tensor") -> "Tensor":
    """Return log(1 - exp(x)) of each log-probability x."""
    return (-values.expm1()).log()
