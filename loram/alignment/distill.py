"""The loss of alignment, which brings a student closer to its teacher, and the Trainer that minimises it.

The student is the pruned model, and the teacher is the full model. The loss is computed on one chunk of tokens at a
time, so the logits of all tokens never exist together.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from loram.alignment.judge import Judge, Milestones
from loram.compute.device import allocate_
from loram.compute.loss import chunked_loss, parts_of
from loram.data.batches import IGNORED
from loram.trainer.adapted import plain_model
from loram.trainer.arguments import checkpoints_activations


def cross_entropy(logits: Tensor, next_ids: Tensor) -> Tensor:
    """Sum -log q(next token) over positions, in nats.

    Args:
        logits: (positions, vocabulary), the student's.
        next_ids: (positions,) int64.
    """
    return (logits.logsumexp(1) - logits.gather(1, next_ids[:, None])[:, 0]).sum()


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Sum KL(p || q) = Σ p (log p - log q) over positions, in nats, for the teacher's p and the student's q.

    Args:
        logits: (positions, vocabulary), the student's.
        teacher_logits: (positions, vocabulary), the teacher's.
    """
    log_p = teacher_logits - teacher_logits.logsumexp(1, keepdim=True)
    log_q = logits - logits.logsumexp(1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum()


def top_k_divergence(logits: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor) -> Tensor:
    """Sum the divergence from a teacher of which only the likeliest tokens are known; all others count as one token.

    Merging tokens never makes the divergence larger (data processing inequality). If k is the whole vocabulary, this
    equals `divergence`.

    Args:
        logits: (positions, vocabulary), the student's.
        ids: (positions, k) int64, the teacher's likeliest tokens.
        log_probs: (positions, k), their log-probabilities in nats.
        log_rest: (positions,), the log of the probability of all other tokens.
    """
    total = logits.logsumexp(1, keepdim=True)
    log_p, log_q = log_probs, logits.gather(1, ids) - total
    if ids.shape[1] < logits.shape[1]:
        others = logits.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True) - total
        log_p, log_q = torch.cat([log_p, log_rest[:, None]], 1), torch.cat([log_q, others], 1)
    log_p = log_p - log_p.logsumexp(1, keepdim=True)  # stored in 16 bits, the probabilities do not add up to exactly 1
    return (log_p.exp() * (log_p - log_q)).sum()


class AlignTrainer(Trainer):
    """transformers' Trainer with the loss (1 - clm_weight) · divergence + clm_weight · cross entropy.

    Args:
        clm_weight: the weight of the cross entropy: with 0 the student only imitates the teacher, with 1 it only learns
            the text.
        teacher: a teacher in memory; None if the rows hold its predictions, or if it is not needed.
        judge: evaluates the student; None keeps the weights of the last step.
        args, options: those of transformers' Trainer.
    """

    def __init__(
        self,
        *args: Any,
        clm_weight: float,
        teacher: PreTrainedModel | None = None,
        judge: Judge | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.clm_weight, self.teacher, self.judge = clm_weight, teacher, judge
        self.add_callback(Milestones(self, judge))

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Probe the student; see `loram.alignment.probe`."""
        assert self.judge is not None
        losses = self.judge.judge(self)
        allocate_(self.args.device, lean=checkpoints_activations(self.args))  # streaming sets the allocator differently
        self.callback_handler.on_evaluate(self.args, self.state, self.control, losses)
        return losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the mean loss of a micro-batch, or its part of the mean over `num_items_in_batch` tokens."""
        next_labels = inputs["labels"][:, 1:]
        wanted = next_labels != IGNORED  # (rows, width - 1)
        student = plain_model(self.accelerator.unwrap_model(model))
        with self.accelerator.autocast():
            states = _hidden_states(model, parts_of(student)[0], inputs)[:, :-1][wanted]  # (positions, hidden size)
            total = self._loss(states, student, next_labels[wanted], inputs, wanted)
        if num_items_in_batch is None:
            return total / wanted.sum()
        if self.args.average_tokens_across_devices:  # the count is of all processes, but gradients are averaged
            total = total * self.accelerator.num_processes
        return total / num_items_in_batch

    def _loss(
        self,
        states: Tensor,
        student: PreTrainedModel,
        next_ids: Tensor,
        inputs: dict[str, Tensor | Any],
        wanted: Tensor,
    ) -> Tensor:
        _, head, rule = parts_of(student)
        targets = [] if self.clm_weight == 1 else self._teacher_targets(inputs, wanted)
        distance = top_k_divergence if self.teacher is None else self._live_divergence

        def loss_of(logits: Tensor, next_ids: Tensor, *targets: Tensor) -> Tensor:
            loss = logits.new_zeros(())
            if self.clm_weight > 0:
                loss = loss + self.clm_weight * cross_entropy(logits, next_ids)
            if self.clm_weight < 1:
                loss = loss + (1 - self.clm_weight) * distance(logits, *targets)
            return loss

        return chunked_loss(states, head, [next_ids, *targets], loss_of, rule=rule)

    def _teacher_targets(self, inputs: dict[str, Tensor | Any], wanted: Tensor) -> list[Tensor]:
        """Return the teacher's cached predictions, or the inputs of the lm_head of a teacher in memory."""
        if self.teacher is None:
            return [inputs[f"teacher_{name}"][:, :-1][wanted] for name in ("ids", "log_probs", "log_rest")]
        decoder, _, _ = parts_of(self.teacher)
        with torch.no_grad():
            outputs = decoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            return [outputs.last_hidden_state[:, :-1][wanted]]

    def _live_divergence(self, logits: Tensor, states: Tensor) -> Tensor:
        """Sum the divergence from the teacher in memory, whose lm_head reads `states`."""
        assert self.teacher is not None
        with torch.no_grad():
            _, head, rule = parts_of(self.teacher)
            teacher_logits = rule(head(states).float())
        return divergence(logits, teacher_logits)


def _hidden_states(model: nn.Module, decoder: nn.Module, inputs: dict[str, Tensor | Any]) -> Tensor:
    """Return what `decoder` gives to lm_head, (rows, width, hidden size), from a forward pass of the wrapped model.

    The wrapper must run, because it connects the processes that train together. It computes the logits of one token per
    row, which are not used.
    """
    states: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda _, args, output: states.append(output.last_hidden_state))
    try:
        model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        hook.remove()
    return states[0]
