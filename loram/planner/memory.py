"""The peak memory of a training: what is held throughout, and the moment of a step that needs most."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod

from pydantic import BaseModel, ConfigDict

from loram.base.constants import CHUNK_TOKENS, HIDDEN_BYTES, MEASURED_TOKENS
from loram.planner.activations import (
    Sizes,
    kept_per_weight,
    layer_input,
    mlp_values,
    offloaded_stash,
    saved_around_layers,
    saved_by_layer,
    saved_by_layers,
    saved_by_mlp,
)
from loram.planner.layer import Layer, Routed
from loram.planner.settings import Settings
from loram.planner.shapes import Model
from loram.planner.streamed import head_moment, host_bytes, layer_moment, micro_batch_rows
from loram.planner.weights import (
    WeightBytes,
    factors,
    file_bytes,
    frozen_bytes,
    optimizer_bytes,
    pageable_bytes,
    trained,
)

CONTEXT = 1 << 29  # bytes of CUDA and its libraries; they depend on driver and card and cannot be counted
_FLOAT32 = 4


class TrainingMemory(BaseModel):
    """The bytes on the device that trains, at the moment of a training step that needs most.

    Args:
        moment: which moment that is.
        weights: the frozen model's weights; of a streamed one, a layer, and what stays in memory.
        constants: what NF4 weights need beside their 4 bits.
        adapter: the whole adapter.
        gradients: the gradients that exist at that moment.
        optimizer: the optimiser's state.
        activations: the activations that are kept from the forward for the backward pass.
        recomputation: one checkpointed layer's activations while it is computed again, and gradients inside a layer.
        logits: the logits of one chunk of tokens, with their softmax and gradient.
        scratch: the largest 4-bit or sparse weight in use, in full; and while anchors are measured a full layer.
        context: CUDA's context, by a rule of thumb.
        pageable: the part of `optimizer` that may go to host memory when the GPU is short.
        host: the bytes in host memory: an offloaded embedding and offloaded activations; of a streamed model layers on
            their way to the GPU, hidden states, and what is kept.
        total: the sum, without `pageable` and `host`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    moment: str
    weights: int
    constants: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    recomputation: int = 0
    logits: int = 0
    scratch: int = 0
    context: int
    pageable: int
    host: int
    total: int


class _Moment(BaseModel):
    """The bytes that one moment needs on top of what is held throughout."""

    name: str
    weights: int = 0
    gradients: int = 0
    activations: int = 0
    recomputation: int = 0
    logits: int = 0
    scratch: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.activations + self.recomputation + self.logits + self.scratch


def training_memory(model: Model, settings: Settings, full: Model | None = None) -> TrainingMemory:
    """Return the peak memory of training an adapter on a model, anchored on the `full` one if the settings say so."""
    frozen = WeightBytes(weights=0, constants=0, host=0) if settings.streamed else frozen_bytes(model, settings)
    held = {
        "constants": frozen.constants,
        "adapter": sum(factors(model, settings)) * settings.lora_bytes,
        "optimizer": optimizer_bytes(model, settings),
        "context": CONTEXT if settings.device == "cuda" else 0,
    }
    moments = list(_streamed(model, settings) if settings.streamed else _moments(model, settings))
    if settings.anchored and full is not None:
        moments.append(_measuring(full, model, settings))
    kept = min(settings.ram_bytes, full.parameters * file_bytes(full)) if settings.anchored and full is not None else 0
    weights = frozen.weights + (kept if settings.device == "cpu" else 0)
    most = max(moments, key=lambda moment: moment.total)
    offloaded = layer_input(model, settings) * len(model.layers) if settings.offloaded else 0
    if settings.streamed and settings.device == "cuda":
        offloaded = host_bytes(model, settings)
    return TrainingMemory(
        moment=most.name,
        weights=weights + most.weights,
        **held,
        **most.model_dump(exclude={"name", "weights"}),
        pageable=pageable_bytes(model, settings),
        host=frozen.host + offloaded + (kept if settings.device == "cuda" else 0),
        total=weights + sum(held.values()) + most.total,
    )


