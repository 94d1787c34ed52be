"""The evidence that criteria judge weights by: the weights, their gradients, and statistics of their inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loram.base import processes


class InputStatistics:
    """Statistics of a linear's inputs over the calibration text, gathered one micro-batch at a time.

    All of them are float64. Mean and variance are updated as by Chan, Golub and LeVeque (1979).

    Args:
        features: the in_features of the linear.
        width: how many neighbouring features form one head (1 for channels).
        device: the device that holds the statistics.
    """

    def __init__(self, features: int, width: int, device: torch.device) -> None:
        self.width, self.count = width, 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self.mean)  # (features,) summed squared distances from the mean
        self._norms = torch.zeros(features // width, dtype=torch.float64, device=device)  # squared

    def add_(self, inputs: Tensor, real: Tensor) -> None:
        """Add one micro-batch.

        Args:
            inputs: (rows, width, features).
            real: (rows, width) bool, False where padded.
        """
        x = inputs[real]  # (tokens, features)
        variance, mean = torch.var_mean(x, 0, correction=0)
        added, shift = len(x), mean.double() - self.mean
        total = self.count + added
        self._squares += variance.double() * added + shift**2 * (self.count * added / total)
        self.mean += shift * (added / total)
        self.count = total
        # norms of the heads of every token, 0 where padded: (rows, width, features / self.width)
        heads = inputs.unflatten(-1, (-1, self.width)).norm(dim=-1) * real[..., None]
        self._norms += ((heads.sum(1) / real.sum(1, keepdim=True)) ** 2).sum(0).double()

    def join_(self) -> None:
        """Take in what the other processes have gathered, where several share the text."""
        if processes.count() == 1:
            return
        count, mean = self.count, self.mean
        self.count = sum(processes.gather(count))
        self.mean = processes.sum_(mean * (count / self.count))
        self._squares = processes.sum_(self._squares + count * (mean - self.mean) ** 2)
        self._norms = processes.sum_(self._norms)

    @property
    def variance(self) -> Tensor:
        """The variance of each feature over all tokens: (features,)."""
        return self._squares / max(self.count - 1, 1)

    @property
    def norm(self) -> Tensor:
        """The Euclidean norm of each feature over all tokens: (features,)."""
        return (self._squares + self.count * self.mean**2).sqrt()

    @property
    def head_norm(self) -> Tensor:
        """The norm of each head's features: its mean over a row's tokens, then the Euclidean norm over the rows.

        (features / width,)
        """
        return self._norms.sqrt()


class Hessian:
    """The Hessian of a linear's output error: the sum of x xᵀ over its inputs x, (features, features) float32."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(features, features, device=device)

    def add_(self, inputs: Tensor, real: Tensor) -> None:
        """Add one micro-batch.

        Args:
            inputs: (rows, width, features).
            real: (rows, width) bool, False where padded.
        """
        x = inputs[real].float()  # (tokens, features)
        self.total.addmm_(x.T, x)
        self.count += len(x)

    def join_(self) -> None:
        """Take in what the other processes have gathered, where several share the text."""
        self.count = sum(processes.gather(self.count))
        processes.sum_(self.total)


Inputs = Hessian | InputStatistics


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence that a criterion judges some rows of a linear by.

    Args:
        weight: (rows, in_features).
        gradient: (rows, in_features), the gradient of the loss; None if the criterion does not read it.
        inputs: the statistics of the linear's inputs; None if the criterion does not read them.
    """

    weight: Tensor
    gradient: Tensor | None = None
    inputs: InputStatistics | None = None
