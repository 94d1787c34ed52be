"""The least pruning with which a training fits into a memory, and the recipe for it."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loram.base.errors import UserError
from loram.base.size import show_size
from loram.model.sparsity import STRUCTURED
from loram.planner.settings import TRAINING, PlannerOptions, make_settings
from loram.planner.shapes import read_config
from loram.planner.total import Estimate, estimate_with
from loram.pruning.options import PruneOptions

_ALWAYS = ("max_length", "per_device_train_batch_size")  # written into every recipe: they decide most of the memory
GRID = (None, *(step / 20 for step in range(1, 20)))  # no pruning, 0.05, 0.1 ... 0.95


class Fit(BaseModel):
    """The estimate that fits into `memory` bytes, and the lines of a recipe that ask for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: int
    estimate: Estimate
    recipe: str


def fit(
    config: str | Path | Mapping[str, Any], memory: int, *, options: PlannerOptions | None = None, **fields: Any
) -> Fit:
    """Return the least ratio of `GRID` with which training fits.

    Where the precision is left open, the full model is tried in 16 bits, then in 4; then each ratio in 4 bits: four
    bits lose less than pruning does, so weights are quantised before any are removed.

    Args:
        config: as for `estimate`.
        memory: bytes of the device that trains; on a GPU all its memory, since the context is counted.
        options: how to train, which layers to leave whole, and the ratios of single spaces, which stay as they are;
            `ratio`, a sparse pattern or layers to drop cannot be given.
        fields: single options by name, over `options`.

    Raises:
        UserError: nothing fits (says how near the smallest comes), or what `estimate` raises.
    """
    chosen = PlannerOptions.of(options, **fields)
    pruning = chosen.pruning()
    if pruning.ratio is not None:
        raise UserError("--ratio, --memory: give one of the two; --memory finds a ratio")
    if pruning.pattern != STRUCTURED or pruning.drop_layers:
        raise UserError("--memory: looks for a ratio of structured pruning; leave --pattern and --drop-layers out")
    values, where = read_config(config)
    nearest: Estimate | None = None
    for ratio, in_4bit in _candidates(chosen.in_4bit):
        candidate = PruneOptions.of(pruning, ratio=ratio)
        training = chosen.training(pruned=candidate.prunes, in_4bit=in_4bit)
        estimate = estimate_with(values, where, make_settings(**training), candidate)
        if estimate.training.total <= memory:
            written = chosen.training(pruned=candidate.prunes, in_4bit=in_4bit or None)
            return Fit(
                memory=memory, estimate=estimate, recipe=recipe_lines(estimate, written, refit=bool(pruning.refit))
            )
        if nearest is None or estimate.training.total < nearest.training.total:
            nearest = estimate
    assert nearest is not None
    raise UserError(_too_little(memory, nearest))


def _candidates(in_4bit: bool | None) -> Iterator[tuple[float | None, bool]]:
    """Yield (ratio, whether in 4 bits), the one that loses least first."""
    if in_4bit is None:
        yield None, False
    yield from ((ratio, in_4bit is not False) for ratio in GRID)


def _too_little(memory: int, nearest: Estimate) -> str:
    return (
        f"--memory: nothing fits into {show_size(memory)}; the smallest, ratio {nearest.ratio} in "
        f"{4 if nearest.settings.quantised else 16} bits, takes {show_size(nearest.training.total)}; "
        f"try {', '.join(nearest.settings.advice())}"
    )


def recipe_lines(estimate: Estimate, written: Collection[str], *, refit: bool = False) -> str:
    """Return the `prune` and `train` sections of a recipe that trains like this, as YAML.

    Args:
        estimate: what to train.
        written: the options of training to write, by their names for the planner; those that take most memory are
            always written, and others are left to the defaults of `loram train`.
        refit: whether output projections are refitted.
    """
    if not estimate.pruned_layers:
        lines = ["# no pruning: train the full model with `loram train`"]
    else:
        ratios = {} if estimate.ratio is None else {"ratio": estimate.ratio}
        ratios |= {f"{name}_ratio": ratio for name, ratio in estimate.ratios.items()}
        if estimate.round_to > 1:
            ratios["round_to"] = estimate.round_to
        layers = {"keep_first": estimate.keep_first, "keep_last": estimate.keep_last}
        fitted = {"refit": "true", "bypass_rank": estimate.bypass_rank} if refit else {}
        lines = ["prune:", *(f"  {name}: {value}" for name, value in {**ratios, **layers, **fitted}.items())]
    sections: dict[str, list[str]] = {}
    for name, option in TRAINING.items():
        if name in {*written, *_ALWAYS}:
            line = f"{option.name}: {_yaml(getattr(estimate.settings, name))}"
            sections.setdefault(option.section, []).append(line)
    lines += ["train:", *(f"  {line}" for line in sections.pop("", []))]
    for section, inside in sections.items():
        lines += [f"  {section}:", *(f"    {line}" for line in inside)]
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)
