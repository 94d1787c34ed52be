"""Text that a model writes by itself, for when there is none to align on."""

from typing import Any

import torch
from torch import Tensor

from loram.base.progress import track

_BATCH_ROWS = 16


def sample_rows(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """Rows drawn from a model's own distribution (temperature 1), each up to its end-of-sequence token or `length`.

    A row begins with the tokenizer's first token; where it has none, with a token drawn evenly from the vocabulary
    (LLM-QAT, arXiv 2305.17888, section 3.1).

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        count: how many rows.
        length: tokens a row, at least 2.
        seed: of everything drawn; the process's random state stays as it is.

    Returns:
        Rows of `input_ids` and `labels`, all tokens in the loss.
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
    rows: list[list[int]] = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        for start in track(range(0, count, _BATCH_ROWS), "Sampling"):
            first = _first(tokenizer, model.config.vocab_size, min(_BATCH_ROWS, count - start)).to(model.device)
            written = model.generate(first, attention_mask=torch.ones_like(first), generation_config=options)
            rows += [_up_to_end(row, tokenizer.eos_token_id) for row in written.tolist()]
    return [{"input_ids": row, "labels": row} for row in rows]


def _first(tokenizer: Any, vocabulary: int, rows: int) -> Tensor:
    if tokenizer.bos_token_id is None:
        return torch.randint(vocabulary, (rows, 1))
    return torch.full((rows, 1), tokenizer.bos_token_id)


def _up_to_end(row: list[int], end: int) -> list[int]:
    stop = row.index(end, 1) + 1 if end in row[1:] else len(row)
    return row[: max(stop, 2)]
