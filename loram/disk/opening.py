"""Open a model by the name that the user has for it: a hub id, a folder, or a GGUF file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from loram.base.errors import UserError
from loram.base.paths import is_hub_id, local, named
from loram.disk.artifacts import CARD_NAME
from loram.disk.checkpoint import Checkpoint
from loram.disk.files import SIDE_FILES, read_json
from loram.disk.gguf import cached_conversion
from loram.disk.template import read_template
from loram.model.packing import packing_of
from loram.model.plan import PLAN_NAME, PruningPlan, find_plan


def open_model(model: str | Path, *, chat_template: str | Path | None = None) -> Checkpoint:
    """Open a model by hub id, folder or GGUF file.

    A hub id is downloaded to the hub's cache (safetensors, config and tokenizer only). A GGUF file is converted once
    into a safetensors folder in loram's cache.

    Args:
        model: its name.
        chat_template: what takes the place of its chat template; see `loram.disk.template.read_template`.

    Raises:
        UserError: there is no model of that name, or the chat template cannot be used.
    """
    checkpoint = _open(named(model))
    if chat_template is not None:
        checkpoint.chat_template = read_template(chat_template)
    return checkpoint


def is_cached(model: str) -> bool:
    """Return whether a model of the hub, all its weights included, is in the hub's cache."""
    try:
        checkpoint = Checkpoint(Path(snapshot_download(model, local_files_only=True)))
        return all((checkpoint.folder / file).is_file() for file in checkpoint.index.values())
    except (OSError, ValueError, UserError):  # the hub's own errors derive from the first two
        return False


def plan_of(model: Any) -> PruningPlan | None:
    """Return the plan of a pruned model by its name; None if there is no such model, or it has no plan.

    Of a model on the hub, only that file is fetched.
    """
    if not isinstance(model, str | Path) or not str(model):
        return None
    if (folder := local(model)).exists():
        return find_plan(folder)
    try:
        return find_plan(Path(hf_hub_download(str(model), PLAN_NAME)).parent) if is_hub_id(str(model)) else None
    except (OSError, ValueError):  # the hub's own errors derive from these
        return None


def _open(name: str) -> Checkpoint:
    path = Path(name)
    if path.is_dir():
        return Checkpoint(path)
    if path.is_file() and path.suffix == ".gguf":
        return Checkpoint(cached_conversion(path), name=name)
    if path.exists():
        raise UserError(f"{path}: neither a model folder nor a .gguf file")
    return Checkpoint(_download(name), name=name)


def _download(model: str) -> Path:
    packing_of(read_json(download_config(model)), model)  # or it refuses the model, before gigabytes are fetched
    patterns = ["model*.safetensors", "*.json", *SIDE_FILES, CARD_NAME]  # not the consolidated.* some repositories add
    return Path(_ask_hub(model, lambda: snapshot_download(model, allow_patterns=patterns)))


def download_config(model: str) -> Path:
    """Fetch only the config.json of a model on the hub.

    Raises:
        UserError: the hub did not give that file.
    """
    return Path(_ask_hub(model, lambda: hf_hub_download(model, "config.json")))


def _ask_hub(model: str, fetch: Callable[[], str]) -> str:
    missing = f"{model}: no such file or folder"
    if not is_hub_id(model):
        raise UserError(f"{missing}, and not a hub id (owner/name) either")
    try:
        return fetch()
    except (OSError, ValueError) as error:  # the hub's own errors, offline included, derive from these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{missing}, and the hub did not give a model of that name: {reason}") from error
