"""The prune stage: from a base checkpoint to a plan and a pruned folder.

This file removes whole units; `sparse.py` removes single weights.
"""

import dataclasses
import functools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loram.base import processes
from loram.base.constants import SHARD_BYTES
from loram.base.progress import track
from loram.compute.device import join_processes
from loram.compute.loading import config_of, load_tokenizer, tower_names, write_config, write_wrapped_config
from loram.data.spec import as_spec
from loram.data.tokens import Tokens, load_tokens
from loram.disk.artifacts import check_output, publish
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.disk.writer import ShardedWriter
from loram.model.plan import PruningPlan
from loram.model.resize import narrow
from loram.pruning.check import check_prunable
from loram.pruning.choose import choose
from loram.pruning.criteria import CRITERIA
from loram.pruning.depth import Influence, random_layers
from loram.pruning.layout import base_of, blank_plan, in_order, pruned_specs, write_pruned_card
from loram.pruning.options import PruneOptions, ResolvedPruneOptions
from loram.pruning.refit import Refitter
from loram.pruning.score import ScoredLayer, Scoring, calibration_stream, score_layers
from loram.pruning.sparse import prune_sparse

BUILTIN_CALIBRATION = Path(__file__).parent / "calibration.jsonl"


def prune(
    base: str | Path,
    out: str | Path,
    *,
    options: PruneOptions | None = None,
    seed: int = 42,
    device: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    chat_template: str | Path | None = None,
    **fields: Any,
) -> PruningPlan:
    """Make a model smaller: remove units of its middle layers, whole layers, or single weights of all its layers.

    `structured` (LoRAM, arXiv 2502.13533, section 3.1) removes whole key-value groups, with their query heads, and MLP
    channels: `floor(I * (1 - ratio))` channels and `ceil(n_kv * (1 - ratio))` groups stay. It may also drop whole
    layers, those with the least block influence (ShortGPT, arXiv 2403.03853). The sparse patterns keep all shapes and
    remove single weights of every linear; only those that stay are stored, with a bit for every place.

    The model is streamed: one decoder layer is in memory at a time, and what it keeps is written as soon as it is
    scored. The base is read once, and twice where the criterion needs gradients or layers are dropped by their
    influence (but for some rows of the embedding and the norm before lm_head).

    Several processes of a launcher share the calibration text: each of them reads the layers, and the first one writes.

    Args:
        base: hub id, folder or GGUF file of the full model.
        out: the pruned folder to make: an ordinary Hugging Face folder with `loram_plan.json`.
        options: how to prune; single options may be given by name instead: `ratio=0.5`.
        seed: the seed of the random criterion.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.
        shard_bytes: size of the files that weights are written to, at most.
        chat_template: a .jinja file, or a model whose tokenizer has a template, in place of the model's own template.
        fields: single options by name, over `options`; see `PruneOptions`.

    Returns:
        The plan that was written.

    Raises:
        UserError: the model or data cannot be used, a setting is out of range, or `out` exists.
    """
    settings = PruneOptions.of(options, **fields).resolved()
    out = check_output(out, base)
    checkpoint = open_model(base, chat_template=chat_template)
    check_prunable(checkpoint, settings)
    settings = settings.for_model(checkpoint.geometry, checkpoint.architecture)
    on = join_processes(device)

    samples: list[list[int]] = []
    further: list[list[int]] = []
    if settings.reads_text(checkpoint.architecture):
        tokenizer = load_tokenizer(checkpoint)
        samples = _ids(load_calibration(checkpoint, tokenizer, settings))
        if settings.refit:
            further = further_text(checkpoint, tokenizer, settings, samples)
    if settings.sparse:
        return prune_sparse(checkpoint, out, settings, samples=samples, seed=seed, device=on, shard_bytes=shard_bytes)
    return _prune_structured(
        checkpoint, out, settings, samples=samples, further=further, seed=seed, device=on, shard_bytes=shard_bytes
    )


