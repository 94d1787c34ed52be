"""Decoding with a model that is read from disk, layer by layer, for every new token."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from loram.base.constants import BATCH_TOKENS
from loram.compute.device import compute_dtype
from loram.compute.loading import empty_model
from loram.compute.streaming import Stream
from loram.data.batches import at_the_ends, make_batches
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


class StreamedDecoder:
    """What transformers' `generate` needs of a model that is never in memory.

    `model` is transformers' own model without weights. Its forward pass streams all rows from their first token on, so
    there is no cache of keys and values: call `model.generate` with `use_cache=False`, and with ids on the CPU.

    Args:
        checkpoint: a full or pruned model.
        adapter: a LoRA adapter that fits it.
        device: the device that computes.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter | None, device: torch.device) -> None:
        self.checkpoint, self.adapter, self.device = checkpoint, adapter, device
        self.dtype = compute_dtype(device)
        self.model: Any = empty_model(checkpoint, self.dtype, dense=True)
        self.model.forward = self.forward
        self._timed = False

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Take the adapter off while the block runs."""
        adapter, self.adapter = self.adapter, None
        try:
            yield
        finally:
            self.adapter = adapter

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Return the logits of the next token of each row: (rows, 1, vocabulary) float32, on the CPU.

        Args:
            input_ids: token ids, (rows, width), padded on the left.
            attention_mask: 0 where padded, (rows, width); None where nothing is.
        """
        started = time.monotonic()
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, real, strict=True)]
        batches = [at_the_ends(batch) for batch in make_batches(rows, max_tokens=BATCH_TOKENS)]
        stream = Stream(
            self.checkpoint, batches, device=self.device, dtype=self.dtype, adapter=self.adapter, model=self.model
        )
        deque(stream.forward(), maxlen=0)
        order = torch.tensor([row for batch in batches for row in batch.rows])
        logits = torch.cat(stream.logits())[order.argsort()]
        if not self._timed:
            seconds = time.monotonic() - started
            logger.info("%s: read from disk in %.1f s; every new token takes as long", self.checkpoint.name, seconds)
            self._timed = True
        return CausalLMOutput(logits=logits[:, None])
