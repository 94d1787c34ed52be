"""The prune stage: base checkpoint -> plan -> pruned folder."""

import logging
from pathlib import Path

from loram.artifacts import check_output, publish
from loram.data import load_rows, tokenize
from loram.data_spec import DataSpec, as_spec
from loram.errors import UserError
from loram.model.architecture import Architecture, architecture_of
from loram.model.checkpoint import SHARD_BYTES, Checkpoint, open_model, rewrite
from loram.model.device import pick_device
from loram.model.plan import BaseReference, PruningPlan
from loram.model.pruned import load_tokenizer, write_config
from loram.model.resize import narrow
from loram.progress import track
from loram.prune.choose import choose
from loram.prune.counts import kept_units, prunable_layers
from loram.prune.criteria import CRITERIA
from loram.prune.score import score

logger = logging.getLogger(__name__)

BUILTIN_CALIBRATION = Path(__file__).parent / "calibration.jsonl"


def prune(
    base: str | Path,
    out: str | Path,
    *,
    ratio: float,
    criterion: str = "taylor",
    calibration: DataSpec | str | Path | None = None,
    calibration_samples: int = 10,
    calibration_length: int = 128,
    keep_first: int = 4,
    keep_last: int = 2,
    seed: int = 42,
    device: str | None = None,
) -> PruningPlan:
    """Remove whole key-value groups (with their query heads) and MLP channels from a model's middle layers.

    Structured pruning of LoRAM (arXiv 2502.13533, section 3.1): in the layers `[keep_first, L - keep_last)`,
    `floor(I * (1 - ratio))` channels and `ceil(n_kv * (1 - ratio))` groups stay.

    Args:
        base: hub id, folder or GGUF file of the full model.
        out: the pruned folder to make: an ordinary Hugging Face folder with `loram_plan.json`.
        ratio: share of the units to remove, between 0 and 1.
        criterion: `taylor`, `magnitude` or `random`.
        calibration: data set for `taylor`; a few built-in passages where none is given.
        calibration_samples: how many of its rows.
        calibration_length: tokens a sample is cut to.
        seed: of the random criterion.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.

    Returns:
        The plan that was written.

    Raises:
        UserError: the model or data cannot be used, a setting is out of range, or `out` exists.
    """
    out = Path(out)
    if criterion not in CRITERIA:
        raise UserError(f"criterion {criterion!r} is not known; known are {', '.join(CRITERIA)}")
    check_output(out)
    checkpoint = open_model(base)
    geometry, architecture = checkpoint.geometry, architecture_of(checkpoint.config, checkpoint.name)
    for space in architecture.spaces:
        kept_units(space, geometry.units(space), ratio)  # a ratio that cannot be is refused before the scoring
    layers = prunable_layers(geometry, keep_first, keep_last)
    check_weights(checkpoint, architecture)

    samples: list[list[int]] = []
    if CRITERIA[criterion].needs_gradient:
        samples = _calibration(checkpoint, calibration, calibration_samples, calibration_length)
    scores = score(checkpoint, criterion, layers, calibration=samples, seed=seed, device=pick_device(device))
    plan = choose(
        scores,
        geometry,
        model_type=architecture.model_type,
        base=BaseReference(name=checkpoint.name, fingerprint=checkpoint.fingerprint),
        criterion=criterion,
        ratio=ratio,
        seed=seed,
        keep_first=keep_first,
        keep_last=keep_last,
    )
    shrink(checkpoint, plan, out)
    return plan


def check_weights(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuse a checkpoint whose tensors are missing or of another shape than its config says.

    Raises:
        UserError: names the tensor, its shape and the expected one.
    """
    geometry = checkpoint.geometry
    if "quantization_config" in checkpoint.config:
        raise UserError(f"{checkpoint.name}: the model is quantised; prune the original in 16 or 32 bits")
    if f"model.layers.{geometry.num_hidden_layers}.{architecture.linears[0]}.weight" in checkpoint.index:
        raise UserError(f"{checkpoint.name}: has more layers than config.json's {geometry.num_hidden_layers}")
    for layer in range(geometry.num_hidden_layers):
        for linear in architecture.linears:
            name = f"model.layers.{layer}.{linear}.weight"
            if name not in checkpoint.index:
                raise UserError(f"{checkpoint.name}: no tensor {name}, which config.json's family needs")
            if checkpoint.shape(name) != geometry.linear_shape(linear):
                raise UserError(
                    f"{checkpoint.name}: {name} has shape {checkpoint.shape(name)}, "
                    f"but config.json says {geometry.linear_shape(linear)}"
                )


def _calibration(
    checkpoint: Checkpoint, data: DataSpec | str | Path | None, count: int, length: int
) -> list[list[int]]:
    spec = as_spec(data or BUILTIN_CALIBRATION)
    spec = spec.model_copy(update={"max_samples": min(count, spec.max_samples or count)})
    tokens = tokenize(load_rows(spec), load_tokenizer(checkpoint), length, name=spec.path)
    pieces = [list(ids) for ids in tokens.rows["input_ids"]]
    return sorted(pieces, key=len, reverse=True)[:count]  # stable: whole pieces of a text before its short ends


def shrink(checkpoint: Checkpoint, plan: PruningPlan, out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the pruned folder: config and code, plan, narrowed weights, tokenizer. Reads one tensor at a time."""
    with publish(out, kind="pruned", made_from={"base": plan.base.fingerprint, "plan": plan.fingerprint}) as staging:
        rewrite(
            checkpoint,
            staging,
            lambda name, tensor: narrow(name, tensor, plan),
            progress=lambda names: track(names, "Writing pruned weights"),
            shard_bytes=shard_bytes,
        )
        write_config(checkpoint, plan, staging)
        plan.save(staging)
