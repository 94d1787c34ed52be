"""A model's files with as much of them in RAM as a budget allows, so that this is read once."""

from torch import Tensor

from loram.disk.checkpoint import Checkpoint


class KeptCheckpoint(Checkpoint):
    """A checkpoint that keeps whole tensors in RAM when they are read, as long as there is room for them.

    A pass goes through the layers in order, so these are the first decoder layers. Tensors are kept in the dtype that
    the checkpoint shows. What is read may be what is kept, so it must not be changed in place.

    Args:
        original: the checkpoint.
        budget: how many bytes may be kept.
    """

    def __init__(self, original: Checkpoint, budget: int) -> None:
        super().__init__(original.folder, original.name, chat_template=original.chat_template)
        self._free_bytes, self._kept = budget, dict[str, Tensor]()

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read one tensor, or its rows `start` to `stop`, from RAM where it is kept."""
        if name in self._kept:
            return self._kept[name][start:stop] if stop is not None else self._kept[name]
        tensor = super().tensor(name, start, stop)
        whole = start == 0 and stop is None
        if whole and tensor.nbytes <= self._free_bytes:
            self._free_bytes -= tensor.nbytes
            self._kept[name] = tensor
        return tensor


def kept_in_ram(checkpoint: Checkpoint, budget: int) -> Checkpoint:
    """Return a checkpoint that keeps what it reads within a budget in bytes; the same one without a budget."""
    return KeptCheckpoint(checkpoint, budget) if budget else checkpoint
