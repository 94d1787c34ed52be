"""How far a student is from its teacher, a chunk of tokens at a time; and the Trainer that makes it less."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from loram.alignment.judge import Judge, Milestones
from loram.compute.device import allocate_
from loram.compute.loss import apply_softcap, chunked_loss
from loram.data.batches import IGNORED
from loram.trainer.arguments import checkpoints_activations


def cross_entropy(logits: Tensor, next_ids: Tensor) -> Tensor:
    """Summed -log q(next token), in nats."""
    return (logits.logsumexp(1) - logits.gather(1, next_ids[:, None])[:, 0]).sum()


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Summed KL(p || q) of the teacher's p and the student's q, in nats: sum of p (log p - log q)."""
    log_p = teacher_logits - teacher_logits.logsumexp(1, keepdim=True)
    log_q = logits - logits.logsumexp(1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum()


def top_k_divergence(logits: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor) -> Tensor:
    """As `divergence`, of a teacher known by its likeliest tokens: all others count as one.

    Lumping tokens together never makes the divergence larger (data processing inequality), and nothing is lost where
    k is the whole vocabulary.

    Args:
        logits: (places, vocabulary) of the student.
        ids, log_probs, log_rest: of the teacher, as `loram.alignment.teacher.TeacherRow` has them.
    """
    total = logits.logsumexp(1, keepdim=True)
    log_p, log_q = log_probs, logits.gather(1, ids) - total
    if ids.shape[1] < logits.shape[1]:
        others = logits.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True) - total
        log_p, log_q = torch.cat([log_p, log_rest[:, None]], 1), torch.cat([log_q, others], 1)
    log_p = log_p - log_p.logsumexp(1, keepdim=True)  # they were stored in 16 bits
    return (log_p.exp() * (log_p - log_q)).sum()


class AlignTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the student's loss: (1 - clm_weight) · divergence + clm_weight · cross entropy.

    Args:
        clm_weight: 0 imitates the teacher alone, 1 learns the text alone.
        teacher: a live teacher, in memory; None where the rows hold what it predicts, or where it is not needed.
        judge: who evaluates; None to keep what comes out.
    """

    def __init__(
        self, *args: Any, clm_weight: float, teacher: Any = None, judge: Judge | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.clm_weight, self.teacher, self.judge = clm_weight, teacher, judge
        self.add_callback(Milestones(self, judge))

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Probe the student."""
        assert self.judge is not None
        found = self.judge.judge(self)
        allocate_(self.args.device, lean=checkpoints_activations(self.args))  # probes may have streamed
        self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The mean loss of a micro-batch, or its share of the accumulated batch's mean where that has been counted."""
        following = inputs["labels"][:, 1:]
        wanted = following != IGNORED
        student = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            states = _states(model, student.model, inputs)[:, :-1][wanted]
            total = self._loss(states, student, following[wanted], inputs, wanted)
        if num_items_in_batch is None:
            return total / wanted.sum()
        if self.args.average_tokens_across_devices:  # gradients are averaged over processes, but the count is of all
            total = total * self.accelerator.num_processes
        return total / num_items_in_batch

    def _loss(self, states: Tensor, student: Any, next_ids: Tensor, inputs: dict[str, Any], wanted: Tensor) -> Tensor:
        softcap = getattr(student.config, "final_logit_softcapping", None)
        targets = [] if self.clm_weight == 1 else self._taught(inputs, wanted)
        distance = top_k_divergence if self.teacher is None else self._live_divergence

        def loss_of(logits: Tensor, next_ids: Tensor, *targets: Tensor) -> Tensor:
            loss = logits.new_zeros(())
            if self.clm_weight > 0:
                loss = loss + self.clm_weight * cross_entropy(logits, next_ids)
            if self.clm_weight < 1:
                loss = loss + (1 - self.clm_weight) * distance(logits, *targets)
            return loss

        return chunked_loss(states, student.lm_head, [next_ids, *targets], loss_of, softcap=softcap)

    def _taught(self, inputs: dict[str, Any], wanted: Tensor) -> list[Tensor]:
        """What the rows hold of a teacher's predictions, or what a live teacher's lm_head reads."""
        if self.teacher is None:
            return [inputs[f"teacher_{name}"][:, :-1][wanted] for name in ("ids", "log_probs", "log_rest")]
        with torch.no_grad():
            rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return [self.teacher.model(**rest, use_cache=False).last_hidden_state[:, :-1][wanted]]

    def _live_divergence(self, logits: Tensor, states: Tensor) -> Tensor:
        with torch.no_grad():
            softcap = getattr(self.teacher.config, "final_logit_softcapping", None)
            teacher_logits = apply_softcap(self.teacher.lm_head(states).float(), softcap)
        return divergence(logits, teacher_logits)


def _states(model: Any, inner: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What lm_head reads, by the (wrapped) model's own forward, through which several processes work as one.

    One token's logits are made there and dropped.
    """
    seen: list[Tensor] = []
    hook = inner.register_forward_hook(lambda _, args, output: seen.append(output.last_hidden_state))
    try:
        model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        hook.remove()
    return seen[0]
