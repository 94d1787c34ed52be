"""Memory and speed: what the planner and the number of operations say, and what was measured."""

import statistics
import time
from typing import Any

import torch
from session import Pairs, Setting, say
from tools import GIB, OPTIMIZER, CardPeak, scratch, unpublished, wait, write_model, write_rows


def write_4bit(setting: Setting, shape: str, ratio: float) -> Pairs:
    """Write the pruned model of a shape with random weights in NF4."""
    import random_models

    vars(random_models)["publish"] = unpublished
    folder = setting.work / f"{shape}-nf4"
    if not folder.exists():
        random_models.make_model(folder, random_models.config_of(shape), ratio=ratio, in_4bit=True)
    yield "bytes", sum(path.stat().st_size for path in folder.iterdir())


def memory(
    setting: Setting, shape: str, ratio: float, tokens: int, cap: int | None = None, expandable: bool = False
) -> Pairs:
    """Train some steps of one row, with the card's memory capped, and say what was predicted and what was used.

    Args:
        setting: where to train.
        shape: the model that `write_4bit` has written.
        ratio: the ratio that it was pruned by.
        tokens: the number of tokens of the row.
        cap: how many GiB may be allocated, the CUDA context included.
        expandable: let torch's allocator join freed memory, so that less of it lies in pieces.
    """
    from measured_training import measure
    from random_models import config_of

    from loram.planner import estimate

    device = setting.device
    if expandable:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    optimizer = OPTIMIZER if device == "cuda" else {}
    settings: dict[str, Any] = {
        "load_in_4bit": True,
        "max_length": tokens,
        "per_device_train_batch_size": 1,
        **optimizer,
    }
    predicted = estimate(config_of(shape), ratio=ratio, device=device, **settings).training
    yield "predicted", {"total": predicted.total / GIB, "moment": predicted.moment}
    options = {"load_in_4bit": True, "anchor_steps": 0, "trainer": optimizer}
    bytes_of_cap = None if cap is None or device == "cpu" else cap * GIB
    with CardPeak(device) as card:
        try:
            measured = measure(str(setting.work / f"{shape}-nf4"), tokens, 5, device, bytes_of_cap, options)
            yield "measured", {**measured, "total": (measured["peak"] + measured["context"]) / GIB}
        finally:
            if device == "cuda":
                yield "card", card.peak / GIB
                yield "allocator", torch.cuda.memory_summary(abbreviated=True)


def write_16bit(setting: Setting, shape: str, ratio: float) -> Pairs:
    """Write the full model of a shape and its pruned model, with random weights in bf16."""
    from random_models import config_of, plan_of

    for name, plan in (("full", None), ("pruned", plan_of(config_of(shape), ratio))):
        started = time.perf_counter()
        write_model(setting.work / f"{shape}-{name}", config_of(shape), plan)
        yield name, time.perf_counter() - started


def throughput(
    setting: Setting,
    shape: str,
    ratio: float,
    rows: int,
    tokens: int,
    pruned: bool,
    in_4bit: bool,
    steps: int = 7,
    **options: Any,
) -> Pairs:
    """Measure the tokens per second of one method.

    Args:
        setting: where to train.
        shape, ratio: the models that `write_16bit` has written.
        rows, tokens: the number of rows per step, and of tokens per row.
        pruned, in_4bit: what is trained on.
        steps: the number of steps; the first two do not count.
        options: further options of `loram.train`.
    """
    from measured_training import Meter
    from random_models import config_of

    import loram
    from loram.planner import estimate

    meter = Meter()
    trainer = {"per_device_train_batch_size": rows, "max_length": tokens, "max_steps": steps, "save_strategy": "no"}
    plan = estimate(
        config_of(shape), ratio=ratio if pruned else None, load_in_4bit=in_4bit, device=setting.device
    ).arithmetic
    yield "times_fewer_flops", plan.times_fewer
    with scratch(setting.work) as folder:
        loram.train(
            setting.work / f"{shape}-{'pruned' if pruned else 'full'}",
            folder / "adapter",
            data=write_rows(folder, tokens, rows * steps),
            trainer={**trainer, **(OPTIMIZER if in_4bit else {})},
            load_in_4bit=in_4bit,
            anchor_steps=0,
            device=setting.device,
            callbacks=[meter],
            **options,
        )
    seconds = statistics.median(meter.seconds[2:])
    yield "seconds", meter.seconds
    yield "tokens_per_second", rows * tokens / seconds
    yield "tflops", plan.flops_per_token * rows * tokens / seconds / 1e12
    yield "reserved", torch.cuda.max_memory_reserved() / GIB if setting.device == "cuda" else None


def planner(setting: Setting, shape: str, ratios: tuple[float | None, ...]) -> Pairs:
    """Compare the planner with what torch allocated at most, over the configurations of benchmarks/planner.py."""
    from planner import CONFIGURATIONS, stage_options
    from random_models import config_of, plan_of

    import loram
    from loram.planner import estimate

    config, device = config_of(shape), setting.device
    for ratio in ratios:
        write_model(
            setting.work / f"planner-{ratio}", config, None if ratio is None else plan_of(config, ratio), 1 << 22
        )
    warm = {"warm-up": {"max_length": 64, "per_device_train_batch_size": 1}}
    for name, chosen in {**warm, **CONFIGURATIONS}.items():
        options: dict[str, Any] = {**chosen, "device": device}
        if options.get("ratio") not in ratios:
            continue
        if setting.small:
            options["max_length"] = 128
        if options.get("load_in_4bit") and device == "cuda":
            options.setdefault("optim", "adamw_8bit")
        rows = options.get("per_device_train_batch_size", 4)
        before = _reset(device)
        with scratch(setting.work) as folder:
            data = write_rows(folder, options["max_length"], 2 * rows)
            model = setting.work / f"planner-{options.get('ratio')}"
            loram.train(model, folder / "adapter", data=data, device=device, anchor_steps=0, **stage_options(options))
        wait(device)
        memory = estimate(config, **options).training
        row: dict[str, Any] = {"predicted": memory.total - memory.context, "moment": memory.moment}
        if device == "cuda":
            row["measured"] = torch.cuda.max_memory_allocated() - before
            row["error_percent"] = round(100 * (row["predicted"] / row["measured"] - 1), 1)
        yield name, row
        say(f"planner, {name}: {row.get('error_percent', 'done')}")


def _reset(device: str) -> int:
    """Forget the peak of the card's memory; returns what is allocated."""
    if device != "cuda":
        return 0
    import gc

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
