"""The export stage: write a recovered adapter in the form that another tool loads."""

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loram.base.errors import UserError
from loram.export.options import ExportOptions
from loram.export.table import Export


class Kept(BaseModel):
    """What an update of a smaller rank keeps of the squared norm.

    Args:
        overall: the share over all modules.
        least: the share in the module that keeps least of its own.
        module: that module.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overall: float
    least: float
    module: str


class Exported(BaseModel):
    """What was exported.

    Args:
        path: the folder.
        to: the form.
        result: what that is, in words.
        rank: the largest rank of a module's update.
        kept: with `max_rank`, what is kept of the update; else None.
        command: the line that uses it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    to: str
    result: str
    rank: int
    kept: Kept | None
    command: str

    def text(self) -> str:
        """Return what the command prints."""
        lines = [f"{self.path}: {self.result} written, rank {self.rank}"]
        if (kept := self.kept) is not None:
            lines.append(
                f"This rank keeps {kept.overall:.2%} of the update's squared norm, and {kept.least:.2%} in the module "
                f"that keeps least, {kept.module}."
            )
        return "\n".join([*lines, f"Use it: {self.command}"])


def export_adapter(
    adapter: str | Path, out: str | Path, *, options: ExportOptions | None = None, **fields: Any
) -> Exported:
    """Write an adapter for a full model in the form that another tool loads.

    The base's weights are not read, but for `to="gguf"`, which reads those of a GGUF file of the base.

    Args:
        adapter: the folder of a PEFT LoRA adapter for a full model, such as a recovered one.
        out: the folder to make.
        options: the form and its options; single options may be given by name instead.
        fields: single options by name, over `options`; see `ExportOptions`.

    Raises:
        UserError: the folder is no adapter of a full model, the form has no place for its update or its base, or `out`
            exists.
    """
    from loram.base.paths import local
    from loram.disk.adapter import CONFIG_NAME
    from loram.disk.artifacts import check_output, publish
    from loram.export.forms.rank import reduced
    from loram.export.forms.source import read_source
    from loram.export.forms.table import FORMS

    chosen, folder = ExportOptions.of(options, **fields), local(adapter)
    form, out = FORMS[chosen.to], check_output(out, folder)
    if (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder}: a model, and export takes adapters; {form.takes.format(model=folder)}")
    source = read_source(folder)
    form.check(source, chosen)
    kept = None
    if chosen.max_rank is not None:
        smaller, overall, shares = reduced(source.adapter, chosen.max_rank)
        source = dataclasses.replace(source, adapter=smaller)
        module = min(shares, key=lambda name: shares[name])
        kept = Kept(overall=overall, least=shares[module], module=module)
    settings = chosen.model_dump(mode="json", exclude_none=True)
    with publish(out, kind="exported", made_from=source.made_from, settings=settings) as staging:
        command = form.write(source, staging, out, chosen)
    return Exported(
        path=out,
        to=chosen.to,
        result=form.result,
        rank=max(map(source.adapter.rank, source.adapter.modules)),
        kept=kept,
        command=command,
    )


EXPORT = Export(
    function=export_adapter,
    takes=("adapter",),
    summary="Write an adapter in the form that another tool loads.",
    detail="ADAPTER is for a full model. The forms are for llama.cpp (gguf-lora, gguf), Ollama, vLLM and mlx-lm.",
    options=ExportOptions,
    reports=True,
)
