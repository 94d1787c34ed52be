"""Models whose frozen weights are kept in 4 bits: NF4 with double quantisation (QLoRA, arXiv 2305.14314).

bitsandbytes quantises and computes, and transformers' folder format holds the result. This file reads a model tensor by
tensor, so that only one of them is in 16 bits on the device at a time. It quantises the head, the embedding and the
experts too, which transformers leaves in 16 bits.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from loram.base.constants import NF4_BLOCK, NF4_NESTED_BLOCK
from loram.base.errors import UserError
from loram.base.progress import track
from loram.compute.device import return_freed_memory_
from loram.compute.loading import empty_model, keep_layout_
from loram.compute.nf4_cpu import mend_dequantisation_
from loram.compute.nf4_experts import put_experts_, use_4bit_experts_
from loram.disk.checkpoint import Checkpoint
from loram.disk.tensorfile import TensorSpec
from loram.model.modeling_loram import SparseLinear

mend_dequantisation_()
_STATE, _STATE_BYTES = "quant_state.bitsandbytes__nf4", 256


def load_4bit(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, offload_embedding: bool = False
) -> PreTrainedModel:
    """Load a full or pruned model with every linear, the head, the embeddings and the experts in NF4.

    Norms, biases and what routes tokens to experts are in `dtype`. Every expert's matrix is quantised by itself. Sparse
    linears have the values that they hold in NF4, in blocks of 64 in their own order; masks stay as they are.
    The largest tensors are quantised first, while there is most room. A tied head shares the embedding's 4 bits.

    Args:
        checkpoint: a folder in 16 or 32 bits, or one that `loram.quantize` made.
        device: where the model goes.
        dtype: the dtype that it computes in.
        offload_embedding: keep embeddings as they are, in host memory, and look their rows up there.

    Returns:
        The model in evaluation mode, all of it frozen.

    Raises:
        UserError: the family is not supported, or the folder's weights do not fit its config.
    """
    return_freed_memory_()  # else packed weights settle in the room that 16-bit ones leave, and it never is free again
    checkpoint = checkpoint.stored
    model: Any = empty_model(checkpoint, dtype)
    shapes = _shapes(checkpoint, model)
    row = checkpoint.architecture
    tied = {row.embedding_weight} if row.head_weight not in shapes else set()
    _replace_linears_(model, checkpoint, dtype)
    for name in track(sorted(shapes, key=lambda name: -checkpoint.spec(name).nbytes), "Loading in 4 bits"):
        if name in row.embedding_weights:
            _put_embedding_(model, checkpoint, name, shapes[name], device, dtype, offload_embedding, tied=name in tied)
        else:
            _put_(model, checkpoint, name, shapes[name], device, dtype)
    if row.experts is not None:
        use_4bit_experts_(model)
    keep_layout_(model)
    model.is_loaded_in_4bit = True  # PEFT looks here
    model = model.to(device)  # the buffers are not there yet
    return cast(PreTrainedModel, model.requires_grad_(False).eval())


def quantize(weight: Tensor) -> tuple[Tensor, QuantState]:
    """Quantise a weight to (packed, state): two values per byte, and its constants, which are in 8 bits themselves."""
    packed, state = quantize_4bit(weight, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    return packed, state


def as_4bit(weight: Tensor) -> Tensor:
    """Return a weight after it was quantised to NF4 and dequantised, in its own dtype and shape."""
    rounded: Tensor = dequantize_4bit(*quantize(weight))
    return rounded.view_as(weight)


def experts_as_4bit(weight: Tensor, *, transposed: bool) -> Tensor:
    """Return a 3-D tensor of experts after each was quantised to NF4 by itself, and dequantised.

    Args:
        weight: (experts, out_features, in_features), or (experts, in_features, out_features) if it is `transposed`.
        transposed: as above; blocks of 64 values lie along the inputs in either case.
    """
    matrices = weight.mT if transposed else weight
    rounded = torch.stack([as_4bit(matrix.contiguous()) for matrix in matrices])
    return rounded.mT.contiguous() if transposed else rounded


def dequantized(checkpoint: Checkpoint, name: str) -> tuple[Tensor, int]:
    """Return a weight that is in NF4 in a folder, dequantised, and how many values share a constant there."""
    constants: dict[str, Any] = {key: checkpoint.tensor(key) for key in checkpoint.constants(name)}
    weight = Params4bit.from_prequantized(checkpoint.tensor(name), constants, device="cpu")
    return cast(Tensor, dequantize_4bit(weight.data, weight.quant_state)), weight.quant_state.blocksize


def packed_specs(name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """Return the tensors that transformers' folder format has for a weight in NF4: their names, dtypes and shapes."""
    blocks = math.ceil(math.prod(shape) / NF4_BLOCK)
    return {
        name: TensorSpec(dtype=torch.uint8, shape=(math.ceil(math.prod(shape) / 2), 1)),
        f"{name}.absmax": TensorSpec(dtype=torch.uint8, shape=(blocks,)),
        f"{name}.nested_absmax": TensorSpec(dtype=torch.float32, shape=(math.ceil(blocks / NF4_NESTED_BLOCK),)),
        f"{name}.nested_quant_map": TensorSpec(dtype=torch.float32, shape=(256,)),
        f"{name}.quant_map": TensorSpec(dtype=torch.float32, shape=(16,)),
        f"{name}.{_STATE}": TensorSpec(dtype=torch.uint8, shape=(_STATE_BYTES,)),
    }


