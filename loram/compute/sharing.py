"""Keys and values that some layers share with later ones, while a model is streamed layer by layer."""

from collections.abc import Iterator

import torch
from torch import Tensor

from loram.compute.scratch import Activations, Scratch


class SharedStates:
    """What layers share with later ones, of every micro-batch, and its gradients.

    Args:
        scratch: where it is kept.
        dtype, device: what the layers compute in, and where.
        read: whether any layer reads it; else nothing is kept.
    """

    def __init__(self, scratch: Scratch, dtype: torch.dtype, device: torch.device, *, read: bool) -> None:
        self.scratch, self.dtype, self.device, self.read = scratch, dtype, device, read
        self.values: dict[tuple[int, str], Activations] = {}  # by micro-batch and name
        self.gradients: dict[tuple[int, str], Activations] = {}

    def of(self, number: int) -> "BatchStates":
        """Return what a layer gets for a micro-batch."""
        return BatchStates(self, number)

    def close(self) -> None:
        """Release the room."""
        for kept in (self.values, self.gradients):
            while kept:
                kept.popitem()[1].close()


class BatchStates:
    """The states of one micro-batch, as one layer reads and sets them; both go by a name that the layers choose.

    Without gradients, what the layer sets is kept for later layers. With gradients, what it reads are leaves, and what
    it sets gets the gradients that later layers left.
    """

    def __init__(self, states: SharedStates, number: int) -> None:
        self._states, self._number = states, number
        self._leaves: dict[str, tuple[Tensor, ...]] = {}
        self._set: dict[str, tuple[Tensor, ...]] = {}

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        kept = self._states.values[self._number, name]
        # detached: each layer that reads them has leaves of its own, with gradients of their own
        tensors = tuple(kept[place].to(self._states.device).detach() for place in range(len(kept)))
        if torch.is_grad_enabled():
            self._leaves[name] = tuple(tensor.requires_grad_() for tensor in tensors)
        return tensors

    def __setitem__(self, name: str, tensors: tuple[Tensor, ...]) -> None:
        if not self._states.read:
            return
        if torch.is_grad_enabled():
            self._set[name] = tensors
        else:
            _keep(self._states, self._states.values, (self._number, name), tensors)

    def roots(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tensor, its gradient) of what the layer has set and later layers have read."""
        for name, tensors in self._set.items():
            if (kept := self._states.gradients.get((self._number, name))) is None:
                continue
            for place, tensor in enumerate(tensors):
                if tensor.requires_grad:
                    yield tensor, kept[place].to(tensor)

    def keep_gradients(self) -> None:
        """Add the gradients of what the layer has read to those that layers above it left."""
        for name, leaves in self._leaves.items():
            key, gradients = (self._number, name), [leaf.grad for leaf in leaves]
            assert all(gradient is not None for gradient in gradients)
            added = tuple(gradient for gradient in gradients if gradient is not None)
            if (kept := self._states.gradients.get(key)) is not None:
                added = tuple(kept[place].to(gradient) + gradient for place, gradient in enumerate(added))
            _keep(self._states, self._states.gradients, key, added)


def _keep(
    states: SharedStates,
    kept: dict[tuple[int, str], Activations],
    key: tuple[int, str],
    tensors: tuple[Tensor, ...],
) -> None:
    """Keep some tensors under a key, in place of what was there."""
    if key not in kept:
        kept[key] = states.scratch.room([tuple(tensor.shape) for tensor in tensors], states.dtype)
    for place, tensor in enumerate(tensors):
        kept[key][place] = tensor
