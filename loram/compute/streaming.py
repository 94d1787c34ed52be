"""Run a causal language model from its files with one decoder layer in memory at a time, forward and backward.

All micro-batches go through a layer before the next one is loaded, so every weight is read once a pass, whatever the
amount of text. What the model's own code passes to its layers (masks, rotary embeddings) is recorded from that code,
so nothing of a family is written again here.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from loram.base.errors import UserError
from loram.base.progress import track
from loram.compute.device import return_freed_memory_
from loram.compute.loading import empty_model
from loram.compute.scratch import Activations, Scratch
from loram.data.batches import Batch
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import EMBEDDING, Checkpoint
from loram.model.architecture import CUTS

HIDDEN_BYTES = 1 << 28
BATCH_TOKENS = 2048
_SLICE_BYTES = 1 << 26

Observer = Callable[[str, Tensor, Tensor, Tensor], None]
Editor = Callable[["ResidentLayer"], None]
OnGradient = Callable[[str, Tensor, Tensor], None]
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def prefetched(items: Iterable[Item], load: Callable[[Item], Loaded]) -> Generator[Loaded, None, None]:
    """Load items in order, each while the caller works with the one before."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: Future[Loaded] | None = None
        for item in items:
            started = pool.submit(load, item)
            if waiting is not None:
                yield waiting.result()
            waiting = started
        if waiting is not None:
            yield waiting.result()


@dataclass(frozen=True, kw_only=True)
class ResidentLayer:
    """A decoder layer while its weights are in memory.

    Args:
        index: which.
        tensors: full name (`model.layers.3.mlp.up_proj.weight`) -> weight, on the device it computes on; empty as soon
            as the next layer is asked for.
    """

    index: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The likeliest next tokens at the wanted places of one micro-batch.

    Args:
        ids: (wanted, k) int64, likeliest first.
        log_probs: (wanted, k) float32, nats, over the whole vocabulary.
        log_rest: (wanted,) float32, log of the probability of all other tokens (at least about -16).
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor


