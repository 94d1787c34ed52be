"""What `loram estimate` predicts that a training takes, beside what it takes.

Trains a few steps on rows of exactly `max_length` tokens, each configuration in a process of its own, and compares the
peak with the prediction: on a CPU the growth of the process's resident memory from just before the model is loaded, on
a GPU what torch allocated there at most.

    python benchmarks/planner.py --model models/SmolLM2-135M-Instruct --dataset long_text.txt --output-dir runs/planner

Prints a table and writes planner.json beside this script. A second call does only what is missing there.
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

STEPS = 2  # the second has the optimiser's state from its beginning
RESULTS = Path(__file__).with_suffix(".json")
LM_HEAD = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
# name -> options of `loram.estimate`; with checkpointing or 4 bits a CPU hands freed memory back, else it does not
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
    """The same as options of `loram.train`."""
    lora = {"lora_r": "r", "lora_target_modules": "target_modules"}
    ours = ("load_in_4bit", "offload_embedding", "lora_dtype")
    trainer = {key: value for key, value in options.items() if key not in (*lora, *ours, "ratio", "device")}
    return {
        "lora": {name: options[key] for key, name in lora.items() if key in options},
        "trainer": {"max_steps": STEPS, "save_strategy": "no", **trainer},
        **{key: options[key] for key in ours if key in options},
    }


def measure(model: str, dataset: str, out: str, options: dict[str, Any]) -> dict[str, float]:
    """Train in this process; bytes at the peak since just before the model was loaded, and seconds."""
    import torch

    for module in ("peft", "trl", "trl.trainer.sft_trainer", "bitsandbytes", "bitsandbytes.optim"):
        importlib.import_module(module)  # its memory is not the training's
    from loram.compute import device

    stage: Any = importlib.import_module("loram.train")
    fit, found = stage._fit, {}

    def measured(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        device.reset_peak_rss()
        before, started = device.rss(), time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        result = fit(*args, **kwargs)
        found["seconds"] = time.perf_counter() - started
        found["measured"] = device.peak_rss() - before
        if torch.cuda.is_available():
            found["measured"] = torch.cuda.max_memory_allocated()
            found["reserved"] = torch.cuda.max_memory_reserved()
        return result

    # Once at hardly any size first: what the libraries load and set up when first used is not the training's.
    small = {**options, "max_length": 16, "per_device_train_batch_size": 1}
    for chosen in (small, options):
        shutil.rmtree(out, ignore_errors=True)
        stage.train(model, out, data=dataset, device=options["device"], **stage_options(chosen))
        stage._fit = measured
    return found


def predict(config: str, options: dict[str, Any]) -> dict[str, Any]:
    """The planner's answer, less CUDA's own memory, which torch does not count."""
    from loram.planner import estimate

    memory = estimate(config, **options).training
    return {"predicted": memory.total - memory.context, "moment": memory.moment}


def in_process(given: argparse.Namespace, model: str, name: str, options: dict[str, Any]) -> dict[str, float]:
    """`measure` in a process of its own."""
    out = Path(given.output_dir) / f"adapter-{name.replace(', ', '-').replace(' ', '-')}"
    arguments = [model, given.dataset, str(out), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def pruned(given: argparse.Namespace, ratio: float | None) -> str:
    """The model pruned at a ratio."""
    if ratio is None:
        return str(given.model)
    out = Path(given.output_dir) / f"pruned-{ratio}"
    if not out.exists():
        command = [sys.executable, "-m", "loram", "prune", given.model, str(out), "--ratio", str(ratio)]
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
    parser.add_argument("--model", required=True, help="folder of the full model")
    parser.add_argument("--dataset", required=True, help="a .txt file, long enough for rows of full length")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", help="names of configurations")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    results: dict[str, Any] = json.loads(given.results.read_text()) if given.results.exists() else {}
    rows = results.setdefault(given.device, {})
    for name, chosen in CONFIGURATIONS.items():
        if given.only and name not in given.only:
            continue
        options = {**chosen, "device": given.device}
        if name not in rows:
            rows[name] = in_process(given, pruned(given, chosen.get("ratio")), name, options)
        rows[name] |= predict(given.model, options)
        given.results.write_text(json.dumps(results, indent=2) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
