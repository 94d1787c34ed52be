"""The end of a streamed model: from the last layer's hidden states to log-probabilities, and back to their gradient.

The logits of a whole vocabulary are never held at once, unless `Head.logits` returns them. They are worked out for
a slice of the vocabulary at a time, for all micro-batches, so the head's weight is read once per pass.

Shapes: `wanted` is the number of places of one micro-batch whose prediction is in the loss, `hidden` the hidden size,
`slice` the number of tokens in a slice of the vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loram.base.progress import track
from loram.compute.logits import LogitRule
from loram.compute.scratch import Activations, Scratch
from loram.data.batches import Batch
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint

_SLICE_BYTES = 1 << 26

Visit = Callable[[int, int, Tensor, Tensor], None]
OnGradient = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The likeliest next tokens at the wanted places of one micro-batch.

    Args:
        ids: (wanted, k) int64, the likeliest first.
        log_probs: (wanted, k) float32, in nats, over the whole vocabulary.
        log_rest: (wanted,) float32, the log of the probability of all other tokens (at least about -16).
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor


class _Factors:
    """The factors of an adapter on the head, and their gradients, which grow slice by slice.

    Args:
        module: the head's path.
        a, b: lora_A, (r, hidden), and lora_B, (vocabulary, r).
        scaling: what their product is multiplied by.
    """

    def __init__(self, module: str, a: Tensor, b: Tensor, scaling: float) -> None:
        self.module, self.a, self.b, self.scaling = module, a, b, scaling
        self.by_a, self.by_b = torch.zeros_like(a), torch.zeros_like(b)

    def add_(self, inputs: Tensor, by_logits: Tensor, start: int) -> None:
        """Add the gradients of some places and tokens.

        Args:
            inputs: what the head reads, (wanted, hidden).
            by_logits: the gradient by what it gives, (wanted, slice).
            start: the first token of the slice.
        """
        rows = slice(start, start + by_logits.shape[1])
        by_logits = by_logits * self.scaling
        self.by_b[rows] += by_logits.T @ (inputs @ self.a.T)
        self.by_a += (by_logits @ self.b[rows]).T @ inputs

    def gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name in files, factor, its gradient)."""
        for part, factor, gradient in (("A", self.a, self.by_a), ("B", self.b, self.by_b)):
            yield f"base_model.model.{self.module}.lora_{part}.weight", factor, gradient