def _moments(model: Model, settings: Settings) -> Iterator[_Moment]:
    """Yield the moments of a step: the backward pass through the loss and each layer, and the optimiser's step."""
    gradients = _gradients(model, settings)
    kept = _kept(model, settings)
    everything = kept[-1] + saved_around_layers(model, settings) + _casts(model, settings)
    yield from _loss(model, settings, everything, gradients[-1])
    around = _casts(model, settings)
    for index, layer in enumerate(model.layers):
        again = saved_by_layer(model, layer, settings) if settings.checkpointed else 0
        yield _Moment(
            name=f"backward through layer {layer.index}",
            gradients=gradients[index],
            activations=kept[index] + around,
            recomputation=again + _inside(model, layer, settings),
            scratch=_unpacked(layer, settings),
        )
    yield _Moment(name="the optimiser's step", gradients=gradients[0])


def _streamed(model: Model, settings: Settings) -> Iterator[_Moment]:
    """Yield the moments of a step of the streamed engine, which keeps all gradients until the optimiser's step."""
    gradients = settings.lora_bytes * sum(trained(model, settings))
    parts = layer_moment(model, settings)
    during = settings.measuring(rows=micro_batch_rows(settings))
    parts["recomputation"] += max(_inside(model, layer, during) for layer in model.layers)
    yield _Moment(name="backward through a streamed layer", gradients=gradients, **parts)
    yield _Moment(name="logits of a streamed model", gradients=gradients, **head_moment(model, settings))


