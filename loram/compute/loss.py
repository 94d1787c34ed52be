"""Cross entropy that never holds the logits of all tokens, and that includes an adapter on lm_head.

The fused losses of TRL and Liger read the weight of lm_head and so ignore an adapter on it. Here lm_head is called as a
module, so an adapter takes part and gets its exact gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import ModelOutput

from loram.base.constants import CHUNK_TOKENS
from loram.compute.logits import LogitRule
from loram.data.batches import IGNORED
from loram.model.families import family_of

PLAIN = LogitRule()  # logits are what the head gives


@dataclass
class LogProbs(ModelOutput):
    """What a model returns after `use_log_probs_`: log-probabilities of tokens, (rows, width - 1) float32."""

    log_probs: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Balance:
    """A loss that grows where routers send many tokens to few experts (arXiv 2101.03961, equations 4 to 6).

    Args:
        coefficient: what it is multiplied by before it is added to the cross entropy.
        chosen: the number of experts that a token goes to.
    """

    coefficient: float
    chosen: int

    def of(self, logits: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Return the loss, the mean over the layers with experts, times its coefficient: a float32 scalar.

        Args:
            logits: what the router of each of these layers gives, (tokens, experts); layers may have unlike numbers.
            mask: which tokens are text, (rows, width); None if all are.
        """
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        losses = (load_balancing_loss_func((layer,), layer.shape[-1], self.chosen, mask) for layer in logits)
        return self.coefficient * cast(Tensor, sum(losses)) / len(logits)


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    *,
    rule: LogitRule = PLAIN,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Compute the sum of -log p(token) over the tokens in the loss, in nats; see `chunked_loss`.

    Args:
        hidden: (rows, width, hidden size), the inputs of lm_head.
        labels: (rows, width) int64; the token at each position, -100 where it is not in the loss.
        head: lm_head.
        rule: how logits follow from what lm_head gives.
        chunk_tokens: for how many tokens the logits are held at a time.

    Returns:
        A float32 scalar.
    """

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, reduction="sum")

    targets = labels[:, 1:]
    wanted = targets != IGNORED  # (rows, width - 1)
    return chunked_loss(hidden[:, :-1][wanted], head, [targets[wanted]], loss_of, rule=rule, chunk_tokens=chunk_tokens)


def chunked_loss(
    states: Tensor,
    head: nn.Module,
    targets: Sequence[Tensor],
    loss_of: Callable[..., Tensor],
    *,
    rule: LogitRule = PLAIN,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Sum a loss over positions, chunk by chunk.

    Only the logits of one chunk exist at a time; the backward pass computes them again.

    Args:
        states: (positions, hidden size), the inputs of lm_head.
        head: lm_head, which is called as a module.
        targets: what the loss reads beside the logits: tensors whose first dimension is `positions`.
        loss_of: a function of the logits, (chunk, vocabulary) float32, and the chunk of each target; it returns the
            summed loss of the chunk.
        rule: how logits follow from what lm_head gives.
        chunk_tokens: for how many positions the logits are held at a time.

    Returns:
        A float32 scalar.
    """

    def loss_of_chunk(states: Tensor, *targets: Tensor) -> Tensor:
        return loss_of(rule(head(states).float()), *targets)

    total = states.new_zeros((), dtype=torch.float32)
    for chunk in zip(*(tensor.split(chunk_tokens) for tensor in (states, *targets)), strict=True):
        total = total + checkpoint(loss_of_chunk, *chunk, use_reentrant=False)
    return total


