"""Print a dry run for people."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loram.planner.show import memory_table
from loram.run.dry_run import DataCounts, DryRun, Span, Training
from loram.run.report import NOT_EVALUATED

COUNTS = {
    "rows used": "rows",
    "tokens": "tokens",
    "in the loss": "tokens_in_loss",
    "cut to length": "rows_truncated",
    "skipped": "rows_skipped",
    "longest": "longest",
}


def show(result: DryRun, console: Console) -> None:
    """Print a dry run. The tokens in the loss stand between ⟦ and ⟧, and a terminal shows them in colour."""
    for part in _parts(result):
        console.print(part, soft_wrap=isinstance(part, Text))


def _parts(result: DryRun) -> Iterator[Table | Text]:
    before, after = result.parameters, result.pruned_parameters
    yield Text(f"{result.model}\n{before:,} -> {after:,} parameters ({before / after:.2f}x fewer)\n")
    for name, training in result.training.items():
        yield from _training(name, training, result.device)
    yield _data_table(result)
    for name, counts in result.data_sets():
        yield _columns(name, counts)
    if result.tasks:
        yield Text(f"Tasks of lm-evaluation-harness that are run: {', '.join(result.tasks)}")
    elif not result.eval_dataset:
        yield Text(NOT_EVALUATED)
    if result.examples:
        yield Text("\nTraining data as the model sees it; what it learns to write stands between ⟦ and ⟧:")
    for number, spans in zip(result.example_rows, result.examples, strict=True):
        yield _example(number, spans)
    yield Text("\nNothing was written: this was a dry run.")


def _training(name: str, training: Training, device: str) -> Iterator[Table | Text]:
    trained, frozen = f"{training.adapter_parameters:,}", f"{training.parameters:,}"
    yield Text(f"Training on the {name} model, on {device}: {trained} parameters train, {frozen} are frozen")
    if training.memory is None:
        yield Text(f"The memory for this training cannot be estimated: {training.problem}\n")
        return
    yield memory_table(training.memory)
    yield Text("The estimate takes every row to be as long as the longest, and it leaves libraries out.\n")


def _data_table(result: DryRun) -> Table:
    table = Table(title="Data", title_justify="left")
    table.add_column("data set", no_wrap=True)
    for heading in COUNTS:
        table.add_column(heading, justify="right")
    for name, counts in result.data_sets():
        table.add_row(name, *(f"{getattr(counts, count):,}" for count in COUNTS.values()))
    return table


def _columns(name: str, counts: DataCounts) -> Text:
    """Say which columns of a data set are used, how, and which are not."""
    used = ", ".join(ours if ours == theirs else f"{theirs} as {ours}" for ours, theirs in counts.columns.items())
    how = "through the chat template" if counts.chat_template else "as plain text"
    unused = ", ".join(f"{column} ({rows:,} rows)" for column, rows in counts.unused.items())
    first = "; streamed, so only the first rows are counted" if counts.streamed else ""
    return Text(f"{name}: {used}, written {how}" + (f"; not used: {unused}" if unused else "") + first)


def _example(number: int, spans: tuple[Span, ...]) -> Text:
    text = Text(f"\n--- row {number}\n")
    for span in spans:
        text.append(f"⟦{span.text}⟧" if span.in_loss else span.text, style="bold green" if span.in_loss else "")
    return text
