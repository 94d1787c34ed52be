"""How much of the gain of LoRA on the full model does an adapter keep that was trained on the pruned model?

SmolLM2-135M-Instruct is trained on GSM8K training rows and aligned on WikiText-2 validation text. The results are
judged by the perplexity of GSM8K test answers and of WikiText-2 test text under the full model with the recovered
adapter, never by the pruned model. All rows of the table take the same steps, batch, rank and learning rate. The kept
gain, per seed, is (ln untuned - ln recovered) / (ln untuned - ln LoRA on the full model), of GSM8K perplexities.

    python benchmarks/quality.py --model models/SmolLM2-135M-Instruct --data DIR --output-dir runs/quality

DIR contains gsm8k_train.jsonl, gsm8k_test.jsonl, wikitext2_valid.txt and wikitext2_test.txt. `--grid full` is for a
GPU; the default grid takes some hours on two CPU cores. A second call only does what is missing, row by row. The script
writes quality.json, quality.md (the table) and quality.png beside itself.
"""

import argparse
import json
import math
import shutil
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quality_jobs import Job, jobs
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import loram
from loram.disk.artifacts import find_manifest
from loram.model.plan import PruningPlan
from loram.model.resize import narrow, widen

TASK, TEXT = "gsm8k", "wikitext2"
STAGES = ("prune", "align", "train", "recover", "polish")


class KeptOnly(TrainerCallback):
    """Keeps the factors of an adapter on the full model at zero wherever a plan prunes."""

    def __init__(self, plan: PruningPlan) -> None:
        self.plan = plan

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **rest: Any,
    ) -> None:
        """Mask the factors' first values and all their gradients."""
        assert model is not None
        for name, factor in model.named_parameters():
            if ".lora_" in name:
                plain = name.replace(".default", "")
                mask = widen(plain, torch.ones_like(narrow(plain, factor.data, self.plan)), self.plan)
                factor.data.mul_(mask)
                factor.register_hook(mask.mul)


