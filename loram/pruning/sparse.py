"""Sparse pruning: zero single weights, one decoder layer in memory at a time, and write only those that stay."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loram.base import processes
from loram.base.errors import UserError
from loram.base.hashes import file_sha256
from loram.base.progress import track
from loram.compute.loading import config_of, write_config
from loram.compute.streaming import ResidentLayer, prefetched
from loram.disk.artifacts import publish
from loram.disk.checkpoint import Checkpoint
from loram.disk.tensorfile import TensorFileWriter
from loram.disk.writer import ShardedWriter
from loram.model.architecture import Architecture
from loram.model.modeling_loram import pack
from loram.model.plan import MASKS_NAME, PruningPlan
from loram.model.segments import Linear
from loram.pruning.criteria import SPARSE
from loram.pruning.evidence import Hessian, Inputs, InputStatistics
from loram.pruning.layout import blank_plan, mask_of, pruned_specs, write_pruned_card
from loram.pruning.options import ResolvedPruneOptions
from loram.pruning.score import calibration_stream
from loram.pruning.sparsify import sparsify


@dataclass(frozen=True, kw_only=True)
class SparseLayer:
    """A decoder layer after pruning, while its weights are in memory.

    Args:
        tensors: full name -> dense weight, zero where it was pruned.
        kept: full name of a pruned weight -> which of its elements stay, (out_features, in_features) bool.
    """

    tensors: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]


def prune_sparse(
    checkpoint: Checkpoint,
    out: Path,
    settings: ResolvedPruneOptions,
    *,
    samples: Sequence[list[int]],
    seed: int,
    device: torch.device,
    shard_bytes: int,
) -> PruningPlan:
    """Write the pruned folder; arguments as for `prune`, already checked.

    The masks are a file of their own, which the index of the weights names: it is part of the model, and it can also
    travel without the weights, beside an adapter.
    """
    fingerprint = processes.broadcast(lambda: checkpoint.fingerprint)
    made_from = {"base": fingerprint}
    with publish(out, kind="pruned", made_from=made_from) as staging:
        layers = sparse_layers(checkpoint, settings, samples=samples, seed=seed, device=device, scratch=staging)
        if processes.first():
            blank = blank_plan(checkpoint, settings, seed=seed, fingerprint=fingerprint)
            plan = _write(checkpoint, staging, blank, layers, shard_bytes)
            made_from["plan"] = plan.fingerprint  # `publish` reads this at the end
        else:
            deque(layers, maxlen=0)
    return PruningPlan.load(out)


def _write(
    checkpoint: Checkpoint, out: Path, blank: PruningPlan, layers: Iterable[SparseLayer], shard_bytes: int
) -> PruningPlan:
    """Write the layers as they come, and everything else; return the plan, which knows the masks now."""
    specs, masks = pruned_specs(checkpoint, blank)
    with (
        ShardedWriter(out, specs, shard_bytes, beside=dict.fromkeys(masks, MASKS_NAME)) as writer,
        TensorFileWriter(out / MASKS_NAME, masks) as mask_writer,
    ):
        left = dict.fromkeys(specs)
        for layer in layers:
            for name, tensor in layer.tensors.items():
                if (kept := layer.kept.get(name)) is not None:
                    mask_writer.write(mask_of(name), pack(kept))
                    tensor = tensor[kept]
                writer.write(name, tensor.to(specs[name].dtype))
                del left[name]
        for name in track(list(left), "Other weights"):
            writer.copy(name, checkpoint)
    plan = blank.model_copy(update={"masks": file_sha256(out / MASKS_NAME)})
    checkpoint.copy_side_files(out)
    write_config(config_of(checkpoint), plan, out)
    plan.save(out)
    write_pruned_card(checkpoint, plan, out)
    return plan


def sparse_layers(
    checkpoint: Checkpoint,
    settings: ResolvedPruneOptions,
    *,
    samples: Sequence[list[int]] = (),
    seed: int = 42,
    device: torch.device | None = None,
    scratch: Path | None = None,
) -> Iterator[SparseLayer]:
    """Prune the linears of decoder layers one layer after the other, bottom up; the base is read once.

    With a criterion that reads inputs, a layer sees what comes out of the pruned layers below it (rounded to the file's
    dtype), as in the reference code of SparseGPT and Wanda. Several processes share the text, and each prunes for
    itself; what reads no text is left to the first one.

    Raises:
        UserError: there is no text, or what comes out is not finite.
    """
    job = _Job(checkpoint, settings, seed)
    if SPARSE[settings.criterion].reads == "nothing":
        if not processes.first():
            return
        loads = prefetched(job.layers, checkpoint.layer_tensors)
        with contextlib.closing(loads):
            for index in track(list(job.layers), "Layers"):
                layer = ResidentLayer(index=index, tensors=next(loads))
                job.edit(layer)
                yield SparseLayer(tensors=layer.tensors, kept=job.kept)
                layer.tensors.clear()
        return
    stream = calibration_stream(checkpoint, samples, device=device, scratch=scratch)
    with contextlib.closing(stream.forward(job.observe, edit=job.edit)) as layers:
        for layer in layers:
            yield SparseLayer(tensors=layer.tensors, kept=job.kept)
            if layer.index == job.layers[-1]:
                return


class _Job:
    """Gathers what the criterion has to know about a layer's inputs, then prunes the layer's linears."""

    def __init__(self, checkpoint: Checkpoint, settings: ResolvedPruneOptions, seed: int) -> None:
        self.checkpoint, self.settings, self.seed = checkpoint, settings, seed
        self.architecture = checkpoint.architecture
        self.layers = settings.layers(checkpoint.geometry)
        self.inputs: dict[str, Inputs] = {}  # by what linears of the layer read, since several read the same
        self.kept: dict[str, Tensor] = {}  # the masks of the layer that was pruned last

    def observe(self, name: str, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Take in a linear's inputs, unless another linear of the layer has read the same."""
        place = self.architecture.split(name)
        assert place is not None
        layer, rest = place
        if layer not in self.layers:
            return
        row = self.checkpoint.rows_by_layer[layer]
        linear = row.linear(rest.removesuffix(".weight"))
        if not linear.has_units or linear is not _first_reader(row, linear):
            return
        if linear.reads not in self.inputs:
            features, device = inputs.shape[-1], inputs.device
            hessian = SPARSE[self.settings.criterion].reads == "hessian"
            self.inputs[linear.reads] = Hessian(features, device) if hessian else InputStatistics(features, 1, device)
        self.inputs[linear.reads].add_(inputs, real)

    def edit(self, layer: ResidentLayer) -> None:
        """Prune a layer's weights in place."""
        self.kept = {}
        for inputs in self.inputs.values():
            inputs.join_()
        linears = [linear for linear in self.checkpoint.rows_by_layer[layer.index].linears if linear.has_units]
        for number, linear in enumerate(linears) if layer.index in self.layers else ():
            name = f"{self.architecture.layer_path(layer.index)}.{linear.path}.weight"
            weight = layer.tensors[name]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.index * 101 + number)
            try:
                pruned, kept = sparsify(
                    weight.float(),
                    self.inputs.get(linear.reads),
                    criterion=self.settings.criterion,
                    pattern=self.settings.pattern,
                    ratio=self.settings.removed_share,
                    generator=generator,
                )
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch's types leave it out
                raise UserError(
                    f"calibration: the inputs of {name} do not determine it; give more text, or another criterion"
                ) from error
            if not torch.isfinite(pruned).all():
                raise UserError(f"{self.checkpoint.name}: {name} is not finite once pruned; is the model sound?")
            weight.copy_(pruned.to(self.checkpoint.spec(name).dtype))
            self.kept[name] = kept
        self.inputs.clear()


def _first_reader(row: Architecture, linear: Linear) -> Linear:
    """Return the first linear of a layer that reads the same as this one."""
    return next(other for other in row.linears if other.reads == linear.reads)
