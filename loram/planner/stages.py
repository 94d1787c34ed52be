"""Estimate the disk and the peak RAM of each stage when everything computes on a CPU.

What a stage holds follows from `loram.compute.streaming` and from the stages' own code. The figures are rounded up, and
every layer counts as much as the largest. `benchmarks/streaming.json` has measured peaks to compare them with.
"""

from pydantic import BaseModel, ConfigDict

from loram.base.constants import BATCH_TOKENS, BLOCK_BYTES, HELD_TOKENS, HIDDEN_BYTES
from loram.planner.activations import mlp_values
from loram.planner.layer import Layer
from loram.planner.memory import TrainingMemory, course_bytes
from loram.planner.settings import Settings
from loram.planner.shapes import Model
from loram.planner.streamed import hidden_bytes, hidden_in_ram, read_ahead
from loram.planner.weights import factors, file_bytes

IMPORTS = 1 << 29  # torch, transformers and PEFT, imported
_TRAINER = 1 << 27  # TRL, bitsandbytes, the data set and the Trainer, beside the imports
_LOGITS = 1 << 28  # bytes of the logits of a batch that is evaluated in memory
_TOP_K_BYTES = 64 * 6 + 2
_FLOAT32 = 4


class Stage(BaseModel):
    """What a stage needs.

    Args:
        name: the command's name.
        disk: the bytes that it needs on disk, its result included.
        memory: the bytes of RAM that it takes at its peak, the imported libraries included.
        holds: the largest things in that memory, in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    disk: int
    memory: int
    holds: str


def stages(full: Model, model: Model, settings: Settings, training: TrainingMemory) -> tuple[Stage, ...]:
    """Return every stage of a run in order; pruning and recovery are among them only if the model is pruned."""
    pruned = model.pruned
    table = [*_prune(full, model), _teach(full)] if pruned else []
    table.append(_train(model, settings, training))
    wide, narrow = (4 * sum(factors(of, settings)) for of in (full, model))
    if pruned:
        table.append(
            Stage(name="recover", disk=wide, memory=IMPORTS + narrow + wide, holds="both adapters, in float32")
        )
    merged = full.parameters * file_bytes(full)
    table.append(
        Stage(
            name="merge",
            disk=merged,
            memory=IMPORTS + wide + 6 * BLOCK_BYTES,
            holds="the adapter and a few rows of a weight",
        )
    )
    return (*table, *_evaluate(full, wide))


def _prune(full: Model, model: Model) -> list[Stage]:
    stored, disk = _layer(full, file_bytes(full)), model.parameters * file_bytes(full)
    disk += sum(layer.mask_bytes for layer in model.layers)
    layer, largest = _layer(full, _FLOAT32), _FLOAT32 * max(layer.largest for layer in full.layers)
    stream = IMPORTS + HIDDEN_BYTES + layer + read_ahead(full) + _working(full)
    if model.sparse is not None:
        return _prune_sparse(full, disk, stored, stream)
    with_text = f"{_streamed_layers(full)}, and activations"
    if model.refit:
        stream, with_text = stream + _refit(full, model), f"{with_text}, and the products that the refit solves"
    if model.units is None:
        return [Stage(name="prune (block_influence)", disk=disk, memory=stream, holds=with_text)]
    return [
        Stage(
            name="prune (magnitude, random)",
            disk=disk,
            memory=stream if model.dropped or model.always_refit else IMPORTS + 3 * stored,
            holds=with_text if model.dropped or model.always_refit else "two decoder layers and the tensors to write",
        ),
        Stage(
            name="prune (wanda, flap, activation)",
            disk=disk,
            memory=max(stream, _head(full)),
            holds=with_text,
        ),
        Stage(
            name="prune (taylor)",
            disk=disk,
            memory=max(stream + 2 * largest, _head(full)),
            holds="the same, and the gradient of one weight",
        ),
    ]


def _refit(full: Model, model: Model) -> int:
    """Return the bytes that refitting a layer takes: its products in float32, and one block's solution in float64."""
    hidden, most, narrowed = full.geometry.hidden_size, 0, {layer.index: layer for layer in model.narrowed_layers}
    beside = hidden if model.bypass_rank else 0
    for layer in full.layers:
        paths = [linear.path for linear in model.refitted(layer.index)]
        widths = [(layer.shapes[path][1], narrowed[layer.index].shapes[path][1]) for path in paths]
        gathered = sum((wide + beside) ** 2 + HELD_TOKENS * (wide + beside) for wide, _ in widths)
        solved = [wide * kept + 3 * kept**2 + hidden * (wide + 6 * kept) + 6 * beside**2 for wide, kept in widths]
        most = max(most, _FLOAT32 * gathered + 2 * _FLOAT32 * max(solved, default=0))
    return most