def _measuring(full: Model, model: Model, settings: Settings) -> _Moment:
    """Return the moment when anchors are measured: a micro-batch is in a layer of the full model and in the pruned one.

    No step is under way then. The full layer is in the computing dtype, and its adapter computes in float32, without
    dropout. A layer that was dropped has no pruned part. On a CPU the next layer is being read meanwhile, and hidden
    states and measurements are in memory, each up to its budget.
    """
    during = settings.measuring(rows=max(1, MEASURED_TOKENS // settings.length))
    layer = max(full.layers, key=lambda layer: layer.parameters)
    small = max(_differing(model, settings), key=lambda layer: layer.parameters, default=None)
    inputs = sum(columns for _, columns in layer.shapes.values())
    saved, unpacked = saved_by_layer(full, layer, during), 0
    if small is not None:
        saved += saved_by_layer(model, small, during)
        unpacked = _unpacked(small, settings)
    if settings.device == "cuda":
        saved += during.tokens * inputs * _FLOAT32
    forward = during.tokens * mlp_values(full, layer) * settings.compute_bytes
    weights, states = layer.parameters * settings.compute_bytes, 0
    if settings.device == "cpu":
        weights += layer.parameters * file_bytes(full)
        states = sum(min(HIDDEN_BYTES, count) for count in course_bytes(model, settings))
    return _Moment(
        name="measuring the full model's course",
        activations=states + (saved if settings.gradients_measured else forward),
        recomputation=_inside(full, layer, during) + 8 * layer_input(full, during),
        scratch=weights + unpacked,
    )


def _differing(model: Model, settings: Settings) -> Sequence[Layer]:
    """Return the layers of a pruned model that are other than the full model's; in 4 bits these are all."""
    return model.layers if settings.quantised else model.narrowed_layers


def course_bytes(model: Model, settings: Settings) -> tuple[int, int]:
    """Return the bytes that a measurement for anchors needs, in memory or on disk.

    Returns:
        (bytes of the hidden states before every layer, bytes of the measured differences). Attention and MLP differ
        each, in outputs and in gradients; whole layers in full precision do not differ. A dropped layer differs as one.
    """
    states = settings.course_tokens * model.geometry.hidden_size * settings.compute_bytes
    measured = 2 * len(_differing(model, settings)) + len(model.dropped)
    if settings.gradients_measured:
        return model.geometry.num_hidden_layers * states, 2 * measured * states
    return states, measured * states


def _kept(model: Model, settings: Settings) -> list[int]:
    """Return the bytes that the layers up to each one keep for the backward pass."""
    if settings.checkpointed:
        most = offloaded_stash(model) if settings.offloaded else len(model.layers)
        return [min(count, most) * layer_input(model, settings) for count in range(1, len(model.layers) + 1)]
    return list(accumulate(saved_by_layers(model, settings)))


def _gradients(model: Model, settings: Settings) -> list[int]:
    """Return the bytes of gradients after the backward pass has done each layer and, as the last entry, after the loss.

    All gradients exist from the start when several micro-batches are accumulated.
    """
    sizes = [settings.lora_bytes * parameters for parameters in trained(model, settings)]
    factors_of = [2 * len(layer.targeted(settings.targets)) for layer in model.layers]  # lora_A and lora_B of each
    if settings.micro_batches > 1:
        return [sum(sizes)] * (len(factors_of) + 1)
    return [sum(sizes[start:]) for start in accumulate(factors_of, initial=0)]


def _loss(model: Model, settings: Settings, kept: int, gradients: int) -> Iterator[_Moment]:
    """Yield the moments of the backward pass through the softmax and through the head, for one chunk of tokens.

    The softmax, its gradient and the gradient of the loss by it are in float32 at the same time; a softcap keeps its
    tanh besides.
    """
    places = settings.rows * (settings.length - 1)
    size, hidden = Sizes.of(settings), model.geometry.hidden_size
    chunk = min(CHUNK_TOKENS, places) * model.geometry.vocab_size
    softcap = model.architecture.logit_softcap
    capped = softcap is not None and softcap.of(model.text_config) is not None
    states = places * hidden * size.value  # the gradient of what the loss reads
    common = {"gradients": gradients, "activations": kept, "recomputation": states}
    yield _Moment(name="backward through the loss", **common, logits=chunk * _FLOAT32 * (4 if capped else 3))
    scratch = _dequantised(model.vocabulary, settings)
    yield _Moment(name="backward through lm_head", **common, logits=chunk * size.value, scratch=scratch)


def _inside(model: Model, layer: Layer, settings: Settings) -> int:
    """Return the most that the backward pass through a layer needs beyond what the layer has saved.

    At the MLP's end these are the gradient of the layer's output, twice more on its way to lora_B, and the gradient of
    the channels; on a GPU with 16-bit weights the latter exists in float32 too, which PEFT casts to. Where attention
    weights are kept, they have two gradients (of the softmax's output and input) when the MLP's part has been freed;
    with dropout the first of them takes the place of what has been dropped from.
    """
    size, hidden, tokens = Sizes.of(settings).value, model.geometry.hidden_size, settings.tokens
    cast = _FLOAT32 if settings.device == "cuda" and not settings.quantised else 0
    in_mlp = tokens * (3 * hidden * size + (layer.channels + layer.shared) * (size + cast))
    if layer.routed is not None:
        in_mlp = max(in_mlp, tokens * size * _in_experts(layer.routed, hidden, settings))
    if not kept_per_weight(model, settings):
        return in_mlp
    gradients = 2 if model.sinks or model.architecture.attention_softcap is not None else 1
    weights = gradients * tokens * settings.length * layer.heads * _FLOAT32 + 3 * tokens * layer.queries * size
    return max(in_mlp, weights - saved_by_mlp(model, layer, settings))


def _in_experts(routed: Routed, hidden: int, settings: Settings) -> int:
    """Return how many values per token the backward pass through experts needs beyond what they have saved.

    They are the gradient of what each expert gives, before and after it is multiplied by the router's weight, and that
    of the weight before it is summed; or, when that is done and freed, three gradients of the channels. In 4 bits the
    gradients of the channels are those of one expert at a time, and the others are put together once more.
    """
    if settings.quantised:
        return 4 * routed.chosen * hidden + hidden
    at_outputs = 3 * routed.chosen * hidden + 2 * hidden
    return max(at_outputs, routed.chosen * (3 * routed.channels - hidden) + hidden)


def _dequantised(parameters: int, settings: Settings) -> int:
    """Return the bytes of one 4-bit weight in full precision, with its constants in float32."""
    return parameters * settings.compute_bytes + parameters // 16 if settings.quantised else 0


def _unpacked(layer: Layer, settings: Settings) -> int:
    """Return the bytes of the largest weight in full that is in 4 bits or sparse; a mask takes a byte per weight."""
    dense = settings.compute_bytes + 1 if layer.mask_bytes else 0
    linears = (prod(layer.shapes[path]) * dense + _dequantised(layer.values[path], settings) for path in layer.shapes)
    return max([*linears, *(_dequantised(values, settings) for values, _ in layer.quantisable)])


def _casts(model: Model, settings: Settings) -> int:
    """Return the bytes of autocast's 16-bit copies of a float32 adapter, which are kept for the backward pass."""
    if settings.device != "cuda" or settings.lora_bytes == 2:
        return 0
    return 2 * sum(factors(model, settings))
