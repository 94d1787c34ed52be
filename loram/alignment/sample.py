"""Text that a model writes by itself, to align on if the user has none."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loram.base.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH_ROWS = 16


def sample_rows(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", count: int, length: int, seed: int
) -> list[dict[str, list[int]]]:
    """Sample rows from a model's own distribution (temperature 1), each up to an end-of-sequence token or `length`.

    A row begins with the tokenizer's beginning-of-sequence token. If the tokenizer has none, the row begins with a
    token that is drawn uniformly from the vocabulary (LLM-QAT, arXiv 2305.17888, section 3.1).

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        count: how many rows to sample.
        length: the maximal length of a row in tokens, at least 2.
        seed: the seed of all draws; the random state of the process does not change.

    Returns:
        Rows with `input_ids` and `labels`; all tokens are in the loss.
    """
    from transformers import GenerationConfig

    options = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        min_new_tokens=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    generate: Any = model.generate  # Any: PreTrainedModel does not declare what GenerationMixin adds to it
    rows: list[list[int]] = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        for start in track(range(0, count, _BATCH_ROWS), "Sampling"):
            first = _first_tokens(tokenizer, model.config.vocab_size, min(_BATCH_ROWS, count - start)).to(model.device)
            sampled = generate(first, attention_mask=torch.ones_like(first), generation_config=options)
            rows += [_up_to_end(row, tokenizer.eos_token_id) for row in sampled.tolist()]
    return [{"input_ids": row, "labels": row} for row in rows]


def _first_tokens(tokenizer: "PreTrainedTokenizerBase", vocabulary: int, rows: int) -> Tensor:
    """Return the first token of each row, (rows, 1) int64."""
    if tokenizer.bos_token_id is None:
        return torch.randint(vocabulary, (rows, 1))
    return torch.full((rows, 1), tokenizer.bos_token_id)


def _up_to_end(row: list[int], end: int) -> list[int]:
    """Cut a row behind its first end-of-sequence token, but keep two tokens at least, so that one is predicted."""
    stop = row.index(end, 1) + 1 if end in row[1:] else len(row)
    return row[: max(stop, 2)]
