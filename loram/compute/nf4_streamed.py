"""A model's files as its weights in NF4 compute: what is read is quantised and dequantised again.

So a layer that is streamed gives what the same layer gives in memory in 4 bits (QLoRA). What is kept in RAM is packed,
which takes a quarter of the room of 16 bits.
"""

from collections.abc import Sequence

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Params4bit
from torch import Tensor

from loram.compute.loading import empty_model
from loram.compute.nf4 import (
    dequantized,
    dequantized_rows,
    expert_matrices,
    holds_experts,
    linear_shapes,
    pack,
    read_4bit,
)
from loram.disk.checkpoint import Checkpoint

_Packed = tuple[Tensor, QuantState]


class Nf4Checkpoint(Checkpoint):
    """A checkpoint in 16 or 32 bits, or one that `loram.quantize` made, that shows weights in NF4 dequantised.

    Those are the weights that `load_4bit` has in NF4. They come on the device, in the computing dtype. Packed
    embeddings stay on the device, since some rows of them are read at a time; others are kept in RAM as far as there is
    room, with their constants on the device.

    Args:
        original: the checkpoint.
        device: where weights are quantised and dequantised.
        dtype: the dtype to dequantise to.
        budget: how many bytes of packed weights may be kept in RAM.
    """

    def __init__(self, original: Checkpoint, *, device: torch.device, dtype: torch.dtype, budget: int) -> None:
        assert not original.sparse
        super().__init__(original.folder, original.name, chat_template=original.chat_template)
        self._original, self._device, self._dtype, self._free_bytes = original, device, dtype, budget
        self._embeddings: dict[str, Params4bit] = {}
        self._kept: dict[str, list[_Packed]] = {}  # name -> one matrix, or one per expert
        self._looked_up = {*self.architecture.embedding_weights}
        self._linears = linear_shapes(self, empty_model(self, dtype))

    @property
    def quantized(self) -> bool:
        """Return that no weight is shown in 4 bits."""
        return False

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read one tensor, or its rows `start` to `stop`; one in NF4 is dequantised."""
        if name in self._looked_up:
            weight = self._embedding(name)
            if start == 0 and stop is None:  # for a tied head
                return self._unpacked((weight.data, weight.quant_state))
            rows = torch.arange(weight.quant_state.shape[0], device=self._device)[start:stop]
            return dequantized_rows(weight, rows)
        if name in self._linears:
            (packed,) = self._packed(name)
            return self._unpacked(packed)[start:stop]
        if holds_experts(self, name):
            stacked = torch.stack([self._unpacked(packed) for packed in self._packed(name)[start:stop]])
            return stacked.mT if self.architecture.experts_transposed else stacked
        return dequantized(self._original, name)[0] if self.constants(name) else super().tensor(name, start, stop)

    def _embedding(self, name: str) -> Params4bit:
        if name not in self._embeddings:
            self._embeddings[name] = read_4bit(self._original, name, self.shape(name), self._device, self._dtype)
        return self._embeddings[name]

    def _packed(self, name: str) -> Sequence[_Packed]:
        """Return a tensor's packed matrices, from RAM where they are kept."""
        if name in self._kept:
            return self._kept[name]
        if holds_experts(self, name):
            matrices = [pack(matrix, self._device, self._dtype) for matrix in expert_matrices(self._original, name)]
        else:
            matrices = [read_4bit(self._original, name, self._linears[name], self._device, self._dtype)]
        packed = [(matrix.data, matrix.quant_state) for matrix in matrices]
        if (size := sum(values.nbytes for values, _ in packed)) <= self._free_bytes:
            self._free_bytes -= size
            self._kept[name] = [(values.cpu(), state) for values, state in packed]
        return packed

    def _unpacked(self, packed: _Packed) -> Tensor:
        values, state = packed
        weight: Tensor = dequantize_4bit(values.to(self._device), state)
        return weight
