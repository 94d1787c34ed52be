"""What does it cost a mixture of experts to lose experts, and does an adapter that was trained without them fit it?

The mixture is made of SmolLM2-135M-Instruct by mixture_model.py. It loses 25, 50 and 75% of its experts, by each
criterion, or as many parameters of the channels within its experts. Two things are judged, on GSM8K test answers and
on WikiText-2 test text: the pruned model itself, without training, and the whole mixture with the recovered adapter of
a training on the pruned model. The kept gain is (untuned - recovered) / (untuned - LoRA on the whole mixture), of the
losses of GSM8K answers.

    python benchmarks/mixture.py --model models/SmolLM2-135M-Instruct --data DIR --output-dir runs/mixture

DIR contains gsm8k_train.jsonl, gsm8k_test.jsonl, wikitext2_valid.txt and wikitext2_test.txt. The rows that make the
mixture are not those that train adapters. A second call only does what is missing, row by row, and writes mixture.json
and mixture.md (the tables) beside the script. It takes some hours on two busy CPU cores.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from mixture_model import LENGTH, Shape, make_mixture

import loram

RESULTS = Path(__file__).with_suffix(".json")
TASK, TEXT = "gsm8k", "wikitext2"
TASK_ROWS = "gsm8k_train.jsonl"
ADAPTER = "LoRA on "
RATIOS = (0.5, 0.75, 0.25)
SEED = 42
# Name of a way to prune -> (options besides the ratio, the option that has the ratio, seeds). `-task` reads rows of the
# task, the others read the built-in passages.
WAYS: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    "reap": ({"experts_criterion": "reap"}, "experts_ratio", (SEED,)),
    "frequency": ({"experts_criterion": "frequency"}, "experts_ratio", (SEED,)),
    "reap-task": ({"experts_criterion": "reap", "calibration": TASK_ROWS}, "experts_ratio", (SEED,)),
    "frequency-task": ({"experts_criterion": "frequency", "calibration": TASK_ROWS}, "experts_ratio", (SEED,)),
    "random": ({"experts_criterion": "random"}, "experts_ratio", (SEED, 43, 44)),
    "channels": ({}, "expert_channels_ratio", (SEED,)),
}
# The adapters that are trained, the most important ones first: (way, ratio, seed of pruning)
TRAINED = (
    *((way, 0.5, SEED) for way in ("reap", "random", "channels", "frequency")),
    *(("reap", ratio, SEED) for ratio in (0.75, 0.25)),
    *((way, 0.75, SEED) for way in ("channels", "random", "frequency")),
    *(("random", 0.5, seed) for seed in (43, 44)),
)


def row_name(way: str, ratio: float, seed: int) -> str:
    """Return the name of a pruned model."""
    return f"{way} {ratio}" + (f" seed {seed}" if len(WAYS[way][2]) > 1 else "")


class Bench:
    """Makes models and adapters in the output folder, each once, and collects the results in a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.output_dir)
        self.out.mkdir(parents=True, exist_ok=True)
        self.mixture, self.split = self.out / "mixture", self.out / "mixture-split"  # after and before distillation

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The results so far, read anew each time, because two processes may share the work."""
        rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
        return rows

    def data(self, name: str, **options: Any) -> dict[str, Any]:
        """Name a file in the folder of the data."""
        return {"path": str(self.args.data / name), **options}

    def row(self, name: str, measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Measure a row that is wanted, unless there is one, and write it."""
        if name in self.rows or not re.search(self.args.rows, name):
            return
        row = measure(*arguments)
        print(f"{name}: {row}", flush=True)
        options = {key: value for key, value in vars(self.args).items() if isinstance(value, int | float)}
        result = {"options": options, "rows": {**self.rows, name: row}}
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")

    def loss(self, model: Path, adapter: Path | None = None) -> float:
        """Return the loss of GSM8K test answers in nats per token."""
        data = self.data("gsm8k_test.jsonl", max_samples=self.args.samples)
        return loram.evaluate(model, adapter=adapter, data=data).loss

    def judge(self, model: Path) -> dict[str, float]:
        """Return the losses of a model in nats per token, of GSM8K test answers and of WikiText-2 test text."""
        text = self.data("wikitext2_test.txt", max_samples=self.args.pieces, max_length=LENGTH)
        return {TASK: self.loss(model), TEXT: loram.evaluate(model, data=text).loss}

    def pruned(self, way: str, ratio: float, seed: int) -> Path:
        """Prune the mixture, and return the folder."""
        folder = self.out / row_name(way, ratio, seed).replace(" ", "-")
        if not folder.exists():
            given, key, _ = WAYS[way]
            options: dict[str, Any] = {**given, key: ratio}
            if "calibration" in options:
                options["calibration"] = self.data(options["calibration"])
            loram.prune(self.mixture, folder, **options, seed=seed)
        return folder

    def measure_model(self, model: Path) -> dict[str, Any]:
        """Return what a model that is not pruned is worth."""
        return {"parameters": loram.estimate(model).parameters, **self.judge(model)}

    def measure_pruned(self, way: str, ratio: float, seed: int) -> dict[str, Any]:
        """Return what a pruned mixture is worth by itself."""
        folder = self.pruned(way, ratio, seed)
        sizes = loram.PruningPlan.load(folder).parameters()
        return {"parameters": sizes[1], **self.judge(folder)}

    def trained(self, model: Path) -> Path:
        """Train an adapter on a pruned mixture, or on the whole one, and return its folder."""
        folder = self.out / f"{model.name}-adapter"
        if not folder.exists():
            trainer = {
                "max_steps": self.args.steps,
                "per_device_train_batch_size": self.args.batch,
                "learning_rate": self.args.learning_rate,
                "max_length": LENGTH,
                "logging_steps": 5,
            }
            data = self.data(TASK_ROWS, max_samples=self.args.train_samples)
            loram.train(model, folder, data=data, lora={"lora_dropout": 0.0}, trainer=trainer, seed=SEED)
        return folder

    def measure_full(self) -> dict[str, Any]:
        """Return what an adapter is worth that was trained on the whole mixture."""
        return {TASK: self.loss(self.mixture, self.trained(self.mixture))}

    def measure_recovered(self, way: str, ratio: float, seed: int) -> dict[str, Any]:
        """Return what an adapter that was trained on a pruned mixture is worth on the whole one."""
        pruned = self.pruned(way, ratio, seed)
        recovered = self.out / f"{pruned.name}-recovered"
        if not recovered.exists():
            loram.recover(self.trained(pruned), recovered)
        return {TASK: self.loss(self.mixture, recovered)}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Format the results as two tables: the models by themselves, and the adapters on the whole mixture."""
    models = ["| model, untrained | parameters | GSM8K perplexity | WikiText-2 |", "|---|---|---|---|"]
    adapters = ["| adapter trained on | GSM8K perplexity | kept gain |", "|---|---|---|"]
    for name, row in sorted(rows.items()):
        task = f"{math.exp(row[TASK]):.3f}"
        if TEXT in row:
            models.append(f"| {name} | {row['parameters']:,} | {task} | {math.exp(row[TEXT]):.2f} |")
        else:
            adapters.append(f"| {name.removeprefix(ADAPTER)} | {task} | {100 * kept_gain(rows, name):.0f}% |")
    return "\n".join([*models, "", *adapters]) + "\n"


def kept_gain(rows: dict[str, dict[str, Any]], name: str) -> float:
    """Return the share of the gain of LoRA on the whole mixture that the adapter of a row has."""
    untuned, full = rows["mixture"][TASK], rows[f"{ADAPTER}mixture"][TASK]
    share: float = (untuned - rows[name][TASK]) / (untuned - full)
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/mixture"))
    parser.add_argument("--split-pieces", type=int, default=48, help=f"pieces of {LENGTH} tokens to split the MLPs by")
    parser.add_argument("--distill-steps", type=int, default=20, help="steps of two pieces to distil the mixture by")
    parser.add_argument("--distill-learning-rate", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=20, help="steps of an adapter's training")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--train-samples", type=int, default=512, help="how many GSM8K training rows to use")
    parser.add_argument("--samples", type=int, default=24, help="how many GSM8K test answers to score")
    parser.add_argument("--pieces", type=int, default=8, help=f"how many WikiText-2 pieces of {LENGTH} tokens to score")
    parser.add_argument("--rows", default="", help="measure only rows whose names match this expression")
    args = parser.parse_args()

    bench = Bench(args)
    if not bench.mixture.exists():
        options = args.split_pieces, args.distill_steps, args.distill_learning_rate
        make_mixture(args.model, args.data, bench.mixture, Shape(), *options)
    for name, model in (("dense", args.model), ("split", bench.split), ("mixture", bench.mixture)):
        bench.row(name, bench.measure_model, model)
    for ratio, (way, (_, _, seeds)) in product(RATIOS, WAYS.items()):
        for seed in seeds:
            bench.row(row_name(way, ratio, seed), bench.measure_pruned, way, ratio, seed)
    bench.row(f"{ADAPTER}mixture", bench.measure_full)
    for way, ratio, seed in TRAINED:
        bench.row(f"{ADAPTER}{row_name(way, ratio, seed)}", bench.measure_recovered, way, ratio, seed)
    table = markdown(bench.rows)
    RESULTS.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
