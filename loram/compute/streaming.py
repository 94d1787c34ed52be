"""Run a causal language model from its files with one decoder layer in memory at a time, forward and backward.

All micro-batches go through a layer before the next one is loaded, so every weight is read once per pass, whatever the
amount of text. What the model's own code passes to its layers (masks, rotary tables) is recorded from that code, so
no family's forward pass is written again here.

Shapes: hidden states are (rows, width, hidden), where a micro-batch has `rows` texts padded to `width` tokens.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loram.base.constants import HIDDEN_BYTES
from loram.base.errors import UserError
from loram.base.progress import track
from loram.compute.device import return_freed_memory_
from loram.compute.head import Head, OnGradient, TopK
from loram.compute.loading import empty_model
from loram.compute.scratch import Activations, Scratch
from loram.compute.sharing import BatchStates, SharedStates
from loram.data.batches import Batch
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.model.architecture import Architecture
from loram.model.segments import Linear

Observer = Callable[[str, Tensor, Tensor, Tensor], None]
ExpertsObserver = Callable[[int, nn.Module, Tensor, Tensor, Tensor, Tensor], None]
LayerObserver = Callable[[int, Tensor, Tensor, Tensor], None]
Editor = Callable[["ResidentLayer"], None]
Of = Literal["weights", "weights and experts", "factors"]
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
        index: the layer's index.
        tensors: full name (`model.layers.3.mlp.up_proj.weight`) -> weight, on the device that computes; the mapping is
            emptied as soon as the next layer is asked for.
    """

    index: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Observers:
    """Who sees what passes a layer; the arguments are as for `Stream.forward`."""

    linears: Observer | None = None
    experts: ExpertsObserver | None = None
    layer: LayerObserver | None = None
    gather: Observer | None = None

    def of(self, batch: Batch) -> "_Observers":
        """Return those who see a micro-batch."""
        return _Observers(gather=self.gather) if self.beside(batch) else self

    def beside(self, batch: Batch) -> bool:
        """Return whether a micro-batch passes only so that `gather` sees it."""
        return self.gather is not None and not batch.counts

    @property
    def of_linears(self) -> list[Observer]:
        """Return those who see its linears."""
        return [observer for observer in (self.linears, self.gather) if observer is not None]


@contextlib.contextmanager
def without_layers(
    model: nn.Module, architecture: Architecture, note: Callable[..., Tensor]
) -> Generator[nn.Module, None, None]:
    """Let a model's decoder run without its layers and final norm, and yield the decoder.

    Args:
        model: the model; its layers may be without weights.
        architecture: the family's row.
        note: called in place of each layer: (index, hidden states, what else the layer gets, by name) -> hidden states.
    """
    layers = cast(nn.ModuleList, model.get_submodule(architecture.layers_path))
    norm = model.get_submodule(architecture.final_norm_path)
    with contextlib.ExitStack() as undo:
        for index, layer in enumerate(layers):
            layer.forward = _with_names(functools.partial(note, index), layer.forward)
            undo.callback(delattr, layer, "forward")
        norm.forward = lambda hidden_states: hidden_states
        undo.callback(delattr, norm, "forward")
        yield model.get_submodule(architecture.decoder)


