"""The form vllm: a PEFT adapter as vLLM's LoRA loader takes it, and the command that serves it."""

from pathlib import Path

from loram.base.errors import UserError
from loram.base.vllm import RANKS, serve_command
from loram.disk.adapter import save_adapter
from loram.disk.files import copy_side_files
from loram.disk.renamed import in_wrapper
from loram.export.forms.form import Form
from loram.export.forms.rank import uniform
from loram.export.forms.source import Source
from loram.export.options import ExportOptions


def _write(source: Source, staging: Path, out: Path, options: ExportOptions) -> str:
    """Write the adapter with one scaling for all modules, since vLLM reads no patterns, and return the command."""
    adapter = uniform(source.adapter)
    rank = int(adapter.config["r"])
    command = serve_command(source.base, name=out.name, folder=str(out), rank=rank)
    if command is None:
        raise UserError(f"{source.folder}: rank {rank}, and vLLM takes {RANKS[-1]} at most; --max-rank reduces it")
    if source.wrapper is not None:
        adapter = in_wrapper(adapter, source.wrapper)
    save_adapter(staging, adapter.config, adapter.tensors)
    copy_side_files(source.folder, staging)
    return command


VLLM = Form(
    result="adapter for vLLM",
    write=_write,
    takes="vLLM takes it without an adapter: vllm serve {model}",
)
