"""How close are the predictions of `loram estimate` to the memory that a training takes?

Each configuration trains a few steps on rows of exactly `max_length` tokens, in a process of its own. The measured peak
is, on a CPU, the growth of the process's resident memory from just before the model is loaded, and on a GPU the maximum
that torch allocated there.

    python benchmarks/planner.py --model models/SmolLM2-135M-Instruct --dataset long_text.txt --output-dir runs/planner

The script prints a table and writes planner.json beside itself. A second call only does what is missing there.
"""

import argparse
import gc
import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 2  # the second step begins with the optimiser's state in memory
RESULTS = Path(__file__).with_suffix(".json")
LM_HEAD = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
# name -> options of `loram.estimate`. With checkpointing or 4 bits a CPU training returns freed memory to the system.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "full, checkpointing": {"per_device_train_batch_size": 4, "max_length": 512, "gradient_checkpointing": True},
    "0.5, checkpointing, r 64, lm_head": {
        "ratio": 0.5,
        "per_device_train_batch_size": 4,
        "max_length": 512,
        "gradient_checkpointing": True,
        "lora_r": 64,
        "lora_target_modules": LM_HEAD,
    },
    "0.65, checkpointing": {
        "ratio": 0.65,
        "per_device_train_batch_size": 4,
        "max_length": 512,
        "gradient_checkpointing": True,
    },
    "full, 4 bits": {"per_device_train_batch_size": 2, "max_length": 512, "load_in_4bit": True},
    "0.5, 4 bits, long row": {
        "ratio": 0.5,
        "per_device_train_batch_size": 1,
        "max_length": 1536,
        "load_in_4bit": True,
    },
    "0.65, 4 bits": {"ratio": 0.65, "per_device_train_batch_size": 2, "max_length": 512, "load_in_4bit": True},
    "0.65, 4 bits, r 64, 8-bit AdamW": {
        "ratio": 0.65,
        "per_device_train_batch_size": 2,
        "max_length": 512,
        "load_in_4bit": True,
        "lora_r": 64,
        "optim": "adamw_8bit",
    },
    "0.65, 4 bits, checkpointing": {
        "ratio": 0.65,
        "per_device_train_batch_size": 6,
        "max_length": 512,
        "load_in_4bit": True,
        "gradient_checkpointing": True,
    },
    "full": {"per_device_train_batch_size": 2, "max_length": 512},
    "0.65": {"ratio": 0.65, "per_device_train_batch_size": 2, "max_length": 512},
}


def stage_options(options: dict[str, Any]) -> dict[str, Any]:
    """Translate options of `loram.estimate` into options of `loram.train`."""
    lora = {"lora_r": "r", "lora_target_modules": "target_modules"}
    ours = ("load_in_4bit", "offload_embedding", "lora_dtype")
    trainer = {key: value for key, value in options.items() if key not in (*lora, *ours, "ratio", "device")}
    return {
        "lora": {name: options[key] for key, name in lora.items() if key in options},
        "trainer": {"max_steps": STEPS, "save_strategy": "no", **trainer},
        **{key: options[key] for key in ours if key in options},
    }


def measure(model: str, dataset: str, out: str, options: dict[str, Any]) -> dict[str, float]:
    """Train in this process; returns the peak in bytes since just before the model was loaded, and the seconds."""
    import torch

    for module in ("peft", "trl", "trl.trainer.sft_trainer", "bitsandbytes", "bitsandbytes.optim"):
        importlib.import_module(module)  # so that its memory does not count as the training's
    from loram.compute import device

    stage: Any = importlib.import_module("loram.training.train")
    fit, figures = stage._fit, {}

    def measured_fit(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        device.reset_peak_rss()
        before, started = device.rss(), time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        result = fit(*args, **kwargs)
        figures["seconds"] = time.perf_counter() - started
        figures["measured"] = device.peak_rss() - before
        if torch.cuda.is_available():
            figures["measured"] = torch.cuda.max_memory_allocated()
            figures["reserved"] = torch.cuda.max_memory_reserved()
        return result

    # A tiny training comes first, so that what the libraries load and set up on first use does not count.
    small = {**options, "max_length": 16, "per_device_train_batch_size": 1}
    for chosen in (small, options):
        shutil.rmtree(out, ignore_errors=True)
        stage.train(model, out, data=dataset, device=options["device"], **stage_options(chosen))
        stage._fit = measured_fit
    return figures


def predict(config: str, options: dict[str, Any]) -> dict[str, Any]:
    """Predict the peak with the planner, without the memory of CUDA itself, which torch does not count."""
    from loram.planner import estimate

    memory = estimate(config, **options).training
    return {"predicted": memory.total - memory.context, "moment": memory.moment}


def measure_in_process(args: argparse.Namespace, model: str, name: str, options: dict[str, Any]) -> dict[str, float]:
    """Call `measure` in a process of its own."""
    out = Path(args.output_dir) / f"adapter-{name.replace(', ', '-').replace(' ', '-')}"
    arguments = [model, args.dataset, str(out), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def prune(args: argparse.Namespace, ratio: float | None) -> str:
    """Prune the model unless that was done before; returns its folder, or the full model's if there is no ratio."""
    if ratio is None:
        return str(args.model)
    out = Path(args.output_dir) / f"pruned-{ratio}"
    if not out.exists():
        command = [sys.executable, "-m", "loram", "prune", args.model, str(out), "--ratio", str(ratio)]
        subprocess.run([*command, "--criterion", "magnitude"], check=True, stdout=subprocess.DEVNULL)
    return str(out)


def show(rows: dict[str, Any]) -> None:
    print(f"{'configuration':<42}{'predicted':>12}{'measured':>12}{'error':>9}{'seconds':>9}")
    for name, row in rows.items():
        error = 100 * (row["predicted"] / row["measured"] - 1)
        print(
            f"{name:<42}{row['predicted'] / 1e6:>9,.0f} MB{row['measured'] / 1e6:>9,.0f} MB{error:>+8.1f}%"
            f"{row['seconds']:>9.0f}"
        )


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        model, dataset, out, chosen_options = sys.argv[2:]
        print(json.dumps(measure(model, dataset, out, json.loads(chosen_options))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of the full model")
    parser.add_argument("--dataset", required=True, help="a .txt file that is long enough for rows of full length")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", help="the names of the configurations to run (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
    rows = results.setdefault(args.device, {})
    for name, chosen in CONFIGURATIONS.items():
        if args.only and name not in args.only:
            continue
        options = {**chosen, "device": args.device}
        if name not in rows:
            rows[name] = measure_in_process(args, prune(args, chosen.get("ratio")), name, options)
        rows[name] |= predict(args.model, options)
        args.results.write_text(json.dumps(results, indent=2) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
