"""The type of a form, which is a row of the table of forms."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loram.base.errors import UserError
from loram.export.forms.source import Source
from loram.export.options import ExportOptions


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form that an adapter is exported in.

    Args:
        result: what is written, for the line that the command prints.
        write: writes it into a new folder and returns the command that uses it. It takes the adapter, the folder to
            write into, the path that this folder will have, and the options.
        takes: what it does with a whole model, for the error where one is given; {model} stands for its path.
        weights: whether it writes weights and not factors, so that it takes DoRA too.
        options: the options, beside those of all forms, that it reads.
    """

    result: str
    write: Callable[[Source, Path, Path, ExportOptions], str]
    takes: str
    weights: bool = False
    options: tuple[str, ...] = ()

    def check(self, source: Source, options: ExportOptions) -> None:
        """Refuse an update that this form has no place for, and options that it would ignore.

        Raises:
            UserError: names the option, or what the adapter has, and what to do.
        """
        adapter, merged = source.adapter, f"loram merge {source.base} {source.folder} OUT"
        for name in options.model_fields_set - {"to", "max_rank", *self.options}:
            if getattr(options, name) is not None:
                raise UserError(f"export: {name} says nothing with --to {options.to}; leave it out")
        if adapter.of_experts:
            raise UserError(f"{source.folder}: adapts experts, which no export has a place for; `{merged}`")
        if source.geometry.tie_word_embeddings and source.architecture.head in adapter.modules:
            raise UserError(
                f"{source.folder}: adapts {source.architecture.head}, which is tied to the embedding, and other tools "
                f"cannot apply that: llama.cpp crashes on it; `{merged}`"
            )
        if adapter.dora and not self.weights:
            raise UserError(f"{source.folder}: a DoRA adapter, which --to {options.to} has no place for; `{merged}`")
        if adapter.dora and options.max_rank is not None:
            raise UserError(f"export: max_rank is for plain LoRA, and {source.folder} is a DoRA adapter; leave it out")