class Stream:
    """Micro-batches on their way through a model.

    First exhaust `forward`; then ask for `log_probs` or `top_k`, or walk down with `backward`.

    Args:
        checkpoint: a full or pruned model.
        batches: see `loram.data.batches`.
        device: where layers compute.
        dtype: in which dtype; float32 gives the gradients of the whole model.
        adapter: a LoRA adapter that fits the model; added layer by layer.
        hidden_bytes: hidden states are kept in memory up to this, then in a scratch file.
        scratch: folder of the scratch file (default: the system's temporary folder).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Sequence[Batch],
        *,
        device: torch.device,
        dtype: torch.dtype,
        adapter: Adapter | None = None,
        hidden_bytes: int = HIDDEN_BYTES,
        scratch: Path | None = None,
    ) -> None:
        if checkpoint.quantized:
            raise UserError(
                f"{checkpoint.name}: is quantised, and cannot be streamed; take the weights in 16 or 32 bits"
            )
        self.checkpoint, self.batches, self.adapter = checkpoint, batches, adapter
        self.device, self.dtype = device, dtype
        return_freed_memory_()
        self.model: Any = empty_model(checkpoint, dtype, dense=True)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())  # a tied one once
        if checkpoint.sparse:
            self.parameters = checkpoint.parameters  # those that are kept
        self._layers = self.model.model.layers
        self._scratch = Scratch(hidden_bytes, scratch)
        self._arguments: dict[tuple[int, ...], dict[int, dict[str, Any]]] = {}
        self._inputs: dict[int, Activations] = {}
        self._final: Activations | None = None
        self._factors: dict[str, Tensor] = {}  # those of the resident layer
        self.loss: float | None = None

    @property
    def predicted(self) -> int:
        """How many tokens are in the loss."""
        return sum(len(batch.targets) for batch in self.batches)

    def forward(
        self,
        observe: Observer | None = None,
        keep_from: int | None = None,
        edit: Editor | None = None,
    ) -> Generator[ResidentLayer, None, None]:
        """Send all micro-batches through layer after layer, yielding each layer when they have passed it.

        Args:
            observe: called for every prunable linear and micro-batch with the weight's full name, its inputs
                (rows, width, in_features), its outputs (rows, width, out_features) and where these are text and not
                padding (rows, width).
            keep_from: keep the inputs of this layer and those above, for `backward`.
            edit: called with each layer once it has been observed; may change its weights in place, since the next
                layer sees what comes out of a second pass.
        """
        current = self._embed()
        for layer in self._resident(range(len(self._layers)), "Layers, forward"):
            keep = keep_from is not None and layer.index >= keep_from
            outputs = self._room() if keep else current
            if edit is not None:
                self._pass(layer.index, current, None, observe)
                edit(layer)
            self._pass(layer.index, current, outputs, None if edit else observe)
            if keep:
                self._inputs[layer.index], current = current, outputs
            yield layer
        self._final = current

    def _pass(self, index: int, inputs: Activations, outputs: Activations | None, observe: Observer | None) -> None:
        """Send all micro-batches through one layer."""
        for number, batch in enumerate(self.batches):
            before = inputs[number].to(self.device)
            with torch.no_grad(), self._observed(index, batch, observe):
                after = self._call(index, batch, before)
            if outputs is not None:
                outputs[number] = after

    def backward(
        self, down_to: int, on_gradient: OnGradient | None, *, of: Literal["weights", "factors"] = "weights"
    ) -> Iterator[ResidentLayer]:
        """Walk down from the loss, the mean over all wanted tokens, yielding each layer when its gradients are done.

        The gradients are those of the whole model (reverse mode, each layer computed again from its kept inputs), of
        the weights of prunable linears or of the adapter's factors on them. Sets `loss`, in nats.

        Args:
            down_to: the last layer to visit; `forward` must have kept inputs from here on.
            on_gradient: called once for every weight with its full name, the weight and its gradient, of one shape;
                the gradient's memory is free again after the call. None: differentiate by the layers' inputs alone.
            of: what to differentiate by; factors go by PEFT's names.
        """
        gradients = self._head_gradient()
        for layer in self._resident(range(len(self._layers) - 1, down_to - 1, -1), "Layers, backward"):
            inputs = self._inputs.pop(layer.index)
            with self._differentiated(layer, on_gradient, of) as state:
                for number, batch in enumerate(self.batches):
                    state["last"] = number == len(self.batches) - 1
                    x = inputs[number].to(self.device).detach()
                    x.requires_grad_(layer.index > down_to or on_gradient is None)
                    with torch.enable_grad():
                        y = self._call(layer.index, batch, x)
                    y.backward(gradients[number].to(self.device))
                    if x.grad is not None:
                        gradients[number] = x.grad
                    del x, y
            inputs.close()
            yield layer
        gradients.close()

    def log_probs(self) -> list[Tensor]:
        """Log-probability of each wanted target, (wanted,) float32 for every micro-batch."""
        totals, targets = self._normalisers(self._finals(), self.checkpoint.tensor(self.checkpoint.head))
        return [target - total for target, total in zip(targets, totals, strict=True)]

    def top_k(self, k: int) -> list[TopK]:
        """The `k` likeliest next tokens at the wanted places, for every micro-batch."""
        finals, head = self._finals(), self.checkpoint.tensor(self.checkpoint.head)
        best = [
            (torch.empty(len(b.targets), 0), torch.empty(len(b.targets), 0, dtype=torch.int64)) for b in self.batches
        ]
        totals = [torch.full((len(b.targets),), -torch.inf) for b in self.batches]

        def visit(number: int, start: int, logits: Tensor, weight: Tensor) -> None:
            totals[number] = torch.logaddexp(totals[number], logits.logsumexp(1).cpu())
            values, ids = (part.cpu() for part in logits.topk(min(k, logits.shape[1])))
            values, ids = torch.cat([best[number][0], values], 1), torch.cat([best[number][1], ids + start], 1)
            values, order = values.topk(min(k, values.shape[1]))
            best[number] = values, ids.gather(1, order)

        self._visit_logits(finals, head, visit)
        found = []
        for (values, ids), total in zip(best, totals, strict=True):
            log_probs = values - total[:, None]
            mass = log_probs.double().exp().sum(1).clamp(max=1 - 1e-7)  # float32 sums tell no more than that
            found.append(TopK(ids=ids, log_probs=log_probs, log_rest=torch.log1p(-mass).float()))
        return found

    def _room(self, wanted: bool = False) -> Activations:
        """Room for a hidden state of every token, or of every wanted place."""
        width = self.model.config.hidden_size
        shapes = [(len(b.targets), width) if wanted else (*b.ids.shape, width) for b in self.batches]
        return self._scratch.room(shapes, self.dtype)

    def _embed(self) -> Activations:
        """Hidden states before the first layer, by the model's own forward with layers that only take notes.

        Only the embedding's rows that the text uses are read.
        """
        inner, table = self.model.model, self.model.model.embed_tokens
        used = torch.unique(torch.cat([batch.ids.flatten() for batch in self.batches]))
        if used[-1] >= (known := self.checkpoint.vocabulary):
            raise UserError(f"{self.checkpoint.name}: token id {used[-1]}, but its embedding has only {known} rows")
        rows = [self.checkpoint.tensor(EMBEDDING, row, row + 1) for row in used.tolist()]
        table.weight = nn.Parameter(torch.cat(rows).to(self.device, self.dtype), requires_grad=False)
        table.padding_idx = None  # it counts in the full table, and is of no use without a gradient
        inner.rotary_emb.to(self.device)
        hidden = self._room()
        notes: dict[int, dict[str, Any]] = {}

        def note(index: int, hidden_states: Tensor, **arguments: Any) -> Tensor:
            notes[index] = arguments
            return hidden_states

        with torch.no_grad(), contextlib.ExitStack() as undo:
            for index, layer in enumerate(self._layers):
                layer.forward = functools.partial(note, index)
                undo.callback(delattr, layer, "forward")
            inner.norm.forward = lambda hidden_states: hidden_states
            undo.callback(delattr, inner.norm, "forward")
            for number, batch in enumerate(self.batches):
                ids = torch.searchsorted(used, batch.ids).to(self.device)
                hidden[number] = inner(input_ids=ids, use_cache=False).last_hidden_state
                self._arguments[tuple(ids.shape)] = dict(notes)
        table.to_empty(device="meta")
        return hidden

    def _call(self, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        arguments = self._arguments[tuple(batch.ids.shape)][index]  # what the model's own code passes, too
        output: Tensor = self._layers[index](hidden.to(self.device), **arguments)
        return output

    def _resident(self, indices: Sequence[int], description: str) -> Iterator[ResidentLayer]:
        """Layers with their weights and adapter in place, one at a time, the next one read meanwhile."""
        loads = prefetched(indices, self._read)
        with contextlib.closing(loads):
            for index in track(indices, description):
                layer, read = self._layers[index], next(loads)
                _fill_(layer, read, self.device, self.dtype)
                tensors = {f"model.layers.{index}.{name}": weight.data for name, weight in layer.named_parameters()}
                handles = self._adapt_(index)
                yield ResidentLayer(index=index, tensors=tensors)
                tensors.clear()  # else whoever still holds the layer would hold its weights while the next is read
                for handle in handles:
                    handle.remove()
                layer.to_empty(device="meta")

    def _read(self, index: int) -> dict[str, Tensor]:
        names = [name for name, _ in self._layers[index].named_parameters()]
        return {name: self.checkpoint.tensor(f"model.layers.{index}.{name}") for name in names}

    def _adapt_(self, index: int) -> list[Any]:
        """Let the layer's linears add their adapter's update, as PEFT does: factors and their product in float32.

        A DoRA adapter also scales what the weight itself gives, so it goes into the weight, which is gone after use.
        """
        self._factors.clear()
        handles = []
        for linear in CUTS:
            name, module = f"model.layers.{index}.{linear}", self._layers[index].get_submodule(linear)
            if self.adapter is None or name not in self.adapter.modules:
                continue
            if self.adapter.dora:
                module.weight.data = self.adapter.updated(name, module.weight.data).to(module.weight)
                continue
            handle, factors = self.adapter.add_to_(module, name, self.device)
            self._factors |= factors
            handles.append(handle)
        return handles

    @contextlib.contextmanager
    def _observed(self, index: int, batch: Batch, observe: Observer | None) -> Iterator[None]:
        if observe is None:
            yield
            return
        real = batch.real.to(self.device)

        def hook(_: nn.Module, args: Any, output: Tensor, name: str) -> None:
            observe(name, args[0], output, real)

        handles = [
            self._layers[index]
            .get_submodule(linear)
            .register_forward_hook(functools.partial(hook, name=f"model.layers.{index}.{linear}.weight"))
            for linear in CUTS
        ]
        yield
        for handle in handles:
            handle.remove()

    @contextlib.contextmanager
    def _differentiated(
        self, layer: ResidentLayer, on_gradient: OnGradient | None, of: Literal["weights", "factors"]
    ) -> Iterator[dict[str, bool]]:
        """Collect gradients; each is handed over, and freed, when the last batch is through."""
        state = {"last": False}
        if on_gradient is None:
            yield state
            return

        def done(weight: Tensor, name: str) -> None:
            if state["last"]:
                assert weight.grad is not None
                on_gradient(name, weight.detach(), weight.grad)
                weight.grad = None

        wanted = self._factors
        if of == "weights":
            block = self._layers[layer.index]
            wanted = {
                f"model.layers.{layer.index}.{linear}.weight": block.get_submodule(linear).weight for linear in CUTS
            }
        handles = []
        for name, tensor in wanted.items():
            tensor.requires_grad_()
            handles.append(tensor.register_post_accumulate_grad_hook(functools.partial(done, name=name)))
        yield state
        for handle in handles:
            handle.remove()

    def _norm(self) -> nn.Module:
        norm: nn.Module = self.model.model.norm
        read = {name: self.checkpoint.tensor(f"model.norm.{name}") for name, _ in norm.named_parameters()}
        _fill_(norm, read, self.device, self.dtype)
        return norm

    def _finals(self) -> Activations:
        """What lm_head sees at the wanted places."""
        assert self._final is not None, "forward has not come to its end"
        norm, finals = self._norm(), self._room(wanted=True)
        for number, batch in enumerate(self.batches):
            with torch.no_grad():
                finals[number] = norm(self._final[number].to(self.device))[batch.wanted.to(self.device)]
        return finals

    def _visit_logits(
        self, finals: Activations, head: Tensor, visit: Callable[[int, int, Tensor, Tensor], None]
    ) -> None:
        """Call `visit(batch number, first token id, logits, weight)` for every slice of the vocabulary and every batch.

        Logits are (wanted, slice) float32, weights (slice, hidden), the adapter's update included.
        """
        longest = max(len(batch.targets) for batch in self.batches)
        rows = max(1, _SLICE_BYTES // (4 * max(longest, head.shape[1])))
        cap = self.model.config.to_dict().get("final_logit_softcapping")
        for start in track(range(0, head.shape[0], rows), "Vocabulary"):
            weight = head[start : start + rows].to(self.device, self.dtype)
            if self.adapter is not None and "lm_head" in self.adapter.modules:
                weight = self.adapter.updated("lm_head", weight, start).to(weight)
            for number in range(len(self.batches)):
                logits = (finals[number].to(self.device) @ weight.T).float()
                visit(number, start, cap * (logits / cap).tanh() if cap else logits, weight)

    def _normalisers(self, finals: Activations, head: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For every batch the log-sum-exp over the vocabulary, and the target's logit: each (wanted,) float32."""
        totals = [torch.full((len(batch.targets),), -torch.inf) for batch in self.batches]
        targets = [torch.zeros(len(batch.targets)) for batch in self.batches]

        def visit(number: int, start: int, logits: Tensor, weight: Tensor) -> None:
            totals[number] = torch.logaddexp(totals[number], logits.logsumexp(1).cpu())
            here = (self.batches[number].targets - start).to(logits.device)
            inside = (here >= 0) & (here < logits.shape[1])
            targets[number][inside.cpu()] = logits[inside, here[inside]].cpu()

        self._visit_logits(finals, head, visit)
        return totals, targets

    def _head_gradient(self) -> Activations:
        """Gradient of the mean loss by the last layer's outputs."""
        head, finals = self.checkpoint.tensor(self.checkpoint.head), self._finals()
        totals, targets = self._normalisers(finals, head)
        losses = (float((total - target).double().sum()) for total, target in zip(totals, targets, strict=True))
        self.loss = sum(losses) / self.predicted
        cap = self.model.config.to_dict().get("final_logit_softcapping")
        sums = [torch.zeros(finals.shapes[number]) for number in range(len(self.batches))]

        def visit(number: int, start: int, logits: Tensor, weight: Tensor) -> None:
            error = (logits - totals[number].to(logits.device)[:, None]).exp()
            here = (self.batches[number].targets - start).to(logits.device)
            inside = (here >= 0) & (here < logits.shape[1])
            error[inside, here[inside]] -= 1
            if cap:
                error *= 1 - (logits / cap) ** 2  # derivative of cap * tanh(x / cap)
            sums[number] += (error.to(weight.dtype) @ weight).float().cpu() / self.predicted

        self._visit_logits(finals, head, visit)
        finals.close()
        norm, gradients = self._norm(), self._room()
        assert self._final is not None
        for number, batch in enumerate(self.batches):
            x = self._final[number].to(self.device).detach().requires_grad_()
            with torch.enable_grad():
                y = norm(x)[batch.wanted.to(self.device)]
            y.backward(sums[number].to(y))
            assert x.grad is not None
            gradients[number] = x.grad
        self._final.close()
        return gradients


def _fill_(module: nn.Module, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Give an empty module its weights; each is dropped from `tensors` as it is converted."""
    for name in list(tensors):
        owner, _, leaf = name.rpartition(".")
        parent, tensor = module.get_submodule(owner), tensors.pop(name)
        expected = parent.get_parameter(leaf).shape
        if tensor.shape != expected:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, but config.json says {tuple(expected)}")
        setattr(parent, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