class Bench:
    """Makes the folders that the rows need, each one once, and records the seconds that this took."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.output_dir)
        self.out.mkdir(parents=True, exist_ok=True)
        self.clock = self.out / "seconds.json"

    @property
    def seconds(self) -> dict[str, float]:
        """Name of a folder -> seconds. The file is read anew each time, because two processes may share the work."""
        seconds: dict[str, float] = json.loads(self.clock.read_text()) if self.clock.is_file() else {}
        return seconds

    def data(self, name: str, **options: Any) -> dict[str, Any]:
        """Name a file in the folder of the data."""
        return {"path": str(self.args.data / name), **options}

    def make(self, name: str, action: Callable[[Path], Any]) -> Path:
        """Make a folder by `action`, unless it exists."""
        folder = self.out / name
        if not folder.exists() or name not in self.seconds:
            shutil.rmtree(folder, ignore_errors=True)  # it is whole, but nobody knows how long it took
            started = time.monotonic()
            action(folder)
            seconds = {**self.seconds, name: time.monotonic() - started}
            self.clock.write_text(json.dumps(seconds, indent=2) + "\n")
        return folder

    def run(self, job: Job) -> dict[str, Any]:
        """Compute a row: its perplexities, and the seconds of its stages."""
        model, stages = self.args.model, {}
        adapter = None
        if job.base == "full":
            tag = f"lora-{job.tag}"
            adapter = self.make(tag, lambda out: self.train(job, model, out))
            stages["train"] = self.seconds[tag]
        if job.base == "kept":
            small = self.small(job)[0]
            plan = PruningPlan.load(small)
            tag = f"lora-kept-{small.name}-{job.tag}"
            adapter = self.make(tag, lambda out: self.train(job, model, out, callbacks=[KeptOnly(plan)]))
            stages["train"] = self.seconds[tag]
        if job.base == "pruned":
            small, stages = self.small(job)
            tag = f"{small.name}-adapter-{job.tag}"
            trained = self.make(tag, lambda out: self.train(job, small, out))
            stages["train"] = self.seconds[tag]
            if job.recovery == "none":
                return {**self.judge(small, trained), "seconds": stages}
            options: dict[str, Any] = {"correct": job.recovery == "corrected"}
            if job.recovery == "scaled":
                options["dev_data"] = self.data("gsm8k_train.jsonl", max_samples=self.args.dev_samples)
            polishing = job.recovery.startswith("polished")
            kind = "plain" if polishing else job.recovery
            adapter = recovered = self.make(f"{tag}-{kind}", lambda out: loram.recover(trained, out, **options))
            stages["recover"] = self.seconds[adapter.name]
            if polishing:
                name = f"{tag}-{job.recovery.replace(' ', '-')}"
                adapter = self.make(name, lambda out: self.polish(job, recovered, out))
                stages["polish"] = self.seconds[adapter.name]
        return {**self.judge(model, adapter), "seconds": stages}

    def small(self, job: Job) -> tuple[Path, dict[str, float]]:
        """Make the pruned, and perhaps aligned, model to train on; returns its folder and the seconds of its stages."""
        tag = f"p{job.ratio}-{job.criterion}" + "".join(f"-{key}-{value}" for key, value in sorted(job.prune.items()))
        tag += f"-s{job.seed}" if job.criterion == "random" else ""
        options = {"ratio": job.ratio, "criterion": job.criterion, "seed": job.seed, "refit": False, **job.prune}
        if "calibration" in options:
            options["calibration"] = self.data(options["calibration"])
        pruned = self.make(tag, lambda out: loram.prune(self.args.model, out, **options))
        if job.alignment == "none":
            return pruned, {"prune": self.seconds[tag]}
        objective, steps, *rate = job.alignment.split()
        trainer = {
            "max_steps": int(steps),
            "per_device_train_batch_size": self.args.batch,
            "max_length": 256,
            "learning_rate": float(rate[0]) if rate else self.args.align_learning_rate,
        }
        name = "-".join([tag, f"{objective}{steps}", *rate, f"s{job.seed}"])
        text = self.data("wikitext2_valid.txt", max_samples=self.args.batch * int(steps))
        aligned = self.make(
            name,
            lambda out: loram.align(
                pruned, out, data=text, objective=objective, probe=False, trainer=trainer, seed=job.seed
            ),
        )
        return aligned, {"prune": self.seconds[tag], "align": self.seconds[name]}

    def train(self, job: Job, model: Path, out: Path, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Train with the same options for every row, but for those of the job."""
        options = dict(job.train)
        lora = {"lora_dropout": 0.0, **options.pop("lora", {})}
        trainer = {
            "max_steps": job.steps or self.args.steps,
            "per_device_train_batch_size": self.args.batch,
            "learning_rate": self.args.learning_rate,
            "logging_steps": 5,
        }
        loram.train(
            model,
            out,
            data=self.data("gsm8k_train.jsonl", max_samples=self.args.train_samples),
            lora=lora,
            trainer=trainer,
            load_in_4bit=job.nf4,
            seed=job.seed,
            callbacks=callbacks,
            **options,
        )

    def polish(self, job: Job, adapter: Path, out: Path) -> None:
        """Polish an adapter by a few exact steps on the full model."""
        _, steps, rate = job.recovery.split()
        options = loram.PolishOptions(
            max_steps=int(steps), per_device_train_batch_size=self.args.batch, learning_rate=float(rate)
        )
        loram.polish(
            self.args.model,
            adapter,
            out,
            data=self.data("gsm8k_train.jsonl", max_samples=self.args.train_samples),
            options=options,
            seed=job.seed,
        )

    def judge(self, model: Path, adapter: Path | None) -> dict[str, float]:
        """Compute the perplexities of a model; adapters with the same content are evaluated once."""
        manifest = find_manifest(adapter) if adapter is not None else None
        key = f"{Path(model).name}-{'alone' if manifest is None else manifest.fingerprint[:16]}"
        path = self.out / f"judged-{key}.json"
        if not path.is_file():
            tests = {
                TASK: self.data("gsm8k_test.jsonl", max_samples=self.args.samples),
                TEXT: self.data("wikitext2_test.txt", max_samples=self.args.pieces, max_length=256),
            }
            perplexities = {
                name: loram.evaluate(model, adapter=adapter, data=spec).perplexity for name, spec in tests.items()
            }
            path.write_text(json.dumps(perplexities) + "\n")
        result: dict[str, float] = json.loads(path.read_text())
        return result


