"""The exports that there are: what each is called, what it takes, and what it writes. Imports nothing heavy."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import loram.export
from loram.base.options import Options


@dataclass(frozen=True, kw_only=True)
class Export:
    """One form in which a model, or a model with an adapter, is written.

    Args:
        function: takes what `takes` says, the output folder, and the options as keyword arguments.
        summary: what it does, in one line of `loram -h`.
        detail: further sentences for the command's own help.
        takes: what stands on the command's line before the output folder.
        result: what is written, for the line that the command prints: `merged model`; empty where it reports.
        reports: whether the function returns a report, which the command prints, with --json as JSON.
        options: the class of its options; None where it has none.
    """

    function: Callable[..., Any]
    summary: str
    result: str = ""
    detail: str = ""
    takes: tuple[Literal["model", "adapter"], ...] = ("model",)
    reports: bool = False
    options: type[Options] | None = None


@cache
def exports() -> Mapping[str, Export]:
    """Return the exports by the names of their files, which are also the names of their commands."""
    modules = {
        info.name: importlib.import_module(f"{loram.export.__name__}.{info.name}")
        for info in pkgutil.iter_modules(loram.export.__path__)
    }
    return MappingProxyType({name: module.EXPORT for name, module in modules.items() if hasattr(module, "EXPORT")})
