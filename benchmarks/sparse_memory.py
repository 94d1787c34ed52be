"""How much memory does training on sparse weights save, if only the weights that stay are stored?

The script makes a LLaMA with random weights, prunes it at 4:8, and writes the pruned weights a second time as a plain
dense folder. Then it trains two steps on each folder, in 32 bits and in NF4, always in a process of its own. It
measures how much resident memory grows from just before the model is loaded to its peak, while loading and while
training, and shows the prediction of `loram estimate` beside the latter.

    python benchmarks/sparse_memory.py --output-dir runs/sparse

It prints a table and writes sparse_memory.json beside itself.
"""

import argparse
import gc
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from planner import stage_options
from random_models import SHAPES, config_of, make_model
from transformers import TrainerCallback

import loram
from loram.compute import device
from loram.disk.artifacts import publish
from loram.disk.checkpoint import Checkpoint
from loram.disk.writer import ShardedWriter
from loram.planner import estimate

RESULTS = Path(__file__).with_suffix(".json")
PATTERN = "4:8"
SHAPES["170m"] = (1024, 2816, 12, 16, 16, 8000)
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "per_device_train_batch_size": 1,
    "max_length": 128,
    "gradient_checkpointing": True,
}


class Peaks(TrainerCallback):
    """Measures the peak memory until the training begins, and from then on."""

    loading = training = 0

    def on_train_begin(self, *args: Any, **rest: Any) -> None:
        """Record the peak of loading the model."""
        gc.collect()
        self.loading = device.peak_rss()
        device.reset_peak_rss()

    def on_train_end(self, *args: Any, **rest: Any) -> None:
        """Record the peak of the training."""
        self.training = device.peak_rss()


def measure(model: str, dataset: str, options: dict[str, Any]) -> dict[str, int]:
    """Train in this process. A tiny training comes first, so that what libraries set up on first use is not counted."""
    for module in ("peft", "trl", "trl.trainer.sft_trainer", "bitsandbytes", "bitsandbytes.optim"):
        importlib.import_module(module)
    out = Path(model).with_name("adapter")
    for chosen in ({**options, "max_length": 16}, options):
        shutil.rmtree(out, ignore_errors=True)
        gc.collect()
        device.reset_peak_rss()
        before, peaks = device.rss(), Peaks()
        loram.train(model, out, data=dataset, device="cpu", callbacks=[peaks], **stage_options(chosen))
    return {"loading": peaks.loading - before, "measured": peaks.training - before}


def measure_in_process(folder: Path, dataset: Path, options: dict[str, Any]) -> dict[str, int]:
    """Call `measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder), str(dataset), json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_dense(sparse: Path, base: Path, out: Path) -> None:
    """Write the weights of a sparse folder as a plain dense folder of the full model's family."""
    checkpoint = Checkpoint(sparse)
    with publish(out, kind="base", made_from={}) as staging:
        for path in base.iterdir():
            if path.suffix not in (".safetensors",) and "manifest" not in path.name and "index" not in path.name:
                (staging / path.name).write_bytes(path.read_bytes())
        with ShardedWriter(staging, {name: checkpoint.spec(name) for name in checkpoint.names()}) as writer:
            for name in checkpoint.names():
                writer.copy(name, checkpoint)


def rows(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every combination of folder and precision."""
    root = Path(args.output_dir)
    base, sparse, dense = root / "base", root / "sparse", root / "dense"
    if not base.exists():
        make_model(base, config_of(args.shape))
    if not sparse.exists():
        loram.prune(base, sparse, pattern=PATTERN, criterion="magnitude")
    if not dense.exists():
        write_dense(sparse, base, dense)
    text = root / "text.txt"
    text.write_text("".join(chr(97 + number * number % 26) for number in range(2048)), encoding="utf-8")
    results = {}
    for in_4bit in (False, True):
        for folder in (dense, sparse):
            options = {**OPTIONS, "load_in_4bit": in_4bit}
            predicted = estimate(base, pattern=PATTERN if folder is sparse else "structured", **options)
            name = f"{folder.name}, {'NF4' if in_4bit else '32 bits'}"
            results[name] = {
                "stored_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
                "weight_bytes": predicted.weight_bytes,
                "predicted": predicted.training.total,
                **measure_in_process(folder, text, options),
            }
    return results


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        model, dataset, options = sys.argv[2:]
        print(json.dumps(measure(model, dataset, json.loads(options))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--shape", default="170m", choices=SHAPES)
    args = parser.parse_args()
    results = {"shape": args.shape, "pattern": PATTERN, **OPTIONS, "rows": rows(args)}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'weights':<18}{'on disk':>12}{'in memory':>12}{'predicted':>12}{'measured':>12}{'loading':>12}")
    for name, row in results["rows"].items():
        keys = ("stored_bytes", "weight_bytes", "predicted", "measured", "loading")
        print(f"{name:<18}" + "".join(f"{row[key] / 1e6:>9,.0f} MB" for key in keys))


if __name__ == "__main__":
    main()
