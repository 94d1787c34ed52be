"""Passes over a full model that is read layer by layer: how near they come to the longer of reading and computing."""

import time
from collections import deque
from math import prod
from typing import Any

import torch
from session import Pairs, Setting, say
from tools import scratch, seconds_of, wait, write_model, write_rows

LAYERS = 6
SMALL = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2}


def config_of_width(setting: Setting) -> dict[str, Any]:
    """Return the config.json of a few layers as wide as LLaMA-2-70B's."""
    from random_models import config_of

    return {**config_of("70b"), **(SMALL if setting.small else {}), "num_hidden_layers": LAYERS}


def streamed(setting: Setting, rows: int, tokens: int) -> Pairs:
    """Measure passes over these layers, forward, and forward and backward, beside what bounds them.

    Args:
        setting: where they run.
        rows, tokens: how much text passes the layers.
    """
    from loram.base.constants import BATCH_TOKENS
    from loram.compute.device import compute_dtype
    from loram.compute.streaming import Stream
    from loram.data.batches import make_batches
    from loram.disk.checkpoint import Checkpoint

    device = torch.device(setting.device)
    checkpoint = Checkpoint(write_model(setting.work / "wide", config_of_width(setting), None, _values(setting)))
    weights = [prod(shape) for name, shape in _shapes(checkpoint).items() if name.startswith("model.layers.0.")]
    read = seconds_of(
        lambda: [tensor.to(device) for tensor in checkpoint.layer_tensors(0).values()], setting.device, 3, 1
    )
    compute = _seconds_to_compute(setting, weights, rows * tokens)
    yield "one layer", {"bytes": 2 * sum(weights), "read and copy": read, "compute forward": compute}
    ids = [[7 + (row + place) % 200 for place in range(tokens)] for row in range(rows)]
    for name, back, times in (("forward", False, 1), ("forward and backward", True, 4)):
        batches = make_batches(ids, max_tokens=BATCH_TOKENS)
        stream = Stream(checkpoint, batches, device=device, dtype=compute_dtype(device))
        wait(setting.device)
        started = time.perf_counter()
        deque(stream.forward(keep_from=0 if back else None), maxlen=0)
        if back:
            deque(stream.backward(0, None), maxlen=0)
        wait(setting.device)
        seconds = (time.perf_counter() - started) / LAYERS
        limit = max((1 + back) * read, times * compute)  # backward reads again, and computes forward and twice more
        yield name, {"seconds per layer": seconds, "limit": limit, "share of the limit": limit / seconds}


def _shapes(checkpoint: Any) -> dict[str, tuple[int, ...]]:
    return {name: checkpoint.shape(name) for name in checkpoint.names()}


def _values(setting: Setting) -> int:
    return 1 << (20 if setting.small else 28)


def _seconds_to_compute(setting: Setting, weights: list[int], tokens: int) -> float:
    """Return the seconds that a layer's products take at the rate of one large product."""
    from loram.compute.device import compute_dtype

    rows, columns = (256, 896) if setting.small else (8192, 8192)
    dtype = compute_dtype(torch.device(setting.device))
    weight = torch.randn(rows, columns, device=setting.device, dtype=dtype)
    x = torch.randn(tokens, columns, device=setting.device, dtype=dtype)
    one = seconds_of(lambda: x @ weight.T, setting.device, 10)
    return one * sum(weights) / (rows * columns)


def anchored(setting: Setting, rows: int, tokens: int) -> Pairs:
    """Train on the pruned model of these layers, plain and anchored, and time the steps and the measurements."""
    from measured_training import Meter
    from random_models import plan_of

    import loram
    from loram.disk.checkpoint import Checkpoint
    from loram.model.plan import BaseReference
    from loram.training import anchors

    config = config_of_width(setting)
    base = Checkpoint(write_model(setting.work / "wide", config, None, _values(setting)))
    reference = BaseReference(name=base.name, fingerprint=base.fingerprint)
    plan = plan_of(config, 0.85, 1, 1).model_copy(update={"base": reference})
    narrow = write_model(setting.work / "narrow", config, plan, _values(setting))
    measurements: list[float] = []
    measure = anchors.Anchors.measure_

    def timed(self: anchors.Anchors, batches: Any) -> Any:
        wait(setting.device)
        started = time.perf_counter()
        result = measure(self, batches)
        wait(setting.device)
        measurements.append(time.perf_counter() - started)
        return result

    anchors.Anchors.measure_ = timed  # type: ignore[method-assign]
    ways: dict[str, dict[str, Any]] = {
        "plain": {"anchor_steps": 0},
        "anchored": {"anchor_steps": 2},
        "anchored without gradients": {"anchor_steps": 2, "anchor_gradients": False},
    }
    trainer = {"per_device_train_batch_size": rows, "max_length": tokens, "max_steps": 4, "save_strategy": "no"}
    for name, options in ways.items():
        meter = Meter()
        measurements.clear()
        with scratch(setting.work) as folder:
            loram.train(
                narrow,
                folder / "adapter",
                data=write_rows(folder, tokens, rows * 4),
                trainer=trainer,
                device=setting.device,
                callbacks=[meter],
                **options,
            )
        yield name, {"seconds per step": meter.seconds, "seconds per measurement": list(measurements)}
        say(f"anchored, {name}: done")
