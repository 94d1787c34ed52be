"""Print an estimate for people."""

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loram.base.size import show_size
from loram.model.sparsity import STRUCTURED
from loram.planner.memory import TrainingMemory
from loram.planner.total import Estimate
from loram.planner.ways import advice

_ITEMS = {
    "weights": "frozen model, or what is held of a streamed one",
    "constants": "what NF4 needs besides its 4 bits",
    "adapter": "LoRA factors",
    "gradients": "gradients of the adapter at that moment",
    "optimizer": "AdamW's two moments",
    "activations": "kept from forward for backward",
    "recomputation": "inside the layer that the backward pass is in",
    "logits": "logits that exist at a time, with softmax and gradient",
    "scratch": "the largest 4-bit weight, dequantised; a layer that is being read",
    "context": "CUDA and its libraries: a rule of thumb",
}


def show(estimate: Estimate, console: Console, memory: int | None = None) -> None:
    """Print an estimate.

    Args:
        estimate: what to print.
        console: where.
        memory: bytes of the device that trains, for the advice at the end; None where they are not known.
    """
    for part in (*_parts(estimate), Text(""), _ways(estimate), Text(advice(estimate.ways, memory))):
        console.print(part, soft_wrap=isinstance(part, Text))


def _parts(estimate: Estimate) -> Iterator[Table | Text]:
    if estimate.wrapper is not None:
        yield Text(f"The text model ({estimate.model_type}) of a {estimate.wrapper}, without what else that holds:")
    yield Text(_heading(estimate))
    settings = estimate.settings
    yield Text(f"\nTraining on {settings.device}: {settings.describe(estimate.adapter_parameters)}")
    yield memory_table(estimate.training)
    beside = [f"{show_size(estimate.training.host)} wait in host memory"] if estimate.training.host else []
    if estimate.training.pageable:
        beside.append(f"{show_size(estimate.training.pageable)} of the optimiser may go there when the GPU is short")
    if settings.device == "cpu" and not (settings.quantised or settings.checkpointed):
        yield Text(
            "Without checkpointing or 4 bits, training on a CPU keeps freed memory for speed: leave it twice as much."
        )
    if beside:
        yield Text("Besides, " + "; ".join(beside) + ".")
    yield Text("\nHow much smaller than the full model in 16 bits")
    yield Text(
        f"  counted  {estimate.counted_reduction:6.2f}x   every parameter at its nominal bits, as in the LoRAM paper"
    )
    yield Text(
        f"  real     {estimate.real_reduction:6.2f}x   {show_size(estimate.weight_bytes)} of weights, all included"
    )
    work = estimate.arithmetic
    measuring = work.measuring_flops_per_token
    among = f" ({measuring / 1e9:,.2f} of them measure the full model)" if measuring else ""
    times = work.times_fewer
    compared = f"{times:.2f}x fewer" if times >= 1 else f"{1 / times:.2f}x more"
    total = work.flops_per_token / 1e9
    if estimate.read_per_step:
        yield Text(f"\nEach optimiser step reads {show_size(estimate.read_per_step)} of the model, whatever its rows")
    yield Text(f"\nTraining takes {total:,.2f} GFLOP per token{among}, {compared} than LoRA on the full model\n")
    yield _stages(estimate)


def _heading(estimate: Estimate) -> str:
    active = _changed(estimate.active_parameters, estimate.pruned_active_parameters)
    routed = estimate.active_parameters != estimate.parameters
    per_token = f", {active} active per token" if routed else ""
    if not estimate.pruned_layers and not estimate.dropped_layers:
        return f"{estimate.parameters:,} parameters{per_token}, not pruned"
    heading = (
        f"{_changed(estimate.parameters, estimate.pruned_parameters)} parameters "
        f"({estimate.parameter_reduction:.2f}x fewer){per_token}"
    )
    if estimate.pattern != STRUCTURED:
        return (
            f"{heading}\n{estimate.pruned_layers} layers are sparse, {estimate.pattern} at ratio {estimate.ratio:.4g}: "
            "they store the weights that stay, and one bit per weight"
        )
    dropped = f"{estimate.dropped_layers} layers are dropped"
    if not estimate.pruned_layers:
        return f"{heading}\n{dropped}"
    narrowed = "; ".join(f"{alike.layers} layers keep {_named(alike.units)} each" for alike in estimate.narrowed)
    bypass = f", with bypasses of rank {estimate.bypass_rank}" if estimate.bypass_rank else ""
    return f"{heading} at {_ratios(estimate)}\n{narrowed}{bypass}" + (f", {dropped}" if estimate.dropped_layers else "")


def _named(units: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in units.items())


def _ratios(estimate: Estimate) -> str:
    """Return the ratios that a structured pruning was given: `ratio 0.5, experts ratio 0.25`."""
    ratios = {} if estimate.ratio is None else {"": estimate.ratio}
    ratios |= {f"{name.replace('_', ' ')} ": ratio for name, ratio in estimate.ratios.items()}
    return ", ".join(f"{space}ratio {ratio}" for space, ratio in ratios.items())


def _changed(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def memory_table(memory: TrainingMemory, title: str = "Memory") -> Table:
    """Return a table of a training's memory at its peak, item by item."""
    table = Table(title=f"{title} at its peak ({memory.moment})", title_justify="left")
    table.add_column("item", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("what it is")
    for name, what in _ITEMS.items():
        if count := getattr(memory, name):
            table.add_row(name, show_size(count), what)
    table.add_section()
    table.add_row("total", show_size(memory.total), "")
    return table


def _ways(estimate: Estimate) -> Table:
    table = Table(title="Ways to train such an adapter", title_justify="left")
    table.add_column("which model, and where", no_wrap=True)
    for name in ("memory", "GFLOP per token", "read per step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("gradients")
    for way in estimate.ways:
        read = "-" if way.read_per_step is None else show_size(way.read_per_step)
        flops = f"{way.flops_per_token / 1e9:,.2f}"
        gradients = "the full model's" if way.exact else "a smaller model's"
        table.add_row(way.name, show_size(way.memory), flops, read, gradients)
    return table


def _stages(estimate: Estimate) -> Table:
    table = Table(title="Every stage, on a CPU", title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("disk", justify="right", no_wrap=True)
    table.add_column("RAM", justify="right", no_wrap=True)
    table.add_column("holds at most")
    for stage in estimate.stages:
        table.add_row(stage.name, show_size(stage.disk), show_size(stage.memory), stage.holds)
    return table
