"""What does each way to train an adapter keep of LoRA's gain, and what does it cost?

Each way trains on the same rows, and is judged by the full model with the recovered adapter, as in quality.py. Its
costs are floating point operations, bytes of the full model that are read while the adapter trains, peak memory, and
seconds. The operations are those that `loram estimate` counts, for the tokens that were trained on. Those of pruning,
whose passes over its text are made once, however long the training, stand beside them in a column of their own.

    python benchmarks/frontier.py --model models/SmolLM2-135M-Instruct --data DIR --output-dir runs/frontier

DIR is as for quality.py. Pruning reads one of two texts: `general`, which is WikiText-2 validation text, or `mixed`,
which is 20 pieces of that and 30 GSM8K training rows that no adapter is trained on. The script writes frontier.json,
frontier.md (the table) and frontier.png beside itself, after each way.
A second call only does what is missing. For a GPU: `--steps 200 --batch 8 --train-samples 1600 --samples 200`.

`--half-price` takes other ways: those whose training takes half of the operations of LoRA on the full model.
`--resident` does exact steps in memory, with the same result as streamed ones, and in less time on a small model.
"""

import argparse
import json
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from quality import Bench, add_kept_gain
from quality_jobs import Job

import loram
from loram.compute.loading import load_tokenizer
from loram.data.spec import as_spec
from loram.data.tokens import load_tokens
from loram.disk.checkpoint import Checkpoint
from loram.pruning.options import PruneOptions
from loram.training.rounds import steps_of_round

PIECES, ROWS, FIRST_ROW, LENGTH = 20, 30, 4000, 256
COLUMNS = (
    "kept gain",
    "GSM8K",
    "WikiText-2",
    "operations",
    "those of pruning",
    "full model read",
    "peak memory",
    "seconds",
)


class Way(NamedTuple):
    """A way to train, and what the picture calls it."""

    label: str
    job: Job


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a way costs.

    Args:
        operations: of the training.
        pruning: the operations of scoring and refitting, which are done once, however long the training.
        read: bytes of the full model that are read while the adapter trains.
        seconds: of the training and what follows.
        peak: the peak resident memory of its stages, each in a process of its own, in bytes.
    """

    operations: float
    pruning: float
    read: float
    seconds: float
    peak: int


def prune_options(text: str, *, refit: bool = True, rank: int = 32) -> dict[str, Any]:
    """Return options of a pruning that reads a text of `write_texts`."""
    options = {"calibration": f"{text}.jsonl", "calibration_length": LENGTH}
    return options | ({"refit": True, "bypass_rank": rank} if refit else {})


def ways(steps: int, seeds: list[int]) -> Iterator[Way]:
    """Yield the ways: those that say most for all seeds, and then the others for the first seed."""
    bypass, end = prune_options("mixed"), exact_end(steps)
    for seed in seeds:
        yield Way("untuned", Job(base="untuned", seed=seed))
        yield Way("LoRA on the full model", Job(base="full", seed=seed))
        for ratio in (0.5, 0.75):
            yield Way("refit, bypass", Job(ratio=ratio, prune=bypass, seed=seed))
            yield Way("refit, bypass, exact end", Job(ratio=ratio, prune=bypass, **end, seed=seed))
    yield from single_runs(steps, seeds[0])


def half_price(bench: "Frontier", steps: int, seed: int) -> Iterator[Way]:
    """Yield the ways whose training takes half of the operations of LoRA, and what they are compared with."""
    yield Way("untuned", Job(base="untuned", seed=seed))
    yield Way("LoRA on the full model", Job(base="full", seed=seed))
    yield Way("LoRA, half of the steps", Job(base="full", steps=steps // 2, seed=seed))
    whole, exact = bench.operations(), steps // 4
    for ratio in (0.5, 0.75):
        bypass = prune_options("mixed")
        pruned = bench.operations(ratio=ratio, **refit_of(bypass))
        first = int((steps / 2 * whole - exact * bench.operations(engine="streamed")) / pruned)
        job = Job(ratio=ratio, prune=bypass, steps=first, recovery=f"polished {exact} 0.001", seed=seed)
        yield Way("refit, bypass, exact end, half price", job)
        yield Way("refit, bypass", Job(ratio=ratio, prune=bypass, seed=seed))


def refit_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return those options of a pruning that the estimate of a training needs."""
    return {name: options[name] for name in ("refit", "bypass_rank") if name in options}