def _prune_structured(
    checkpoint: Checkpoint,
    out: Path,
    settings: ResolvedPruneOptions,
    *,
    samples: list[list[int]],
    further: list[list[int]],
    seed: int,
    device: torch.device,
    shard_bytes: int,
) -> PruningPlan:
    """Score units, and write what stays of a layer while it is in memory; arguments as for `prune`, already checked."""
    made_from = {"base": processes.broadcast(lambda: checkpoint.fingerprint)}
    with publish(out, kind="pruned", made_from=made_from) as staging:
        dropped, scored = _drop_and_score(
            checkpoint, settings, samples=samples, further=further, seed=seed, device=device, scratch=staging
        )
        if processes.first():
            decide = functools.partial(
                choose,
                geometry=checkpoint.geometry,
                model_type=checkpoint.architecture.model_type,
                base=base_of(checkpoint, made_from["base"]),
                options=settings,
                seed=seed,
                dropped=dropped,
            )
            plan = _write(checkpoint, staging, settings, scored, decide, dropped=dropped, shard_bytes=shard_bytes)
            made_from["plan"] = plan.fingerprint  # `publish` reads this at the end
        else:
            deque(scored, maxlen=0)
    return PruningPlan.load(out)


def _write(
    checkpoint: Checkpoint,
    out: Path,
    settings: ResolvedPruneOptions,
    scored: Scoring,
    decide: Callable[[Mapping[int, Mapping[str, Tensor]]], PruningPlan],
    *,
    dropped: Sequence[int],
    shard_bytes: int,
) -> PruningPlan:
    """Write what stays of the layers as they come, and everything else.

    Args:
        checkpoint: the full model.
        out: the folder to write into.
        settings: how to prune.
        scored: the layers with their scores.
        decide: makes a plan of the scores of some layers.
        dropped: the layers that are dropped.
        shard_bytes: the size of the files.
    """
    # Which units stay is open, but how many is not, so the files can be laid out before any unit's score is known.
    blank = blank_plan(checkpoint, settings, dropped=dropped)
    specs = in_order(pruned_specs(checkpoint, blank)[0], scored.order, blank)
    layers, scores = settings.layers(checkpoint.geometry), dict[int, Mapping[str, Tensor]]()
    wrapper, shown = checkpoint.wrapper if settings.keep_towers else None, checkpoint
    outside = {name: name if wrapper is None else wrapper.outside(name) for name in specs}
    left = {outside[name]: (checkpoint, name) for name in specs}  # what is copied, and from where
    written = {outside[name]: spec for name, spec in specs.items()}
    if wrapper is not None:
        shown, towers = checkpoint.whole, tower_names(checkpoint)
        left |= {name: (shown, stored) for name, stored in towers.items()}
        written |= {name: shown.spec(stored) for name, stored in towers.items()}
    refitter = Refitter()
    with ShardedWriter(out, written, shard_bytes) as writer:
        for layer in scored:
            if layer.index in dropped:
                continue
            own = {**layer.scores.get(settings.criterion, {}), **layer.expert_scores}
            layer_scores = {layer.index: own} if layer.index in layers else {}
            scores.update(layer_scores)
            for name, tensor in _narrowed(layer, decide(layer_scores), refitter, specs):
                writer.write(outside[name], tensor.to(specs[name].dtype))
                del left[outside[name]]
        for name, (source, stored) in track(list(left.items()), "Other weights"):
            writer.copy(name, source, stored)
    refitter.report()
    plan = decide(scores)
    shown.copy_side_files(out)
    if wrapper is None:
        write_config(config_of(checkpoint), plan, out)
    else:
        write_wrapped_config(checkpoint, plan, out)
    plan.save(out)
    write_pruned_card(checkpoint, plan, out, wrapped=wrapper is not None)
    return plan