def _prune_sparse(full: Model, disk: int, stored: int, stream: int) -> list[Stage]:
    """Return the stages of sparse pruning.

    SparseGPT holds a Hessian for each tensor that a layer's linears read, and works with three more of the largest.
    """
    hessians = max(map(_hessians, full.layers))
    return [
        Stage(
            name="prune (magnitude, random)",
            disk=disk,
            memory=IMPORTS + 4 * stored,
            holds="two decoder layers, the tensors to write and their scores",
        ),
        Stage(name="prune (wanda)", disk=disk, memory=stream, holds="two decoder layers, one of them in float32"),
        Stage(
            name="prune (sparsegpt)",
            disk=disk,
            memory=stream + hessians,
            holds="the same, and the Hessians of a layer's inputs",
        ),
    ]


def _hessians(layer: Layer) -> int:
    """Return the bytes of the Hessians of what the linears of a layer read, and of three more of the largest."""
    inputs = list({linear.reads: layer.shapes[path][1] for path, linear in layer.linears.items()}.values())
    return _FLOAT32 * (sum(width**2 for width in inputs) + 3 * max(inputs) ** 2)


def _teach(full: Model) -> Stage:
    return Stage(
        name="teach",
        disk=10**6 * _TOP_K_BYTES,
        memory=_streamed(full),
        holds=f"{_streamed_layers(full)}, hidden states and lm_head; the disk is for a million tokens",
    )


def _train(model: Model, settings: Settings, training: TrainingMemory) -> Stage:
    state = training.adapter + training.optimizer
    disk = 3 * state + sum(course_bytes(model, settings))
    if settings.streamed:
        disk += hidden_bytes(model, settings) - hidden_in_ram(model, settings)
    if settings.device == "cuda":
        host = IMPORTS + _TRAINER + training.host + training.pageable + 2 * model.vocabulary * 2
        if settings.anchored:
            host += 2 * HIDDEN_BYTES + 2 * _layer(model, 2)
        return Stage(
            name="train", disk=disk, memory=host, holds="offloaded tensors, and weights on their way to the GPU"
        )
    memory = IMPORTS + _TRAINER + training.total
    return Stage(name="train", disk=disk, memory=memory, holds="everything in the table above")


def _evaluate(full: Model, adapter: int) -> list[Stage]:
    held = full.parameters * _FLOAT32 + adapter + 3 * _LOGITS
    return [
        Stage(name="eval", disk=0, memory=IMPORTS + held, holds="the full model in float32; a GPU holds it in 16 bits"),
        Stage(
            name="eval --stream", disk=0, memory=_streamed(full) + adapter, holds="the same as teach, and the adapter"
        ),
    ]


def _streamed(full: Model) -> int:
    streaming = HIDDEN_BYTES + _layer(full, _FLOAT32) + read_ahead(full) + _working(full)
    return max(IMPORTS + streaming, _head(full))


def _head(full: Model) -> int:
    """Return the memory while logits are computed: the head, a slice of it in float32, and that slice's logits."""
    return IMPORTS + 2 * HIDDEN_BYTES + full.vocabulary * file_bytes(full) + 4 * BLOCK_BYTES


def _layer(model: Model, size: int) -> int:
    return size * max(layer.parameters for layer in model.layers)


def _streamed_layers(full: Model) -> str:
    mixture = any(layer.routed is not None for layer in full.layers)
    return "a decoder layer in float32" if mixture else "two decoder layers, one of them in float32"


def _working(full: Model) -> int:
    """Return the bytes of a micro-batch's activations inside the widest layer, in float32."""
    values = max(2 * layer.queries + mlp_values(full, layer) for layer in full.layers)
    return BATCH_TOKENS * _FLOAT32 * (4 * full.geometry.hidden_size + values)
