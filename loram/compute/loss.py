"""Cross entropy that never holds the logits of all tokens, with an adapter on lm_head in it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from loram.data.batches import IGNORED

CHUNK_TOKENS = 512


def chunked_cross_entropy(
    hidden: Tensor, labels: Tensor, head: nn.Module, *, softcap: float | None = None, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum over the tokens in the loss of -log p(token), in nats; the logits of a chunk of tokens live at a time.

    `head` is called as a module, so that an adapter on it takes part and gets its exact gradient; the fused losses of
    TRL and Liger read its weight and pass the adapter by. Backward works the logits of each chunk out again.

    Args:
        hidden: (rows, width, hidden size), what lm_head reads.
        labels: (rows, width) int64; the token at each place, -100 where it is not in the loss.
        head: lm_head.
        softcap: of families that squash their logits (Gemma 2): softcap * tanh(logits / softcap).
        chunk_tokens: how many tokens' logits are held at a time.

    Returns:
        A float32 scalar.
    """

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, reduction="sum")

    targets = labels[:, 1:]
    wanted = targets != IGNORED
    return chunked_loss(
        hidden[:, :-1][wanted], head, [targets[wanted]], loss_of, softcap=softcap, chunk_tokens=chunk_tokens
    )


def chunked_loss(
    states: Tensor,
    head: nn.Module,
    targets: Sequence[Tensor],
    loss_of: Callable[..., Tensor],
    *,
    softcap: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Sum of a loss over places; the logits of a chunk of them live at a time, and backward works them out again.

    Args:
        states: (places, hidden size), what lm_head reads.
        head: lm_head, called as a module.
        targets: what the loss needs beside the logits: tensors whose first dimension is that of the places.
        loss_of: (logits (chunk, vocabulary) float32, chunk of each target) -> the chunk's summed loss.
        softcap: of families that squash their logits (Gemma 2): softcap * tanh(logits / softcap).
        chunk_tokens: how many places' logits are held at a time.

    Returns:
        A float32 scalar.
    """

    def part(states: Tensor, *targets: Tensor) -> Tensor:
        return loss_of(squashed(head(states).float(), softcap), *targets)

    total = states.new_zeros((), dtype=torch.float32)
    for pieces in zip(*(tensor.split(chunk_tokens) for tensor in (states, *targets)), strict=True):
        total = total + checkpoint(part, *pieces, use_reentrant=False)
    return total


def squashed(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits of a family with or without a soft cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def causal_loss(
    model: Any,
    *args: Any,
    labels: Tensor,
    count: Tensor | int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    **inputs: Any,
) -> Tensor:
    """The cross entropy above of a causal language model, over `count` tokens, or over those in the loss.

    Args:
        model: whose `model` gives the hidden states and whose `lm_head` reads them.
        labels, chunk_tokens: as above.
        count: what the sum is divided by; of several micro-batches, the tokens in the loss of all.
        args, inputs: of the model's forward.
    """
    hidden = model.model(*args, **{**inputs, "use_cache": False}).last_hidden_state
    softcap = getattr(model.config, "final_logit_softcapping", None)
    total = chunked_cross_entropy(hidden, labels, model.lm_head, softcap=softcap, chunk_tokens=chunk_tokens)
    return total / (count if count is not None else (labels[:, 1:] != IGNORED).sum())


def use_chunked_loss_(model: Any, chunk_tokens: int = CHUNK_TOKENS) -> None:
    """Make a causal language model answer labels with the loss above, and no logits; without labels nothing changes.

    The loss is worked out inside the model's own forward, so whatever is wrapped around the model (PEFT, data
    parallelism, a compiler) stays in play.
    """
    plain = model.forward

    def forward(
        *args: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> Any:
        if labels is None:
            return plain(*args, **inputs)
        loss = causal_loss(model, *args, labels=labels, count=num_items_in_batch, chunk_tokens=chunk_tokens, **inputs)
        return CausalLMOutput(loss=loss)

    model.forward = forward