def packed_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors that `packed_specs` describes, for a weight."""
    packed, state = quantize(weight)
    tensors = {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
    text = tensors[f"{name}.{_STATE}"]  # JSON, whose length depends on its numbers; blanks at its end change nothing
    blanks = torch.full((_STATE_BYTES - len(text),), ord(" "), dtype=torch.uint8)
    return {**tensors, f"{name}.{_STATE}": torch.cat([text, blanks])}


def count_parameters(model: nn.Module) -> int:
    """Return how many parameters a model has; a weight in NF4 counts as many as the weight that it stands for."""
    return sum(math.prod(_state(p).shape) if is_4bit(p) else p.numel() for p in model.parameters())


def is_4bit(parameter: Tensor) -> bool:
    """Return whether a parameter is in NF4."""
    return isinstance(parameter, Params4bit)


def _state(weight: Tensor) -> QuantState:
    """Return the constants of an NF4 weight; torch's types do not know that attribute."""
    return cast(Params4bit, weight).quant_state


def nbytes(model: nn.Module) -> int:
    """Return the bytes of all weights and constants of a model, each counted once, wherever they are."""
    sizes: dict[int, int] = {}  # by where a tensor is in memory
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, HostEmbedding):
            tensors.append(module.table)
        for tensor in tensors:
            sizes[tensor.data_ptr()] = tensor.nbytes
            for constant in _constants(_state(tensor)) if is_4bit(tensor) else ():
                sizes[constant.data_ptr()] = constant.nbytes
    return sum(sizes.values())


def _constants(state: QuantState) -> list[Tensor]:
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


class SparseLinear4bit(SparseLinear):
    """A sparse linear whose values are in NF4."""

    def values(self) -> Tensor:
        """Return the values, (count,), dequantised to the dtype that the model computes in."""
        values: Tensor = dequantize_4bit(self.weight.data, _state(self.weight))
        return values


class _Lookup(nn.Module):
    """An embedding that has only the rows that a batch uses in full precision."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        embedding.padding_idx = None  # it would be looked for among the rows of the batch
        self.embedding = embedding  # the family's own module, since some scale what they look up

    def rows(self, ids: Tensor) -> Tensor:
        """Return the embedding's rows for some tokens: (tokens,) -> (tokens, hidden size)."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Look up tokens as the family's embedding does: (...) -> (..., hidden size)."""
        places = torch.arange(ids.numel(), device=ids.device).view_as(ids)  # in the rows of this batch
        return cast(Tensor, functional_call(self.embedding, {"weight": self.rows(ids.flatten())}, (places,)))


class Nf4Embedding(_Lookup):
    """An embedding in NF4, which dequantises the rows that are looked up."""

    def __init__(self, embedding: nn.Embedding, weight: Params4bit) -> None:
        super().__init__(embedding)
        self.weight = weight

    def rows(self, ids: Tensor) -> Tensor:
        """Return the dequantised rows for some tokens: (tokens,) -> (tokens, hidden size)."""
        return dequantized_rows(self.weight, ids)


class HostEmbedding(_Lookup):
    """An embedding in host memory, in the file's dtype; the rows that are looked up go to the device."""

    def __init__(self, embedding: nn.Embedding, table: Tensor, dtype: torch.dtype) -> None:
        super().__init__(embedding)
        self.table, self.dtype = table, dtype  # not a parameter, or it would move to the device with the others

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows for some tokens, on the tokens' device: (tokens,) -> (tokens, hidden size)."""
        return self.table[ids.to(self.table.device)].to(ids.device, self.dtype)


