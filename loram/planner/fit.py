"""The least pruning with which a training fits into a memory, and the recipe for it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loram.base.errors import UserError
from loram.planner.settings import Settings, make_settings
from loram.planner.shapes import read_config
from loram.planner.size import show_size
from loram.planner.total import Estimate, estimate_with
from loram.training.methods.table import ANCHOR_STEPS

_TRAINER = (
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "gradient_checkpointing",
    "activation_offloading",
)
GRID = (None, *(step / 20 for step in range(1, 20)))  # none at all, 0.05, 0.1 ... 0.95


class Fit(BaseModel):
    """The estimate that fits into `memory` bytes, and the lines of a recipe that ask for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: int
    estimate: Estimate
    recipe: str


def fit(
    config: str | Path | Mapping[str, Any],
    memory: int,
    *,
    load_in_4bit: bool | None = None,
    keep_first: int | None = None,
    keep_last: int | None = None,
    **options: Any,
) -> Fit:
    """The least ratio of `GRID` with which training fits.

    Where `load_in_4bit` is left open, the full model is tried in 16 bits, then in 4; then each ratio in 4 bits: four
    bits lose less than pruning does, so weights are quantised before any are removed. A pruned model is trained as a
    recipe that prunes does it: anchored, unless `anchor_steps` is 0.

    Args:
        config, keep_first, keep_last, options: as for `estimate`.
        memory: bytes of the device that trains; on a GPU all of it, the context is counted.
        load_in_4bit: True or False to have only that.

    Raises:
        UserError: nothing fits (says how near the smallest comes), or what `estimate` raises.
    """
    values, where = read_config(config)
    if load_in_4bit is None and options.get("offload_embedding"):
        load_in_4bit = True  # it is of no use in 16 bits
    nearest: Estimate | None = None
    anchored = options.pop("anchor_steps", None)
    steps = ANCHOR_STEPS if anchored is None else anchored  # as a recipe that prunes is trained
    for ratio, in_4bit in _candidates(load_in_4bit):
        settings = make_settings(load_in_4bit=in_4bit, anchor_steps=0 if ratio is None else steps, **options)
        found = estimate_with(values, where, settings, ratio=ratio, keep_first=keep_first, keep_last=keep_last)
        if found.training.total <= memory:
            given = {**options, "anchor_steps": None if ratio is None else anchored}
            return Fit(memory=memory, estimate=found, recipe=recipe_lines(found, given))
        if nearest is None or found.training.total < nearest.training.total:
            nearest = found
    assert nearest is not None
    raise UserError(_too_little(memory, nearest))


def _candidates(load_in_4bit: bool | None) -> Iterator[tuple[float | None, bool]]:
    if load_in_4bit is None:
        yield None, False
    yield from ((ratio, load_in_4bit is not False) for ratio in GRID)


def _too_little(memory: int, nearest: Estimate) -> str:
    settings, advice = nearest.settings, []
    if not settings.load_in_4bit:
        advice.append("--load-in-4bit")
    if settings.per_device_train_batch_size > 1:
        advice.append("--per-device-train-batch-size 1")
    if not settings.gradient_checkpointing:
        advice.append("--gradient-checkpointing")
    advice.append("a smaller --max-length")
    return (
        f"--memory: nothing fits into {show_size(memory)}; the smallest, ratio {nearest.ratio} in "
        f"{4 if settings.load_in_4bit else 16} bits, takes {show_size(nearest.training.total)}; try {', '.join(advice)}"
    )


def recipe_lines(found: Estimate, given: Mapping[str, Any]) -> str:
    """The `prune` and `train` sections of a recipe that trains like this, as YAML.

    Args:
        found: what to train.
        given: the settings that were asked for; others are left to the defaults of `loram train`.
    """
    settings = found.settings
    wanted = {key for key, value in given.items() if value is not None}
    lines = []
    if found.ratio is not None:
        lines += ["prune:", f"  ratio: {found.ratio}"]
        lines += [f"  {key}: {getattr(found, key)}" for key in ("keep_first", "keep_last")]
    else:
        lines.append("# no pruning: train the full model with `loram train`")
    train = [f"  method: {settings.method}"] if settings.method != "lora" else []
    train += [
        f"  {key}: {_yaml(getattr(settings, key))}"
        for key in ("load_in_4bit", "offload_embedding")
        if getattr(settings, key)
    ]
    train += [
        f"  {key}: {_yaml(getattr(settings, key))}" for key in ("anchor_steps", "anchor_gradients") if key in wanted
    ]
    if "lora_dtype" in wanted:
        train.append(f"  lora_dtype: {settings.lora_dtype}")
    train += _section("lora_sp", settings, {"lora_sp_share": "share"}, wanted)
    lora = {"lora_r": "r", "lora_target_modules": "target_modules", "lora_dropout": "lora_dropout"}
    train += _section("lora", settings, lora, wanted)
    train += _section("trainer", settings, {key: key for key in _TRAINER}, wanted | {*_TRAINER[:2]})
    return "\n".join([*lines, "train:", *train])


def _section(name: str, settings: Settings, keys: Mapping[str, str], wanted: set[str]) -> list[str]:
    lines = [f"    {ours}: {_yaml(getattr(settings, key))}" for key, ours in keys.items() if key in wanted]
    return [f"  {name}:", *lines] if lines else []


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)