def _drop_and_score(
    checkpoint: Checkpoint,
    settings: ResolvedPruneOptions,
    *,
    samples: list[list[int]],
    further: list[list[int]],
    seed: int,
    device: torch.device,
    scratch: Path,
) -> tuple[tuple[int, ...], Scoring]:
    """Decide which layers are dropped, and begin to score the units of the others.

    The influence of layers is known after a forward pass. That is a pass of its own, unless the criterion makes one
    before the first layer is scored.

    Returns:
        (the layers that are dropped, the scored layers to come).
    """
    layers, influence = settings.layers(checkpoint.geometry), Influence()
    criteria, experts = settings.scored(checkpoint.architecture)
    begin = functools.partial(
        score_layers,
        checkpoint,
        criteria,
        calibration=samples,
        gather_inputs=settings.bias_compensation,
        refit=blank_plan(checkpoint, settings, dropped=()) if settings.refit else None,
        refit_text=further,
        experts=experts,
        seed=seed,
        device=device,
        scratch=scratch,
    )
    droppable = settings.droppable(checkpoint.geometry, checkpoint.architecture, checkpoint.config)
    least = functools.partial(influence.least, droppable, settings.drop_layers)
    if settings.measures_influence and "gradient" in {*experts.reads, *(CRITERIA[name].reads for name in criteria)}:
        scored = begin(layers, observe_layer=influence.observe)
        return least(), scored
    if settings.measures_influence:
        stream = calibration_stream(checkpoint, samples, device=device, scratch=scratch)
        deque(stream.forward(observe_layer=influence.observe), maxlen=0)
        dropped = least()
    else:
        dropped = random_layers(droppable, settings.drop_layers, seed)
    return dropped, begin([layer for layer in layers if settings.narrows and layer not in dropped])


def _narrowed(
    layer: ScoredLayer, plan: PruningPlan, refitter: Refitter, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's tensors as the pruned model has them, in the order in which they stand among `names`."""
    biases = {}
    for path, linear in plan.compensated(layer.index):
        weight = layer.tensors[f"{path}.weight"]
        removed = layer.inputs[f"{path}.weight"].mean.to(weight)  # the mean input, (in_features,)
        kept = plan.kept_elements(layer.index, linear.columns)
        assert kept is not None
        removed[kept.to(removed.device)] = 0  # inputs that are still there need no making up for
        biases[f"{path}.bias"] = weight @ removed + layer.tensors.get(f"{path}.bias", 0)
    fitted = dict(refitter.tensors(layer.index, layer.tensors, layer.products, plan))
    whole = {**layer.tensors, **biases}
    for name in names:
        if name in fitted:
            yield name, fitted[name]
        elif name in whole:
            yield name, narrow(name, whole[name], plan)


def load_calibration(checkpoint: Checkpoint, tokenizer: Any, options: PruneOptions) -> Tokens:
    """Return the longest rows or pieces of the calibration data, or of the built-in passages where there is none.

    Raises:
        UserError: as `loram.data.tokens.load_tokens`.
    """
    count = options.calibration_samples
    spec = as_spec(options.calibration or BUILTIN_CALIBRATION)
    spec = spec.model_copy(update={"max_samples": min(count, spec.max_samples or count)})
    tokens = load_tokens(spec, tokenizer, options.calibration_length, vocabulary=checkpoint.vocabulary)
    lengths = [len(ids) for ids in tokens.rows["input_ids"]]
    # stable: whole pieces of a text before its short ends
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:count]
    return dataclasses.replace(tokens, rows=tokens.rows.select(longest))


def further_text(
    checkpoint: Checkpoint, tokenizer: Any, options: PruneOptions, samples: Sequence[list[int]]
) -> list[list[int]]:
    """Return the longest rows or pieces that the refit reads beside those that are scored on.

    Args:
        checkpoint, tokenizer: the model.
        options: how to prune.
        samples: the token ids that are scored on.
    """
    rows = _ids(load_calibration(checkpoint, tokenizer, options.for_refit))
    left = Counter(map(tuple, rows)) - Counter(map(tuple, samples))
    return [list(ids) for ids in left.elements()]


def _ids(tokens: Tokens) -> list[list[int]]:
    return [list(ids) for ids in tokens.rows["input_ids"]]