def dequantized_rows(weight: Params4bit, rows: Tensor) -> Tensor:
    """Return rows of an NF4 weight, (rows, columns); all of it is dequantised only if a block can be in two rows."""
    state, (_, columns) = weight.quant_state, weight.quant_state.shape
    if columns % state.blocksize:
        return cast(Tensor, dequantize_4bit(weight.data, state)[rows])
    # the numbers of the rows' blocks: (rows, columns / 64)
    blocks = rows[:, None] * (columns // state.blocksize) + torch.arange(columns // state.blocksize, device=rows.device)
    nested = state.state2
    constants = nested.code[state.absmax[blocks].long()] * nested.absmax[blocks // nested.blocksize] + state.offset
    part = QuantState(
        absmax=constants.flatten(),
        shape=torch.Size((len(rows), columns)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    packed = weight.data.view(-1, columns // 2)[rows]  # two values per byte
    return cast(Tensor, dequantize_4bit(packed.view(-1, 1), part))


def _shapes(checkpoint: Checkpoint, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters and stored buffers, all of which are in its checkpoint as they should.

    The shapes of weights in NF4 are only known when they are read.
    """
    stored = model.state_dict().keys()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in stored}
    names = checkpoint.names()
    if missing := sorted(shapes.keys() - set(names)):
        raise UserError(f"{checkpoint.folder}: no tensor {missing[0]}, which config.json's model has")
    for name, shape in shapes.items():
        if not checkpoint.constants(name):
            _check_shape(checkpoint, name, checkpoint.shape(name), shape)
    known = {*shapes, checkpoint.architecture.head_weight}  # some tools write the head also where it is tied
    if unknown := [name for name in names if checkpoint.weight_of(name) not in known]:
        raise UserError(f"{checkpoint.folder}: has a tensor {unknown[0]}, which config.json's model has not")
    return shapes


def _replace_linears_(model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Give a model empty linears for weights in NF4."""
    linears = linear_shapes(checkpoint, model)
    for name, module in list(model.named_modules()):
        if f"{name}.weight" in linears:
            model.set_submodule(name, _empty_linear(module, dtype))
        elif isinstance(module, SparseLinear):
            model.set_submodule(name, SparseLinear4bit(module, len(module.weight)))


def linear_shapes(checkpoint: Checkpoint, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a model's linears that are in NF4, by name; those of routers stay whole."""
    architecture = checkpoint.architecture
    whole = {parameter.name for parameter in architecture.parameters}
    shapes = {f"{name}.weight": module for name, module in model.named_modules() if type(module) is nn.Linear}
    places = {name: architecture.split(name) for name in shapes}
    return {
        name: (module.out_features, module.in_features)
        for name, module in shapes.items()
        if (place := places[name]) is None or place[1] not in whole
    }


def _put_(
    model: Any, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a model one tensor of its checkpoint: in NF4, or as it is."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Linear4bit) and own == "weight":
        _put_weight_(module, read_4bit(checkpoint, name, shape, device, dtype))
    elif isinstance(module, SparseLinear) and own == "weight":
        module.weight = read_4bit(checkpoint, name, shape, device, dtype)
    elif holds_experts(checkpoint, name):
        put_experts_(module, own, (pack(matrix, device, dtype) for matrix in expert_matrices(checkpoint, name)))
    else:
        packed = checkpoint.constants(name)  # transformers quantises linears that stay whole here
        tensor = (dequantized(checkpoint, name)[0] if packed else checkpoint.tensor(name)).to(device)
        is_buffer = own in dict(module.named_buffers(recurse=False))
        setattr(module, own, tensor if is_buffer else nn.Parameter(tensor.to(dtype), requires_grad=False))


def _empty_linear(linear: nn.Linear, dtype: torch.dtype) -> Linear4bit:
    return Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )


def _put_weight_(linear: Linear4bit, weight: Params4bit) -> None:
    linear.weight, linear.quant_state, weight.module = weight, weight.quant_state, linear


def _put_embedding_(
    model: Any,
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    offload: bool,
    *,
    tied: bool,
) -> None:
    """Give a model an embedding, and its head where that is tied to it."""
    path = name.rpartition(".")[0]
    embedding = model.get_submodule(path)
    weight = None if offload and not tied else read_4bit(checkpoint, name, shape, device, dtype)
    if offload:
        model.set_submodule(path, HostEmbedding(embedding, checkpoint.tensor(name), dtype))
    else:
        model.set_submodule(path, Nf4Embedding(embedding, weight))
    if tied:
        _put_weight_(model.get_output_embeddings(), weight)


def read_4bit(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Params4bit:
    """Return a weight in NF4 on the device; it is quantised now, unless it is in NF4 in the folder already."""
    if not (stats := checkpoint.constants(name)):
        return pack(checkpoint.tensor(name), device, dtype)
    tensors: dict[str, Any] = {key: checkpoint.tensor(key) for key in stats}
    weight = Params4bit.from_prequantized(checkpoint.tensor(name), tensors, device=device)
    _check_shape(checkpoint, name, tuple(weight.quant_state.shape), shape)
    weight.quant_state.dtype = dtype
    return weight


def pack(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Params4bit:
    """Return a weight quantised to NF4 on a device, for a model that computes in `dtype`."""
    packed, state = quantize(weight.to(device))
    state.dtype = dtype  # backward dequantises to this, forward to the dtype of its input
    return Params4bit(packed, quant_state=state, blocksize=NF4_BLOCK, quant_type="nf4", bnb_quantized=True)


def holds_experts(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor has one matrix per expert."""
    place = checkpoint.architecture.split(name)
    return place is not None and any(place[1] == tensor.name for tensor in checkpoint.architecture.expert_matrices)


def expert_matrices(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """Yield the matrix of each expert in a 3-D tensor, (out_features, in_features), of which one is in memory."""
    for expert in range(checkpoint.shape(name)[0]):
        (matrix,) = checkpoint.tensor(name, expert, expert + 1)
        yield matrix.T.contiguous() if checkpoint.architecture.experts_transposed else matrix


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise UserError(f"{checkpoint.folder}: {name} has shape {shape}, but config.json's model has {expected}")