def _with_names(note: Callable[..., Tensor], forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that gets by name what a layer's own forward pass gets by place, but for the hidden states."""
    _, *names = inspect.signature(forward).parameters
    return lambda hidden, *args, **kwargs: note(hidden, **dict(zip(names, args, strict=False)), **kwargs)


def fill_before_layers_(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give an empty model the weights that make what its layers get: the embedding, and others outside the layers.

    An embedding may get only some rows; the ids are then places among these.
    """
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        dtype = getattr(module, leaf).dtype
        setattr(module, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it counts in the full table, and is of no use without a gradient


class Stream:
    """Micro-batches on their way through a model.

    First exhaust `forward`; then ask for `log_probs`, `top_k` or `logits`, or walk down with `backward`.

    Args:
        checkpoint: a full or pruned model.
        batches: the micro-batches (see `loram.data.batches`).
        device: where the layers compute.
        dtype: the dtype that they compute in; float32 gives the gradients of the whole model.
        adapter: a LoRA adapter that fits the model; it is added layer by layer.
        hidden_bytes: how many bytes of hidden states are kept in memory; what goes beyond is in a scratch file.
        scratch: the folder of the scratch file (default: see `Scratch`).
        model: the `model` of a stream of the same checkpoint that is over, which saves building it again.
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
        model: PreTrainedModel | None = None,
    ) -> None:
        if checkpoint.quantized:
            raise UserError(
                f"{checkpoint.name}: is quantised, and cannot be streamed; take the weights in 16 or 32 bits"
            )
        self.checkpoint, self.batches, self.adapter = checkpoint, batches, adapter
        self.device, self.dtype, self.architecture = device, dtype, checkpoint.architecture
        return_freed_memory_()
        self.model = empty_model(checkpoint, dtype, dense=True) if model is None else model
        self._layers = cast(nn.ModuleList, self.model.get_submodule(self.architecture.layers_path))
        self._scratch = Scratch(hidden_bytes, scratch)
        # shape of a micro-batch -> layer -> what the model's own code passes to that layer beside the hidden states
        self._arguments: dict[tuple[int, ...], dict[int, dict[str, Any]]] = {}
        # layer -> what each token has there beside its hidden states, where the family's tokens have such values
        self._layer_inputs: dict[int, Activations] = {}
        sharing = self.architecture.shared_states
        self._shared = SharedStates(self._scratch, dtype, device, read=sharing is not None and bool(sharing.readers))
        self._inputs: dict[int, Activations] = {}  # what each layer read, where `backward` needs it
        self._final: Activations | None = None  # what the last layer gave
        self._factors: dict[str, Tensor] = {}  # the adapter's factors on the resident layer
        self.loss: float | None = None

    @property
    def predicted(self) -> int:
        """Return how many tokens are in the loss."""
        return sum(len(batch.targets) for batch in self.batches)

    def forward(
        self,
        observe: Observer | None = None,
        keep_from: int | None = None,
        edit: Editor | None = None,
        observe_experts: ExpertsObserver | None = None,
        observe_layer: LayerObserver | None = None,
        gather: Observer | None = None,
    ) -> Generator[ResidentLayer, None, None]:
        """Send all micro-batches through layer after layer, and yield each layer when they have passed it.

        Where there is a `gather`, micro-batches without a token in the loss pass for it alone.

        Args:
            observe: called for every linear of a decoder layer and every micro-batch, with the weight's full name, the
                linear's inputs (rows, width, in_features), its outputs (rows, width, out_features), and where these are
                text and not padding, (rows, width) bool.
            keep_from: keep the inputs of this layer and of those above it, for `backward`.
            edit: called with each layer once it has been observed. It may change the layer's weights in place: the
                micro-batches then pass the layer a second time, and the next layer sees what comes out of that.
            observe_experts: called for every layer with experts and every micro-batch, with the layer's index, the
                module that holds the experts, and, flattened to (tokens, ...): the hidden states that it reads, the
                numbers and the weights of each token's experts, (tokens, k) both, and where tokens are text, bool.
            observe_layer: called for every decoder layer and every micro-batch, with the layer's index, its inputs and
                outputs, (rows, width, hidden) each, and where these are text, as `observe`.
            gather: called as `observe`, and nothing else sees micro-batches without a token in the loss then.
        """
        observers = _Observers(linears=observe, experts=observe_experts, layer=observe_layer, gather=gather)
        current = self._embed()
        with contextlib.closing(self._resident(range(len(self._layers)), "Layers, forward")) as layers:
            for layer in layers:
                keep = keep_from is not None and layer.index >= keep_from
                outputs = self._room() if keep else current
                if edit is not None:
                    self._pass(layer.index, current, None, observers)
                    edit(layer)
                self._pass(layer.index, current, outputs, _Observers(layer=observe_layer) if edit else observers)
                if keep:
                    self._inputs[layer.index], current = current, outputs
                elif layer.index in self._layer_inputs:
                    self._layer_inputs.pop(layer.index).close()
                yield layer
        self._final = current
        if keep_from is None:
            self._shared.close()

    def _pass(
        self,
        index: int,
        inputs: Activations,
        outputs: Activations | None,
        observers: _Observers,
        leaving: Sequence[int] = (),
    ) -> None:
        """Send all micro-batches through one layer, but for those whose numbers are `leaving`."""
        for number, batch in enumerate(self.batches):
            if number in leaving:
                continue
            before, own = inputs[number].to(self.device), observers.of(batch)  # (rows, width, hidden)
            with torch.no_grad(), self._observed(index, batch, own):
                after = self._call(index, number, before, self._shared.of(number))
            if own.layer is not None:
                own.layer(index, before, after, batch.real.to(self.device))
            if outputs is not None:
                outputs[number] = after

    def backward(
        self, down_to: int, on_gradient: OnGradient | None, *, of: Of = "weights", gather: Observer | None = None
    ) -> Iterator[ResidentLayer]:
        """Walk down from the loss, the mean over all wanted tokens, and yield each layer when its gradients are done.

        The gradients are those of the whole model (reverse mode; each layer is computed again from its kept inputs),
        by the weights of the decoder layers' linears and experts or by the adapter's factors, those on the head too.
        Sets `loss`, in nats per token.

        Args:
            down_to: the last layer to visit; `forward` must have kept the inputs from this layer on.
            on_gradient: called once for every weight with its full name, the weight and its gradient, which have one
                shape; the gradient's memory is freed after the call. None: only pass gradients from layer to layer.
            of: what to differentiate by; factors go by PEFT's names. `weights` are those of linears.
            gather: called as in `forward`, while a layer is computed again; micro-batches without a token in the loss
                are then computed again for it alone, without gradients.
        """
        assert self._final is not None, "forward has not come to its end"
        head, gradients, observers = self._head(), self._room(), _Observers(gather=gather)
        differentiated = [number for number, batch in enumerate(self.batches) if not observers.beside(batch)]
        self.loss = head.gradient(gradients, on_gradient if of == "factors" else None)
        self._final.close()
        for layer in self._resident(range(len(self._layers) - 1, down_to - 1, -1), "Layers, backward"):
            inputs = self._inputs.pop(layer.index)
            with self._differentiated(layer, on_gradient, of) as state:
                if len(differentiated) < len(self.batches):
                    self._pass(layer.index, inputs, None, observers, leaving=differentiated)
                for number in differentiated:
                    state["last"] = number == differentiated[-1]
                    x = inputs[number].to(self.device).detach()  # (rows, width, hidden), as y and both gradients
                    x.requires_grad_(layer.index > down_to or on_gradient is None)
                    shared = self._shared.of(number)
                    with torch.enable_grad(), self._observed(layer.index, self.batches[number], observers):
                        y = self._call(layer.index, number, x, shared)
                    roots = [(y, gradients[number].to(self.device)), *shared.roots()]
                    torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
                    shared.keep_gradients()
                    if x.grad is not None:
                        gradients[number] = x.grad
                    del x, y, roots, shared
            inputs.close()
            if layer.index in self._layer_inputs:
                self._layer_inputs.pop(layer.index).close()
            yield layer
        gradients.close()
        self._shared.close()

    def log_probs(self) -> list[Tensor]:
        """Return the log-probability of each wanted target: (wanted,) float32 for each micro-batch, in nats."""
        return self._head().log_probs()

    def top_k(self, k: int) -> list[TopK]:
        """Return the `k` likeliest next tokens at the wanted places, for each micro-batch."""
        return self._head().top_k(k)

    def logits(self) -> list[Tensor]:
        """Return the logits at the wanted places, for each micro-batch: (wanted, vocabulary) float32, on the CPU."""
        return self._head().logits()

    def _head(self) -> Head:
        """Return the model's end, with the final norm's weights in place."""
        assert self._final is not None, "forward has not come to its end"
        path = self.architecture.final_norm_path
        norm = self.model.get_submodule(path)
        weights = {name: self.checkpoint.tensor(f"{path}.{name}") for name, _ in norm.named_parameters()}
        _fill_(norm, weights, self.device)
        return Head(
            self.checkpoint,
            norm,
            self.batches,
            self._final,
            self._scratch,
            adapter=self.adapter,
            device=self.device,
            dtype=self.dtype,
        )

    def _room(self) -> Activations:
        """Room for the hidden state of every token: (rows, width, hidden) for each micro-batch."""
        return self._room_for(self.model.config.get_text_config().hidden_size)

    def _room_for(self, width: int) -> Activations:
        """Room for `width` values of every token."""
        return self._scratch.room([(*batch.ids.shape, width) for batch in self.batches], self.dtype)

    def _embed(self) -> Activations:
        """Return the hidden states before the first layer: run the model's own forward pass with layers that record.

        Only the embeddings' rows that the text uses are read.
        """
        row, decoder = self.architecture, self.model.get_submodule(self.architecture.decoder)
        used = torch.unique(torch.cat([batch.ids.flatten() for batch in self.batches]))  # sorted token ids
        weights = {name: self._rows(name, used) for name in row.embedding_weights}
        weights |= {name: self.checkpoint.tensor(name) for name in row.weights_before_layers if name not in weights}
        fill_before_layers_(self.model, weights, self.device)
        for module in decoder.children():
            if next(module.parameters(), None) is None:  # rotary tables
                module.to(self.device)
        hidden, own = self._room(), row.layer_input
        notes: dict[int, dict[str, Any]] = {}
        number = 0

        def note(index: int, hidden_states: Tensor, **arguments: Any) -> Tensor:
            if own is not None and own.readers and own.name in arguments:
                values = arguments.pop(own.name)  # (rows, width, values)
                if index not in self._layer_inputs:
                    self._layer_inputs[index] = self._room_for(values.shape[-1])
                self._layer_inputs[index][number] = values
            notes[index] = arguments
            return hidden_states

        with torch.no_grad(), without_layers(self.model, row, note):
            for number, batch in enumerate(self.batches):
                ids = torch.searchsorted(used, batch.ids).to(self.device)  # places in `used`, (rows, width)
                hidden[number] = decoder(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
                self._arguments[tuple(ids.shape)] = dict(notes)
        for name in weights:  # the modules' buffers stay
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            setattr(module, leaf, nn.Parameter(module.get_parameter(leaf).to("meta"), requires_grad=False))
        return hidden

    def _rows(self, name: str, tokens: Tensor) -> Tensor:
        """Return the rows of an embedding's weight for some sorted tokens."""
        if tokens[-1] >= (known := self.checkpoint.shape(name)[0]):
            raise UserError(f"{self.checkpoint.name}: token id {tokens[-1]}, but its embedding has only {known} rows")
        return torch.cat([self.checkpoint.tensor(name, token, token + 1) for token in tokens.tolist()])

    def _call(self, index: int, number: int, hidden: Tensor, shared: BatchStates) -> Tensor:
        """Return a layer's output for a micro-batch.

        Args:
            index: the layer's index.
            number: the micro-batch's index.
            hidden: the hidden states, (rows, width, hidden), as the output.
            shared: what the layer reads of earlier ones, and sets for later ones.
        """
        row, arguments = self.architecture, {**self._arguments[tuple(self.batches[number].ids.shape)][index]}
        if row.layer_input is not None and index in self._layer_inputs:
            arguments[row.layer_input.name] = self._layer_inputs[index][number].to(self.device)
        if row.shared_states is not None:
            arguments[row.shared_states.name] = shared
        output: Tensor = self._layers[index](hidden.to(self.device), **arguments)
        return output

    def _resident(self, indices: Sequence[int], description: str) -> Generator[ResidentLayer, None, None]:
        """Layers with their weights and adapter in place, one at a time, while the next one is being read.

        A layer's experts are nearly all of it, and are read when the layer before is gone.
        """
        loads = prefetched(indices, self._read_ahead)
        with contextlib.closing(loads):
            for index in track(indices, description):
                layer, weights = self._layers[index], next(loads)
                _fill_(layer, weights, self.device)
                prefix = self.architecture.layer_path(index)
                for name in self._experts(index):
                    _fill_(layer, {name.removeprefix(f"{prefix}."): self.checkpoint.tensor(name)}, self.device)
                tensors = {f"{prefix}.{name}": tensor for name, tensor in layer.state_dict().items()}
                handles = self._adapt_(index)
                try:
                    yield ResidentLayer(index=index, tensors=tensors)
                finally:  # whoever is stopped within a layer may stream the same modules again
                    tensors.clear()  # else whoever still holds the layer would hold its weights while the next is read
                    for handle in handles:
                        handle.remove()
                    layer.to_empty(device="meta")

    def _read_ahead(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a layer by their names in it, all but its experts."""
        prefix = self.architecture.layer_path(index)
        names = {name: f"{prefix}.{name}" for name in self._layers[index].state_dict()}
        experts = self._experts(index)
        return {name: self.checkpoint.tensor(full) for name, full in names.items() if full not in experts}

    def _linears(self, index: int) -> Iterator[tuple[str, nn.Linear]]:
        """Yield (full path, module) of every linear of a layer."""
        prefix = self.architecture.layer_path(index)
        linears: tuple[Linear, ...] = self.checkpoint.rows_by_layer[index].linears
        for linear in linears:
            yield f"{prefix}.{linear.path}", cast(nn.Linear, self._layers[index].get_submodule(linear.path))

    def _experts(self, index: int) -> dict[str, nn.Parameter]:
        """Return the 3-D tensors of a layer's experts by their full names; none where it has no experts."""
        row, prefix = self.checkpoint.rows_by_layer[index], self.architecture.layer_path(index)
        if row.experts is None:
            return {}
        path = row.experts.path
        parameters = self._layers[index].get_submodule(path).named_parameters()
        return {f"{prefix}.{path}.{name}": parameter for name, parameter in parameters}

    def _adapt_(self, index: int) -> list[RemovableHandle]:
        """Let the layer's linears add their adapter's update, as PEFT does: factors and their product in float32.

        A DoRA adapter also scales what the weight itself gives, so it goes into the weight, which is gone after use. So
        does an adapter on experts, one expert after the other.
        """
        self._factors.clear()
        handles = []
        for path, module in self._linears(index):
            if self.adapter is None or path not in self.adapter.modules:
                continue
            if self.adapter.dora:
                module.weight.data = self.adapter.updated(path, module.weight.data).to(module.weight)
                continue
            handle, factors = self.adapter.add_to_(module, path, self.device)
            self._factors |= factors
            handles.append(handle)
        self._adapt_experts_(index)
        return handles

    def _adapt_experts_(self, index: int) -> None:
        """Add the adapter's update to the layer's tensors of experts."""
        transposed = self.architecture.experts_transposed
        for name, tensor in self._experts(index).items():
            if self.adapter is None or name not in self.adapter.modules:
                continue
            for expert, weight in enumerate(tensor.data.split(1)):  # (1, out_features, in_features)
                weight.copy_(self.adapter.updated(name, weight, expert, transposed=transposed))

    @contextlib.contextmanager
    def _observed(self, index: int, batch: Batch, observers: _Observers) -> Iterator[None]:
        """Call the observers for each linear of a layer, and for its experts, while a micro-batch passes."""
        real, handles = batch.real.to(self.device), []

        def see_linear(_: nn.Module, args: Any, output: Tensor, name: str) -> None:
            inputs, outputs = (tensor.reshape(*real.shape, -1) for tensor in (args[0], output))  # experts flatten them
            for observe in observers.of_linears:
                observe(name, inputs, outputs, real)

        def see_experts(module: nn.Module, args: Any) -> None:
            assert observers.experts is not None
            hidden, numbers, weights = (tensor.reshape(real.numel(), -1) for tensor in args)
            observers.experts(index, module, hidden, numbers, weights, real.flatten())

        if observers.of_linears:
            for path, linear in self._linears(index):
                handles.append(linear.register_forward_hook(functools.partial(see_linear, name=f"{path}.weight")))
        if observers.experts is not None and (experts := self.checkpoint.rows_by_layer[index].experts) is not None:
            module = self._layers[index].get_submodule(experts.path)
            handles.append(module.register_forward_pre_hook(see_experts))
        yield
        for handle in handles:
            handle.remove()

    @contextlib.contextmanager
    def _differentiated(
        self, layer: ResidentLayer, on_gradient: OnGradient | None, of: Of
    ) -> Iterator[dict[str, bool]]:
        """Collect gradients; each is handed over, and freed, when the last micro-batch is through."""
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
        if of != "factors":
            wanted = {f"{path}.weight": module.weight for path, module in self._linears(layer.index)}
        if of == "weights and experts":
            wanted |= self._experts(layer.index)
        handles = []
        for name, tensor in wanted.items():
            tensor.requires_grad_()
            handles.append(after_gradient(tensor, functools.partial(done, name=name)))
        yield state
        for handle in handles:
            handle.remove()


def after_gradient(tensor: Tensor, call: Callable[[Tensor], None]) -> RemovableHandle:
    """Have a leaf tensor call a function each time that a backward pass has added to its gradient."""
    # torch leaves this method untyped
    register = cast(Callable[..., RemovableHandle], tensor.register_post_accumulate_grad_hook)
    return register(call)


def _fill_(module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give an empty module its weights and buffers; each is dropped from `tensors` as it is converted.

    Their dtypes are those of the module: some families keep their routers in float32, whatever the others compute in.
    """
    for name in list(tensors):
        owner, _, leaf = name.rpartition(".")
        parent, tensor = module.get_submodule(owner), tensors.pop(name)
        old: Tensor = getattr(parent, leaf)
        if tensor.shape != old.shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, but config.json says {tuple(old.shape)}")
        tensor = tensor.to(device, old.dtype)
        setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)