def add_kept_gain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the kept gain to rows, from the untuned model and LoRA on the full model with the same seed."""
    log = {(row["name"], row["job"]["seed"]): math.log(row[TASK]) for row in rows}
    for row in rows:
        seed = row["job"]["seed"]
        untuned, full = log.get(("untuned", seed)), log.get(("LoRA on the full model", seed))
        if untuned is not None and full is not None:
            row["kept_gain"] = (untuned - math.log(row[TASK])) / (untuned - full)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows by name, over the seeds; the best mean kept gain comes first."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    groups = {name: [row for row in rows if row["name"] == name] for name in names}
    return dict(sorted(groups.items(), key=lambda item: -_mean([row.get("kept_gain", 0.0) for row in item[1]])))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format the table: means over the seeds, and if there are several, the lowest and the highest in brackets."""
    lines = [
        "| | seeds | GSM8K perplexity | WikiText-2 | kept gain | seconds: prune, align, train, recover, polish |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in summary(rows).items():
        gain = [100 * row["kept_gain"] for row in runs if "kept_gain" in row]
        seconds = (_mean([row["seconds"].get(stage, 0.0) for row in runs]) for stage in STAGES)
        cells = [
            name,
            str(len(runs)),
            _spread([row[TASK] for row in runs], 3),
            _spread([row[TEXT] for row in runs], 2),
            _spread(gain, 0) + " %" if gain else "",
            ", ".join(f"{value:.0f}" for value in seconds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float], digits: int) -> str:
    text = f"{_mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the mean kept gain of each row as a bar, and each seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {
        name: [100 * row["kept_gain"] for row in runs if "kept_gain" in row]
        for name, runs in summary(rows).items()
        if name != "untuned"
    }
    figure, axes = pyplot.subplots(figsize=(12, 1 + 0.3 * len(groups)), layout="constrained")
    for place, (_, gains) in enumerate(groups.items()):
        axes.barh(place, _mean(gains), color="#9ecae1")
        axes.plot(gains, [place] * len(gains), "o", color="#08519c", markersize=4)
    axes.set_yticks(range(len(groups)), [textwrap.fill(name, 90) for name in groups], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("kept gain of the full model with the recovered adapter, % (one dot per seed)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quality"))
    parser.add_argument("--grid", choices=("small", "full"), default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--align-learning-rate", type=float, default=1e-4)
    parser.add_argument("--train-samples", type=int, default=512, help="how many GSM8K training rows to use")
    parser.add_argument("--samples", type=int, default=40, help="how many GSM8K test answers to score")
    parser.add_argument("--pieces", type=int, default=16, help="how many WikiText-2 test pieces of 256 tokens to score")
    parser.add_argument("--dev-samples", type=int, default=24, help="how many rows choose the multiplier")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    bench, rows = Bench(args), []
    for job in jobs(args.grid, args.seeds, args.steps):
        rows.append({"name": job.name, "job": asdict(job), **bench.run(job)})
        print(json.dumps({**rows[-1], "job": job.seed}), flush=True)
        write(args, add_kept_gain(rows))
    print(markdown(rows))


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the results so far: numbers, table and plot."""
    result = {
        "device": "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "options": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    args.json.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    plot(rows, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