def chunked_log_probs(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    *,
    rule: LogitRule = PLAIN,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Compute log p(token) of the tokens in `labels`, in nats, chunk by chunk as in `chunked_loss`.

    Args:
        hidden, labels, head, rule, chunk_tokens: as in `chunked_cross_entropy`.

    Returns:
        (rows, width - 1) float32, 0 where the next token is not in `labels`.
    """

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        return -cross_entropy(rule(head(states).float()), targets, reduction="none")

    targets = labels[:, 1:]
    wanted = targets != IGNORED  # (rows, width - 1)
    chunks = zip(hidden[:, :-1][wanted].split(chunk_tokens), targets[wanted].split(chunk_tokens), strict=True)
    values = torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])
    return values.new_zeros(wanted.shape).masked_scatter(wanted, values)


def causal_loss(
    model: PreTrainedModel,
    *args: Any,
    labels: Tensor,
    count: Tensor | int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    balance: Balance | None = None,
    **inputs: Any,
) -> Tensor:
    """Compute the mean cross entropy of a causal language model in nats per token, by `chunked_cross_entropy`.

    Args:
        model: a causal language model of a supported family.
        labels: (rows, width) int64; the token at each position, -100 where it is not in the loss.
        count: the number that the sum is divided by (default: the number of tokens in the loss). If a step has several
            micro-batches, this is the number of tokens in the loss of all of them.
        chunk_tokens: for how many tokens the logits are held at a time.
        balance: what a mixture of experts adds to the loss. With `count`, each micro-batch adds its share.
        args: further positional arguments of the model's forward pass.
        inputs: further keyword arguments of the model's forward pass.

    Returns:
        A float32 scalar.
    """
    decoder, head, rule = parts_of(model)
    routed = {} if balance is None else {"output_router_logits": True}
    outputs = decoder(*args, **{**inputs, **routed, "use_cache": False})
    hidden = outputs.last_hidden_state  # (rows, width, hidden size)
    total = chunked_cross_entropy(hidden, labels, head, rule=rule, chunk_tokens=chunk_tokens)
    predicted = (labels[:, 1:] != IGNORED).sum()
    if balance is not None:
        total = total + predicted * balance.of(outputs.router_logits, inputs.get("attention_mask"))
    return total / (predicted if count is None else count)


def parts_of(model: PreTrainedModel) -> tuple[nn.Module, nn.Module, LogitRule]:
    """Return (the decoder, the head, how logits follow from what the head gives) of a causal language model.

    Raises:
        UserError: the model is of no supported family.
    """
    row = family_of({"model_type": model.config.model_type})
    return model.get_submodule(row.decoder), model.get_submodule(row.head), LogitRule.of(row, vars(model.config))


def use_chunked_loss_(model: PreTrainedModel, chunk_tokens: int = CHUNK_TOKENS, balance: Balance | None = None) -> None:
    """Make a causal language model return `causal_loss`, and no logits, whenever it is called with labels.

    Calls without labels do not change. The loss is computed inside the model's own forward pass, so it also works in a
    model that is wrapped by PEFT, by data parallelism or by a compiler.

    Args:
        model: a causal language model of transformers.
        chunk_tokens: for how many tokens the logits are held at a time.
        balance: what a mixture of experts adds to the loss.
    """
    plain_forward = model.forward

    def forward(
        *args: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> Any:
        if labels is None:
            return plain_forward(*args, **inputs)
        loss = causal_loss(
            model,
            *args,
            labels=labels,
            count=num_items_in_batch,
            chunk_tokens=chunk_tokens,
            balance=balance,
            **inputs,
        )
        return CausalLMOutput(loss=loss)

    model.forward = forward


def use_log_probs_(model: PreTrainedModel) -> None:
    """Make a causal language model return `LogProbs`, and no logits, whenever it is called with labels.

    As `use_chunked_loss_`, for losses that compare whole rows.
    """
    plain_forward = model.forward

    def forward(*args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return plain_forward(*args, **inputs)
        decoder, head, rule = parts_of(model)
        hidden = decoder(*args, **{**inputs, "use_cache": False}).last_hidden_state  # (rows, width, hidden size)
        return LogProbs(log_probs=chunked_log_probs(hidden, labels, head, rule=rule))

    model.forward = forward