class Head:
    """The final norm and the linear that gives the logits, with the adapter's update on it.

    Args:
        checkpoint: the model's folder.
        norm: the final norm, with its weights.
        batches: the micro-batches.
        final: what the last layer gives for each of them, (rows, width, hidden).
        scratch: where intermediate results are kept.
        adapter: the adapter, which may have an update for the head.
        device, dtype: where and in which dtype to compute.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        norm: nn.Module,
        batches: Sequence[Batch],
        final: Activations,
        scratch: Scratch,
        *,
        adapter: Adapter | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.norm, self.batches, self.final, self.adapter = norm, batches, final, adapter
        self.device, self.dtype, self._scratch = device, dtype, scratch
        architecture = checkpoint.architecture
        self._rule = LogitRule.of(architecture, architecture.text_config(checkpoint.config))
        self._module, self._weight = architecture.head, checkpoint.tensor(checkpoint.head)  # (vocabulary, hidden)

    @functools.cached_property
    def _inputs(self) -> Activations:
        """Return the hidden states at the wanted places: (wanted, hidden) for each micro-batch."""
        width = self._weight.shape[1]
        inputs = self._scratch.room([(len(batch.targets), width) for batch in self.batches], self.dtype)
        for number, batch in enumerate(self.batches):
            with torch.no_grad():
                states = self.norm(self.final[number].to(self.device))  # (rows, width, hidden)
                inputs[number] = states[batch.wanted.to(self.device)]
        return inputs

    def log_probs(self) -> list[Tensor]:
        """Return the log-probability of each wanted target: (wanted,) float32 for each micro-batch, in nats."""
        totals, targets = self._normalisers()
        return [target - total for target, total in zip(targets, totals, strict=True)]

    def top_k(self, k: int) -> list[TopK]:
        """Return the `k` likeliest next tokens at the wanted places, for each micro-batch."""
        best = [
            (torch.empty(len(b.targets), 0), torch.empty(len(b.targets), 0, dtype=torch.int64)) for b in self.batches
        ]
        totals = [torch.full((len(b.targets),), -torch.inf) for b in self.batches]

        def visit(number: int, start: int, logits: Tensor, weight: Tensor) -> None:
            totals[number] = torch.logaddexp(totals[number], logits.logsumexp(1).cpu())
            values, ids = (part.cpu() for part in logits.topk(min(k, logits.shape[1])))  # each (wanted, k)
            values, ids = torch.cat([best[number][0], values], 1), torch.cat([best[number][1], ids + start], 1)
            values, order = values.topk(min(k, values.shape[1]))
            best[number] = values, ids.gather(1, order)

        self._visit_logits(visit)
        results = []
        for (values, ids), total in zip(best, totals, strict=True):
            log_probs = values - total[:, None]
            mass = log_probs.double().exp().sum(1).clamp(max=1 - 1e-7)  # float32 sums are no more exact than that
            results.append(TopK(ids=ids, log_probs=log_probs, log_rest=torch.log1p(-mass).float()))
        return results

    def logits(self) -> list[Tensor]:
        """Return the logits at the wanted places, for each micro-batch: (wanted, vocabulary) float32, on the CPU."""
        slices: list[list[Tensor]] = [[] for _ in self.batches]

        def visit(number: int, start: int, logits: Tensor, weight: Tensor) -> None:
            slices[number].append(logits.cpu())

        self._visit_logits(visit)
        return [torch.cat(parts, 1) for parts in slices]

    def gradient(self, gradients: Activations, on_gradient: OnGradient | None = None) -> float:
        """Work out the gradient of the mean loss over all wanted tokens by the last layer's outputs.

        Args:
            gradients: gets the gradient, (rows, width, hidden) for each micro-batch.
            on_gradient: called for each of the adapter's factors on the head, if it has some, with its name in files,
                the factor and its gradient.

        Returns:
            The loss, in nats per token.
        """
        predicted = sum(len(batch.targets) for batch in self.batches)
        totals, targets = self._normalisers()
        losses = (float((total - target).double().sum()) for total, target in zip(totals, targets, strict=True))
        loss = sum(losses) / predicted
        sums = [torch.zeros(shape) for shape in self._inputs.shapes]  # the gradient by the head's inputs, float32
        factors = self._factors() if on_gradient is not None else None

        def visit(number: int, start: int, logits: Tensor, weight: Tensor) -> None:
            error = (logits - totals[number].to(logits.device)[:, None]).exp()  # softmax, (wanted, slice)
            inside, here = self._targets_inside(number, start, logits)
            error[inside, here] -= 1  # softmax minus the one-hot target: the gradient by the logits
            self._rule.pull_back_(error, logits)
            sums[number] += (error.to(weight.dtype) @ weight).float().cpu() / predicted  # (wanted, hidden)
            if factors is not None:
                factors.add_(self._inputs[number].to(error), error / predicted, start)

        self._visit_logits(visit)
        self._inputs.close()
        if factors is not None and on_gradient is not None:
            for name, factor, gradient in factors.gradients():
                on_gradient(name, factor, gradient)
        for number, batch in enumerate(self.batches):
            x = self.final[number].to(self.device).detach().requires_grad_()  # (rows, width, hidden)
            with torch.enable_grad():
                y = self.norm(x)[batch.wanted.to(self.device)]  # (wanted, hidden)
            torch.autograd.backward(y, sums[number].to(y))
            assert x.grad is not None
            gradients[number] = x.grad
        return loss

    def _factors(self) -> "_Factors | None":
        """Return the adapter's factors on the head; None where it has none, or a masked update."""
        adapter, module = self.adapter, self._module
        if adapter is None or module not in adapter.modules or module in adapter.masks:
            return None
        a, b = (adapter.modules[module][part].detach().to(self.device, torch.float32) for part in "AB")
        return _Factors(module, a, b, adapter.scaling(module))

    def _normalisers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return log-sum-exp over the vocabulary and the target's logit, both (wanted,) float32 per micro-batch."""
        totals = [torch.full((len(batch.targets),), -torch.inf) for batch in self.batches]
        targets = [torch.zeros(len(batch.targets)) for batch in self.batches]

        def visit(number: int, start: int, logits: Tensor, weight: Tensor) -> None:
            totals[number] = torch.logaddexp(totals[number], logits.logsumexp(1).cpu())
            inside, here = self._targets_inside(number, start, logits)
            targets[number][inside.cpu()] = logits[inside, here].cpu()

        self._visit_logits(visit)
        return totals, targets

    def _targets_inside(self, number: int, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return which targets of a micro-batch are in the slice from `start` on, (wanted,) bool, and their columns."""
        here = (self.batches[number].targets - start).to(logits.device)
        inside = (here >= 0) & (here < logits.shape[1])
        return inside, here[inside]

    def _visit_logits(self, visit: Visit) -> None:
        """Call `visit(batch number, first token id, logits, weight)` for every slice and micro-batch.

        Logits are (wanted, slice) float32, with scale and softcap; weights are (slice, hidden), with the adapter's
        update.
        """
        longest, head = max(len(batch.targets) for batch in self.batches), self._weight
        rows = max(1, _SLICE_BYTES // (4 * max(longest, head.shape[1])))
        for start in track(range(0, head.shape[0], rows), "Vocabulary"):
            weight = head[start : start + rows].to(self.device, self.dtype)
            if self.adapter is not None and self._module in self.adapter.modules:
                weight = self.adapter.updated(self._module, weight, start).to(weight)
            for number in range(len(self.batches)):
                outputs = (self._inputs[number].to(self.device) @ weight.T).float()
                visit(number, start, self._rule(outputs), weight)
