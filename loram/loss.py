"""Cross entropy that never holds the logits of all tokens, with an adapter on lm_head in it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from loram.model.batches import IGNORED

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

    def loss_of(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return cross_entropy(logits, targets, reduction="sum")

    targets = labels[:, 1:]
    wanted = targets != IGNORED
    states, targets = hidden[:, :-1][wanted], targets[wanted]
    total = hidden.new_zeros((), dtype=torch.float32)
    for states_part, targets_part in zip(states.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        total = total + checkpoint(loss_of, states_part, targets_part, use_reentrant=False)
    return total


def use_chunked_loss_(model: Any, chunk_tokens: int = CHUNK_TOKENS) -> None:
    """Make a causal language model answer labels with the loss above, and no logits; without labels nothing changes.

    The loss is worked out inside the model's own forward, so whatever is wrapped around the model (PEFT, data
    parallelism, a compiler) stays in play.
    """
    plain, softcap = model.forward, getattr(model.config, "final_logit_softcapping", None)

    def forward(
        *args: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> Any:
        if labels is None:
            return plain(*args, **inputs)
        hidden = model.model(*args, **{**inputs, "use_cache": False}).last_hidden_state
        total = chunked_cross_entropy(hidden, labels, model.lm_head, softcap=softcap, chunk_tokens=chunk_tokens)
        count = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != IGNORED).sum()
        return CausalLMOutput(loss=total / count)

    model.forward = forward
