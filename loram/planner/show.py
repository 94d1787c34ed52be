"""An estimate for people."""

import io
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loram.base.errors import UserError
from loram.model.sparsity import STRUCTURED
from loram.planner.fit import fit
from loram.planner.memory import TrainingMemory
from loram.planner.size import parse_size, show_size
from loram.planner.total import Estimate, estimate

_ITEMS = {
    "weights": "frozen model",
    "constants": "what NF4 needs beside its 4 bits",
    "adapter": "LoRA factors",
    "gradients": "of the adapter, at that moment",
    "optimizer": "AdamW's two moments",
    "activations": "kept from forward for backward",
    "recomputation": "inside the layer that is gone through backward",
    "logits": "of 512 tokens at a time, with softmax and gradient",
    "scratch": "the largest 4-bit weight, dequantised; while measuring, a layer of the full model",
    "context": "CUDA and its libraries: a rule of thumb",
}


def command(
    model: str,
    ratio: float | None,
    memory: str | None,
    load_in_4bit: bool | None,
    options: Mapping[str, Any],
    *,
    as_json: bool,
) -> str:
    """What `loram estimate` prints: an estimate at `ratio`, or the one that fits into `memory` and its recipe.

    Raises:
        UserError: both are given, or what `estimate` and `fit` raise.
    """
    if memory is None:
        found = estimate(model, ratio=ratio, load_in_4bit=bool(load_in_4bit), **options)
        return found.model_dump_json() if as_json else text(found)
    if ratio is not None:
        raise UserError("--ratio, --memory: give one of the two; --memory finds a ratio")
    if options["pattern"] != STRUCTURED:
        raise UserError("--pattern, --memory: give one of the two; --memory looks for structured pruning")
    structured = {key: value for key, value in options.items() if key != "pattern"}
    fitting = fit(model, parse_size(memory), load_in_4bit=load_in_4bit, **structured)
    if as_json:
        return fitting.model_dump_json()
    return (
        f"{text(fitting.estimate)}\n\nThe least pruning that fits into {memory}; for your recipe:\n\n{fitting.recipe}"
    )


def text(found: Estimate) -> str:
    """An estimate as text, as wide as the terminal."""
    printed = io.StringIO()
    console = Console(file=printed, width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in _parts(found):
        console.print(part, soft_wrap=isinstance(part, Text))
    return printed.getvalue().rstrip("\n")


def _parts(found: Estimate) -> Iterator[Table | Text]:
    yield Text(_heading(found))
    yield Text(f"\n{_setting(found)}")
    yield memory_table(found.training)
    beside = [f"{show_size(found.training.host)} wait in host memory"] if found.training.host else []
    if found.training.pageable:
        beside.append(f"{show_size(found.training.pageable)} of the optimiser may go there when the GPU is short")
    if found.settings.device == "cpu" and not (found.settings.load_in_4bit or found.settings.gradient_checkpointing):
        yield Text(
            "Without checkpointing or 4 bits, training on a CPU keeps freed memory to be faster: leave it twice that."
        )
    if beside:
        yield Text("Beside that " + "; ".join(beside) + ".")
    yield Text("\nHow much smaller than the full model in 16 bits")
    yield Text(
        f"  counted  {found.counted_reduction:6.2f}x   every parameter at its nominal bits, as in the LoRAM paper"
    )
    yield Text(f"  real     {found.real_reduction:6.2f}x   {show_size(found.weight_bytes)} of weights, all included")
    work = found.arithmetic
    measuring = work.measuring_flops_per_token
    among = f" ({measuring / 1e9:,.2f} of them measure the full model)" if measuring else ""
    times = work.times_fewer
    compared = f"{times:.2f}x fewer" if times >= 1 else f"{1 / times:.2f}x more"
    total = work.flops_per_token / 1e9
    yield Text(f"\nTraining takes {total:,.2f} GFLOP a token{among}, {compared} than LoRA on the full model\n")
    yield _stages(found)


def _heading(found: Estimate) -> str:
    if found.ratio is None:
        return f"{found.parameters:,} parameters, not pruned"
    if found.pattern != STRUCTURED:
        return (
            f"{found.parameters:,} -> {found.pruned_parameters:,} parameters ({found.parameter_reduction:.2f}x fewer)\n"
            f"{found.pruned_layers} layers are sparse, {found.pattern} at ratio {found.ratio:.4g}: the weights that "
            "stay are stored, and a bit for every place"
        )
    kept = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in found.units.items())
    return (
        f"{found.parameters:,} -> {found.pruned_parameters:,} parameters ({found.parameter_reduction:.2f}x fewer) "
        f"at ratio {found.ratio}\n{found.pruned_layers} layers keep {kept} each"
    )


def _setting(found: Estimate) -> str:
    chosen = found.settings
    ways = [
        "4-bit weights" if chosen.load_in_4bit else f"{8 * chosen.compute_bytes}-bit weights",
        f"{chosen.method} of rank {chosen.lora_r} ({found.adapter_parameters:,} parameters in {chosen.lora_dtype})",
        f"{chosen.per_device_train_batch_size} x {chosen.max_length} tokens",
        chosen.optim,
    ]
    ways += ["activation checkpointing"] if chosen.gradient_checkpointing else []
    ways += [f"anchored every {chosen.anchor_steps} steps"] if chosen.anchor_steps else []
    ways += ["offloaded"] if chosen.activation_offloading else []
    return f"Training on {chosen.device}: {', '.join(ways)}"


def memory_table(found: TrainingMemory, title: str = "Memory") -> Table:
    """What a training takes at its peak, item by item."""
    table = Table(title=f"{title} at its peak ({found.moment})", title_justify="left")
    table.add_column("item", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("what it is")
    for name, what in _ITEMS.items():
        if count := getattr(found, name):
            table.add_row(name, show_size(count), what)
    table.add_section()
    table.add_row("total", show_size(found.total), "")
    return table


def _stages(found: Estimate) -> Table:
    table = Table(title="Every stage, on a CPU", title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("disk", justify="right", no_wrap=True)
    table.add_column("RAM", justify="right", no_wrap=True)
    table.add_column("holds at most")
    for stage in found.stages:
        table.add_row(stage.name, show_size(stage.disk), show_size(stage.memory), stage.holds)
    return table
