"""What pruning a model saves, from its config.json alone: no weights, no torch."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loram.model.architecture import Geometry, architecture_of
from loram.model.files import read_json
from loram.prune.counts import kept_units, prunable_layers


class Estimate(BaseModel):
    """Exact parameter counts of a model before and after structured pruning.

    `parameter_reduction` is their ratio, before / after; `units` what a pruned layer keeps of each space.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    ratio: float
    keep_first: int
    keep_last: int
    parameters: int
    pruned_parameters: int
    parameter_reduction: float
    pruned_layers: int
    units: dict[str, int]


def estimate(config: str | Path | dict[str, Any], *, ratio: float, keep_first: int = 4, keep_last: int = 2) -> Estimate:
    """Count parameters as LoRAM's tables do (arXiv 2502.13533): every one, embeddings and norms included.

    Args:
        config: a config.json, a folder that has one, a hub id, or the parsed content.
        ratio, keep_first, keep_last: as for `prune`.

    Raises:
        UserError: the config is not there or not of a supported family, or a setting is out of range.

    Example: LLaMA-2-70B at 0.85 has 68,976,648,192 parameters before and 16,272,924,672 after.
    """
    where = "config" if isinstance(config, dict) else str(config)
    values = config if isinstance(config, dict) else _read(config)
    architecture, geometry = architecture_of(values, where), Geometry.from_config(values, where)
    units = {space.name: kept_units(space, geometry.units(space), ratio) for space in architecture.spaces}
    layers = prunable_layers(geometry, keep_first, keep_last)
    full, small = geometry.layer_parameters(architecture), geometry.layer_parameters(architecture, units)
    parameters = geometry.other_parameters() + geometry.num_hidden_layers * full
    pruned = parameters - len(layers) * (full - small)
    return Estimate(
        model_type=architecture.model_type,
        ratio=ratio,
        keep_first=keep_first,
        keep_last=keep_last,
        parameters=parameters,
        pruned_parameters=pruned,
        parameter_reduction=parameters / pruned,
        pruned_layers=len(layers),
        units=units,
    )


def _read(config: str | Path) -> dict[str, Any]:
    path = Path(config).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        from loram.model.checkpoint import download_config

        path = download_config(str(config))
    return read_json(path)
