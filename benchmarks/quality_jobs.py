"""The rows of the quality benchmark: what each one trains, and the two grids of rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

CRITERIA = ("taylor", "magnitude", "activation", "wanda", "flap", "random")
RATIOS = (0.5, 0.65, 0.75, 0.85)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the table, for one seed.

    Args:
        base: the model that is trained: `pruned`; `full` for baselines (in 4 bits with `nf4`); `kept` for the full
            model with only those parts of the factors that pruning keeps, which is what training on a perfect pruned
            model could reach; or `untuned` for no training.
        ratio, criterion: the ratio and the criterion of pruning.
        prune: options of the prune stage beyond the defaults; calibration text is named by its file name.
        alignment: `none`, or the objective, the steps and optionally the learning rate: `distill 50 3e-4`.
        recovery: `plain`, `corrected` (EMLoC), `scaled` (with a multiplier that is chosen on development rows),
            `polished N RATE` (with N more steps on the streamed full model), or `none`, which evaluates the pruned
            model with its adapter.
        nf4: whether the model is in 4 bits during the training.
        steps: the steps of the training (default: those of the command line).
        train: options of the train stage beyond the common ones.
        seed: the seed of pruning, alignment and training.
    """

    base: str = "pruned"
    ratio: float = 0.5
    criterion: str = "taylor"
    alignment: str = "none"
    recovery: str = "plain"
    nf4: bool = False
    steps: int | None = None
    prune: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    seed: int = 42

    @property
    def name(self) -> str:
        """The name of the row, without the seed."""
        if self.base == "untuned":
            return "untuned"
        options = {**self.train, **self.train.get("lora", {}), **self.prune}
        extra = "".join(f", {key} {value}" for key, value in sorted(options.items()) if key != "lora")
        extra += f", {self.steps} steps" if self.steps else ""
        if self.base == "full":
            return ("QLoRA" if self.nf4 else "LoRA") + f" on the full model{extra}"
        if self.base == "kept":
            return f"LoRA on the full model, only where p={self.ratio} {self.criterion}{extra} keeps it"
        recovery = {"plain": "", "none": ", no recovery"}.get(self.recovery, f", {self.recovery}")
        quantised = ", NF4" if self.nf4 else ""
        return f"p={self.ratio} {self.criterion}, align {self.alignment}{quantised}{extra}{recovery}"

    @property
    def tag(self) -> str:
        """The part of a folder's name that distinguishes this job's adapter from others on the same model."""
        options = [f"{key}-{value}" for key, value in sorted(self.train.items())]
        parts = [*(["nf4"] if self.nf4 else []), *([f"{self.steps}steps"] if self.steps else []), *options]
        return "-".join([*parts, f"s{self.seed}"]).translate(str.maketrans(" {}':,/", "_" * 7))


def jobs(grid: str, seeds: Sequence[int], steps: int) -> Iterator[Job]:
    """Yield the rows of a grid; the baselines come first."""
    for seed in seeds:
        yield Job(base="untuned", seed=seed)
        yield Job(base="full", seed=seed)
    yield from (small_grid if grid == "small" else full_grid)(seeds, steps)


