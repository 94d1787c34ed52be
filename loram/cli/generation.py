"""The commands that let a model write: `loram generate` and `loram chat`."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer

from loram.base.errors import UserError
from loram.base.options import Options, option
from loram.cli.flags import RUN, Flag, flags_of
from loram.data.spec import DataSpec
from loram.generation.options import ChatOptions, GenerateOptions


class _Prompts(Options):
    prompt: str | None = option(None, "A prompt.", common=True)
    prompts: DataSpec | None = option(
        None,
        "A file of prompts: rows with prompt, messages, question or instruction; or a .txt file with one per line.",
        common=True,
    )


class _Output(Options):
    output_file: Path | None = option(None, "Write the JSON lines into this file (default: standard output).")


PROMPTS: tuple[Flag, ...] = (
    *flags_of(_Prompts, "Prompts"),
    *flags_of(DataSpec, "Prompts", only=("columns", "max_samples"), under=("prompts",)),
    *flags_of(GenerateOptions, "Further options"),
    *flags_of(_Output, RUN),
)
CHAT: tuple[Flag, ...] = (*flags_of(ChatOptions, "Further options"),)


def generate(
    model: str,
    *,
    prompt: str | None = None,
    prompts: Mapping[str, Any] | None = None,
    output_file: Path | None = None,
    **options: Any,
) -> None:
    """Let MODEL answer or continue prompts: one JSON line each.

    A line has the prompt, the text that the model wrote, and its number of tokens. Where the tokenizer has a chat
    template, a prompt is a user's turn.
    """
    if (prompt is None) == (prompts is None) or (prompts is not None and "path" not in prompts):
        raise UserError("prompts: give either --prompt TEXT or --prompts FILE")
    from loram.generation.generate import written

    results = written(model, [prompt] if prompt is not None else prompts or {}, **options)
    if output_file is None:
        for result in results:
            print(result.model_dump_json(), flush=True)  # not typer's echo, which would write across progress bars
        return
    with _whole(output_file) as handle:
        handle.writelines(f"{result.model_dump_json()}\n" for result in results)
    typer.echo(f"{output_file}: written")


def chat(model: str, **options: Any) -> None:
    """Chat with MODEL in the terminal, with or without an adapter.

    Each line of standard input is a turn. /clear forgets the chat, /system TEXT sets the system prompt, /exit ends it.
    """
    from loram.generation.chat import chat as talk

    talk(model, **options)


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """Open a new file that appears when the block is done, or not at all."""
    if path.exists():
        raise UserError(f"{path}: the output exists already; remove it or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            yield handle
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