def exact_end(steps: int) -> dict[str, Any]:
    """Return the options of a job whose last two fifths are steps on the streamed full model."""
    exact = 2 * steps // 5
    return {"steps": steps - exact, "recovery": f"polished {exact} 0.001"}


def single_runs(steps: int, seed: int) -> Iterator[Way]:
    """Yield the ways of one seed."""
    plain, refit, end = prune_options("mixed", refit=False), prune_options("mixed", rank=0), exact_end(steps)
    fewer = {"steps": steps - end["steps"], "train": {"engine": "streamed"}}
    yield Way("streamed, fewer steps", Job(base="full", **fewer, seed=seed))
    yield Way("built-in text, refit, bypass", Job(prune={"refit": True, "bypass_rank": 32}, seed=seed))
    for ratio in (0.5, 0.75):
        yield Way("plain", Job(ratio=ratio, prune=plain, seed=seed))
        yield Way("refit", Job(ratio=ratio, prune=refit, seed=seed))
    yield Way("plain, exact end", Job(prune=plain, **end, seed=seed))
    yield Way("general text, refit, bypass", Job(prune=prune_options("general"), seed=seed))
    yield Way("anchored", Job(prune=plain, train={"anchor_steps": max(1, steps // 4)}, seed=seed))


def write_texts(model: Path, data: Path, out: Path) -> None:
    """Write the calibration texts, one piece or row per line."""
    tokenizer = load_tokenizer(Checkpoint(model))
    ids = tokenizer((data / "wikitext2_valid.txt").read_text())["input_ids"]
    starts = range(0, len(ids) - LENGTH, LENGTH)
    general = [tokenizer.decode(ids[start : start + LENGTH]) for start in islice(starts, PIECES + ROWS)]
    with (data / "gsm8k_train.jsonl").open() as file:
        rows = [json.loads(line) for line in islice(file, FIRST_ROW, FIRST_ROW + ROWS)]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
            tokenize=False,
        )
        for row in rows
    ]
    # two pieces, three rows, and so on, so that scoring, which reads the first ten, reads both kinds
    mixed = [text for n in range(PIECES // 2) for text in (*general[2 * n : 2 * n + 2], *chats[3 * n : 3 * n + 3])]
    for name, texts in (("general", general), ("mixed", mixed)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (out / f"{name}.jsonl").write_text("".join(lines))


class Frontier(Bench):
    """Does each stage in a process of its own, whose peak memory is recorded, and counts what it costs."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.peaks, self.peak = self.out / "peaks.json", 0
        if not (self.out / "tokens.json").exists():
            in_process(lambda: write_texts(args.model, args.data, self.out))
            in_process(self.count_tokens)
        self.tokens: dict[str, float] = json.loads((self.out / "tokens.json").read_text())

    def data(self, name: str, **options: Any) -> dict[str, Any]:
        """Name a file in the folder of the data, or one of the texts."""
        own = self.out / name
        return {"path": str(own), **options} if own.exists() else super().data(name, **options)

    def count_tokens(self) -> None:
        """Write how many tokens the calibration texts have, and a row that is trained on in the mean."""
        checkpoint = Checkpoint(self.args.model)
        tokenizer, counts = load_tokenizer(checkpoint), {}
        for name, length in (("general.jsonl", LENGTH), ("mixed.jsonl", LENGTH), ("gsm8k_train.jsonl", 512)):
            spec = as_spec(self.data(name, max_samples=self.args.train_samples))
            rows = load_tokens(spec, tokenizer, length, vocabulary=checkpoint.vocabulary).rows["input_ids"]
            counts[name] = sum(map(len, rows)) / (len(rows) if length == 512 else 1)
        (self.out / "tokens.json").write_text(json.dumps(counts) + "\n")

    def make(self, name: str, action: Callable[[Path], Any]) -> Path:
        """Make a folder by `action` in a process of its own, unless it exists."""
        peaks: dict[str, int] = json.loads(self.peaks.read_text()) if self.peaks.is_file() else {}

        def measure(folder: Path) -> None:
            peaks[name] = in_process(lambda: action(folder))
            self.peaks.write_text(json.dumps(peaks, indent=2) + "\n")

        folder = super().make(name, measure)
        self.peak = max(self.peak, peaks[name])
        return folder

    def run(self, job: Job) -> dict[str, Any]:
        """Compute a row; afterwards `peak` is the peak memory of its stages."""
        self.peak = 0
        return super().run(job)

    def judge(self, model: Path, adapter: Path | None) -> dict[str, float]:
        """Compute the perplexities of a model in a process of its own."""
        in_process(lambda: super(Frontier, self).judge(model, adapter))
        return super().judge(model, adapter)  # reads what that process wrote

    def cost(self, job: Job, seconds: dict[str, float]) -> Cost:
        """Count what a job costs; its folders have been made."""
        if job.base == "untuned":
            return Cost(operations=0, pruning=0, read=0, seconds=0, peak=0)
        steps, step_tokens = job.steps or self.args.steps, self.args.batch * self.tokens["gsm8k_train.jsonl"]
        pruning = refit_of(job.prune) | ({"ratio": job.ratio} if job.base == "pruned" else {})
        training = {name: value for name, value in job.train.items() if name != "lora"}
        plan = self.estimate(**pruning, **training)
        operations = plan.arithmetic.flops_per_token * step_tokens * steps
        read, model_bytes = plan.read_per_step * steps, self.full_bytes()
        if every := job.train.get("anchor_steps"):
            read += 2 * model_bytes * measurements(steps, every)
        if job.recovery.startswith("polished"):
            last, exact = int(job.recovery.split()[1]), self.estimate(engine="streamed")
            operations += self.operations(engine="streamed") * step_tokens * last
            read += exact.read_per_step * last
        return Cost(
            operations=operations,
            pruning=self.pruning_operations(job) if job.base == "pruned" else 0.0,
            read=read,
            seconds=sum(seconds.values()) - seconds.get("prune", 0.0),
            peak=self.peak,
        )

    def estimate(self, **fields: Any) -> Any:
        """Return the estimate of a training as this machine does it."""
        rows = {"per_device_train_batch_size": self.args.batch, "lora_dropout": 0.0}
        return loram.estimate(self.args.model, device=self.args.device, **rows, **fields)

    def operations(self, **fields: Any) -> float:
        """Return the operations of a training per token."""
        operations: float = self.estimate(**fields).arithmetic.flops_per_token
        return operations

    def polish(self, job: Job, adapter: Path, out: Path) -> None:
        """Polish an adapter, or take the same exact steps in memory."""
        if not self.args.resident:
            return super().polish(job, adapter, out)
        exact = Job(base="full", steps=int(job.recovery.split()[1]), train={"adapter": adapter}, seed=job.seed)
        return self.train(exact, self.args.model, out)

    def full_bytes(self) -> int:
        """Return the bytes of the full model's files."""
        return sum(file.stat().st_size for file in Path(self.args.model).glob("*.safetensors"))

    def pruning_operations(self, job: Job) -> float:
        """Return the operations of scoring with gradients, and of the refit's passes over its text.

        Every weight takes two operations per token forward, and as many when a layer computes again in the backward
        pass. Gradients take four more, of the rows that are scored on.
        """
        options = PruneOptions.of(None, ratio=job.ratio)
        weights: float = self.estimate().arithmetic.full_flops_per_token / 4  # of LoRA: forward, and back to inputs
        scored = options.calibration_samples * LENGTH
        text = self.tokens[job.prune["calibration"]] if "calibration" in job.prune and "refit" in job.prune else scored
        return weights * (4 * text + 4 * scored)


def measurements(steps: int, every: int) -> int:
    """Return how often an anchored training measures the full model."""
    done = count = 0
    while done < steps:
        done += steps_of_round(done, every, steps)
        count += 1
    return count


def in_process(action: Callable[[], Any]) -> int:
    """Call a function in a process of its own, and return the peak resident memory of that process, in bytes.

    This process computes nothing itself, so that it has no threads that the other one would miss.

    Raises:
        SystemExit: the function failed there.
    """
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(code)
    return usage.ru_maxrss * 1024


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format the table; operations are multiples of those of LoRA on the full model."""
    whole = next(row["cost"]["operations"] for row in rows if row["label"] == "LoRA on the full model")
    lines = [f"| way | p | seed | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for row in rows:
        job, cost = row["job"], row["cost"]
        cells = [
            row["label"],
            str(job["ratio"]) if job["base"] == "pruned" else "",
            str(job["seed"]),
            f"{100 * row['kept_gain']:.0f}%" if "kept_gain" in row else "",
            f"{row['gsm8k']:.3f}",
            f"{row['wikitext2']:.2f}",
            f"{cost['operations'] / whole:.2f}",
            f"{cost['pruning'] / whole:.2f}",
            f"{cost['read'] / 1e9:.1f} GB",
            f"{cost['peak'] / 1e9:.2f} GB",
            f"{cost['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the kept gain of every row against each cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes: Any
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained", sharey=True)
    rows = [row for row in rows if "kept_gain" in row and row["label"] != "untuned"]
    labels = list(dict.fromkeys((row["label"], row["job"]["ratio"]) for row in rows))
    whole = next(row["cost"]["operations"] for row in rows if row["label"] == "LoRA on the full model")
    panels = (
        ("operations", whole, "operations of training, LoRA on the full model = 1"),
        ("read", 1e9, "GB of the full model read while training"),
        ("peak", 1e9, "peak memory of its stages, GB"),
        ("seconds", 1, "seconds on a busy machine"),
    )
    colours = {label: f"C{place}" for place, label in enumerate(dict.fromkeys(label for label, _ in labels))}
    for panel, (key, unit, title) in zip(axes.flat, panels, strict=True):
        for label, ratio in labels:
            chosen = [row for row in rows if (row["label"], row["job"]["ratio"]) == (label, ratio)]
            pruned = chosen[0]["job"]["base"] == "pruned"
            panel.plot(
                [row["cost"][key] / unit for row in chosen],
                [100 * row["kept_gain"] for row in chosen],
                "s" if not pruned else "o" if ratio == 0.5 else "^",
                color=colours[label],
                label=f"{label}, p = {ratio}" if pruned else label,
            )
        panel.set_xlabel(title)
        panel.set_ylabel("kept gain, %")
        panel.grid(alpha=0.3)
    axes[0][1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--align-learning-rate", type=float, default=1e-3)
    parser.add_argument("--train-samples", type=int, default=512, help="how many GSM8K training rows to use")
    parser.add_argument("--samples", type=int, default=40, help="how many GSM8K test answers to score")
    parser.add_argument("--pieces", type=int, default=16, help="how many WikiText-2 test pieces of 256 tokens to score")
    parser.add_argument("--dev-samples", type=int, default=24)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--half-price", action="store_true", help="only ways that take half of LoRA's operations")
    parser.add_argument("--resident", action="store_true", help="do exact steps in memory")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    bench, rows = Frontier(args), []
    chosen = half_price(bench, args.steps, args.seeds[0]) if args.half_price else ways(args.steps, args.seeds)
    for label, job in chosen:
        result = bench.run(job)
        cost = bench.cost(job, result["seconds"])
        rows.append({"label": label, "name": job.name, "job": asdict(job), **result, "cost": asdict(cost)})
        print(json.dumps({**rows[-1], "job": job.seed}), flush=True)
        add_kept_gain(rows)
        options = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
        args.json.write_text(json.dumps({"options": options, "tokens": bench.tokens, "rows": rows}, indent=2) + "\n")
        if any(row["label"] == "LoRA on the full model" for row in rows):
            args.json.with_suffix(".md").write_text(markdown(rows))
            plot(rows, args.json.with_suffix(".png"))
    print(markdown(rows))


if __name__ == "__main__":
    main()
