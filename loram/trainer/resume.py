"""What may change between an interruption and going on, and when a training began."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from loram.base import processes
from loram.disk.artifacts import MANIFEST_NAME, Manifest, difference

STARTED = "started"  # the setting of a checkpoint that has the time of the training's first start

# Options that do not change what is trained: what is kept, logged and shown, and how rows are fetched. All other
# options count, those of later versions too.
_KEPT = ("save_steps", "save_strategy", "save_total_limit", "save_on_each_node", "ram_budget")
_SHOWN = (
    *("logging_steps", "logging_strategy", "logging_first_step", "logging_dir"),
    *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "skip_memory_metrics"),
    *("report_to", "run_name", "project", "trackio_space_id", "include_num_input_tokens_seen"),
)
_FETCHED = tuple(
    f"dataloader_{what}" for what in ("num_workers", "pin_memory", "prefetch_factor", "persistent_workers")
)
HARMLESS = frozenset((*_KEPT, *_SHOWN, *_FETCHED))
# Settings that say where rows come from and what became of them. The rows themselves are in `made_from`.
_SOURCES = frozenset(("data", "dataset", "probe_dataset", "teacher", "rows", "rows_truncated", "rows_skipped", STARTED))
# What a fingerprint of `made_from` stands for.
_OTHER = {
    "rows": "the rows of {} are not those that it began with",
    "probe_rows": "the rows of the probe are not those that it began with",
    "teacher": "the teacher's folders are not those that it began with",
    "base": "{} is not the full model that it began with",
    "pruned": "{} is not the pruned model that it began with",
    "plan": "the plan of the pruned model is not the one that it began with",
    "adapter": "{} is not the adapter that it began with",
}


def find_change(
    before: Manifest, settings: Mapping[str, Any], made_from: Mapping[str, str], names: Mapping[str, str]
) -> str | None:
    """Say in words what has changed since a checkpoint was written, if that changes the result; None otherwise.

    Args:
        before: the manifest of the checkpoint.
        settings: the settings now.
        made_from: name of an input -> its fingerprint now.
        names: name of an input -> what the user calls it.

    Examples: `trainer.learning_rate: 0.005 -> 0.001`, and `the rows of b.jsonl are not those that it began with`.
    """
    if changed := difference(before.settings, settings, ignored=HARMLESS | _SOURCES):
        return changed
    for key in {**before.made_from, **made_from}:
        if before.made_from.get(key) == made_from.get(key):
            continue
        changed = _OTHER.get(key, f"{key} has changed").format(names.get(key, "the data set"))
        read = difference(_reading(before.settings), _reading(settings), ignored={"path"}) if key == "rows" else None
        return f"{changed} ({read})" if read else changed
    return None


def _reading(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that rows are read with."""
    return {key: settings[key] for key in ("data", "dataset") if key in settings}


def checkpoints_of(out: Path) -> Path:
    """Return the folder that has the checkpoints of a training until its output is in place."""
    return out.with_name(f"{out.name}-checkpoints")


def events_of(out: Path, started: datetime) -> Path:
    """Return the folder for a tracker's events: the same after an interruption, another for another training."""
    return out.with_name(f"{out.name}-events") / started.strftime("%Y-%m-%d_%H-%M-%S")


def first_start(out: Path, *, fresh: bool) -> datetime:
    """Return when the training of an output began: the time in its checkpoints, or now where it begins anew.

    A chat template may write the date into each row. Rows that are read again after an interruption need the date of
    the first start, or else they would be other rows.
    """
    return processes.broadcast(lambda: _first_start(checkpoints_of(out), fresh=fresh))


def _first_start(folder: Path, *, fresh: bool) -> datetime:
    for path in [] if fresh else sorted(folder.glob(f"checkpoint-*/{MANIFEST_NAME}")):
        try:
            settings = Manifest.model_validate_json(path.read_text(encoding="utf-8")).settings
            return datetime.fromisoformat(settings[STARTED])
        except (ValueError, KeyError, TypeError):
            continue  # a damaged checkpoint is refused, or passed over, where it is to be used
    return datetime.now()
