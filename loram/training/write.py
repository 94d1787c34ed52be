"""Write the result of a training into a folder: a stock PEFT adapter, or an ordinary model."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loram.data.spec import several
from loram.disk.adapter import Adapter, save_adapter
from loram.disk.card import shown
from loram.disk.checkpoint import Checkpoint
from loram.disk.renamed import in_wrapper
from loram.model.plan import MASKS_NAME, PruningPlan
from loram.trainer.arguments import duration
from loram.trainer.frame import Outcome
from loram.training.methods.table import METHODS
from loram.training.methods.weights import extract
from loram.training.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class Trained(Outcome):
    """The outcome of a training.

    Args:
        folder: the trained adapter or model, as transformers and PEFT save it.
        added_files: the method's files beside the adapter: name -> tensors.
    """

    folder: Path
    added_files: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def write_adapter(
    out: Path,
    trained: Trained,
    checkpoint: Checkpoint,
    plan: PruningPlan | None,
    options: TrainOptions,
    start: Adapter | None = None,
) -> dict[str, float]:
    """Write an outcome as a PEFT adapter, with the plan and what else recovery needs.

    Args:
        out: the folder to write into.
        trained: the outcome.
        checkpoint: the model that it was trained on.
        plan: the plan of that model; None where it is a full one.
        options: the options of the training.
        start: the adapter that it went on with, whose config and dtypes the result has; None where it was new.

    Returns:
        Where weights trained, `kept_share`: the share of the squared update that the extracted adapter keeps.
    """
    figures = {}
    if METHODS[options.method].weights:
        config, tensors, figures["kept_share"] = extract(Checkpoint(trained.folder), checkpoint, options.lora["r"])
        adapter = Adapter(folder=out, config=config, tensors=tensors)
    else:
        adapter = Adapter.load(trained.folder)
        if start is not None:
            tensors = {name: tensor.to(start.tensors[name].dtype) for name, tensor in adapter.tensors.items()}
            adapter = replace(start, tensors=tensors)
    if checkpoint.wrapper is not None:
        adapter = in_wrapper(adapter, checkpoint.wrapper)
    save_adapter(out, {**adapter.config, "base_model_name_or_path": checkpoint.name}, adapter.tensors)
    if plan is None:
        return figures
    plan.save(out)
    if options.mask_update:  # says that the update is masked, and by what
        shutil.copyfile(checkpoint.folder / MASKS_NAME, out / MASKS_NAME)
    for name, values in trained.added_files.items():
        save_file(dict(values), out / name, {"format": "pt"})
    return figures


def training_step(settings: Mapping[str, Any], *, further: bool, anchored: int) -> str:
    """Return how something was trained, as one line of Markdown for a model card.

    Args:
        settings: the settings of the training, as the manifest has them.
        further: whether an adapter was there before.
        anchored: the number of steps from one anchor to the next; 0 for a training without.
    """
    lora, rows = settings["lora"], "streamed" if settings["rows"] is None else f"{settings['rows']:,}"
    datasets = ", ".join(f"`{shown(data['path'])}`" for data in several(settings["data"]))
    targets = lora.get("target_modules") or ()
    on = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    adapter = "" if METHODS[settings["method"]].weights else f" (rank {lora['r']}, alpha {lora['lora_alpha']}, on {on})"
    parts = [
        f"**Trained{' further' if further else ''}** by the method {settings['method']}{adapter} on {rows} rows of "
        f"{datasets}: {duration(settings['trainer'])}",
        *(["the weights of the model in 4 bits"] if settings["load_in_4bit"] else []),
        *([f"anchored every {anchored} steps"] if anchored else []),
    ]
    return "; ".join(parts) + "."