def small_grid(seeds: Sequence[int], steps: int) -> Iterator[Job]:
    """Yield the rows that two cores can compute in some hours. The most important ones come first, so stop any time."""
    first, often, last = seeds[0], {"anchor_steps": max(1, steps // 4)}, 2 * steps // 5
    # training and polishing together take as many steps as the other rows
    polished: dict[str, Any] = {"steps": steps - last, "recovery": f"polished {last} 0.001"}
    for ratio, train in product((0.5, 0.75), ({}, often)):
        yield from (Job(ratio=ratio, train=train, seed=seed) for seed in seeds)
    yield from (Job(train=often, **polished, seed=seed) for seed in seeds)
    yield from (Job(ratio=ratio, train=often, **polished, seed=first) for ratio in (0.75, 0.85))
    yield Job(train=often, steps=steps - last, recovery=f"polished {last} 0.0005", seed=first)
    yield Job(**polished, seed=first)
    yield Job(base="full", steps=last, seed=first)
    yield from (Job(base="kept", ratio=ratio, seed=first) for ratio in (0.5, 0.75))
    yield Job(train={**often, "anchor_gradients": False}, seed=first)
    for alignment in ("distill 25", "clm 25"):
        yield from (Job(alignment=alignment, seed=seed) for seed in seeds)
    yield from (Job(alignment="distill 25", recovery="corrected", seed=seed) for seed in seeds)
    yield from (Job(alignment=alignment, seed=first) for alignment in ("distill 100", "distill 25 3e-4"))
    yield Job(alignment="distill 25", train=often, seed=first)
    yield from small_ablations(seeds, often)


def small_ablations(seeds: Sequence[int], often: dict[str, Any]) -> Iterator[Job]:
    """Yield rows that differ from the others in one option that may or may not help."""
    first = seeds[0]
    yield Job(recovery="none", seed=first)
    yield from (Job(criterion=criterion, seed=first) for criterion in CRITERIA[1:])
    yield from (Job(criterion=criterion, seed=seed) for criterion in ("flap", "activation") for seed in seeds[1:])
    yield Job(ratio=0.75, criterion="flap", seed=first)
    yield from (Job(criterion=name, prune={"bias_compensation": True}, seed=first) for name in ("taylor", "flap"))
    task = {"calibration": "gsm8k_train.jsonl"}
    yield from (Job(prune=task, seed=seed) for seed in seeds)
    much = {"calibration_samples": 64, "calibration_length": 256}
    for prune in (task, {**task, **much}):
        yield Job(base="kept", prune=prune, seed=first)
    yield Job(base="kept", criterion="flap", seed=first)
    yield from (Job(prune={**task, **much}, seed=seed) for seed in seeds)
    yield Job(prune={"calibration": "wikitext2_valid.txt", **much}, seed=first)
    yield from (Job(ratio=ratio, seed=first) for ratio in (0.65, 0.85))
    yield Job(prune={"keep_first": 8, "keep_last": 6}, seed=first)
    for lora in ({"use_rslora": True}, {"init_lora_weights": "eva"}, {"lora_alpha": 32}, {"r": 32, "lora_alpha": 64}):
        yield Job(train={"lora": lora}, seed=first)
    yield Job(base="full", train={"lora": {"use_rslora": True}}, seed=first)
    yield Job(base="full", nf4=True, seed=first)
    yield from (Job(nf4=True, recovery=recovery, seed=first) for recovery in ("plain", "corrected"))
    yield Job(nf4=True, train=often, seed=first)
    yield from (Job(recovery="scaled", seed=seed) for seed in seeds)
    yield Job(train=often, recovery="scaled", seed=first)


def full_grid(seeds: Sequence[int], steps: int) -> Iterator[Job]:
    """Yield all combinations, for a GPU."""
    alignments, last = ("none", "clm 100", "distill 100", "distill 400"), 2 * steps // 5
    anchors: tuple[dict[str, Any], ...] = ({}, {"anchor_steps": max(1, steps // 8)})
    for seed in seeds:
        yield Job(base="full", nf4=True, seed=seed)
        for ratio, criterion, alignment, train in product(RATIOS, CRITERIA, alignments, anchors):
            for recovery in ("plain",) if alignment == "none" else ("plain", "corrected"):
                yield Job(
                    ratio=ratio, criterion=criterion, alignment=alignment, recovery=recovery, train=train, seed=seed
                )
        yield from (
            Job(alignment=alignment, recovery=how, seed=seed) for alignment in alignments for how in ("none", "scaled")
        )
        for ratio, train in product(RATIOS, anchors):
            yield Job(ratio=ratio, train=train, steps=steps - last, recovery=f"polished {last} 0.001", seed=seed)
