"""What do pruning, merging and recovering cost if the large model is streamed from disk?

The script makes a random bf16 LLaMA checkpoint on disk (13b is LLaMA-2-13B's shape, with 26 GB; the script needs twice
that space). Then it measures peak memory, bytes read and written, and seconds of these steps, each a command in a
process of its own: a plain copy of the files; `loram prune` by magnitude, at random and by Taylor importance (10 rows
of 128 tokens); `loram merge` of a random adapter; and `loram recover` of an adapter for LLaMA-2-70B's shape. Before
every step the files are dropped from the page cache.

    python benchmarks/streaming.py --shape 13b --output-dir runs/streaming

It prints a table and writes streaming.json beside itself. A second call only does what is missing there.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from random_models import LAYERS, SHAPES, config_of, make_model, plan_of


def make_adapter(folder: Path, shapes: dict[str, tuple[int, int]], base: str) -> None:
    """Write a random LoRA adapter (r 8) for linears of these shapes."""
    import torch
    from peft import LoraConfig

    from loram.disk.adapter import save_adapter
    from loram.model.families import LINEARS

    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEARS), task_type="CAUSAL_LM").to_dict()
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    values |= {"base_model_name_or_path": base, "peft_type": "LORA", "runtime_config": None}
    folder.mkdir(parents=True)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, columns) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 8) * 0.02
    save_adapter(folder, {key: value for key, value in values.items() if key != "runtime_config"}, tensors)


def make_70b_adapter(folder: Path) -> None:
    """Write a random adapter for LLaMA-2-70B's shape pruned at 0.85, with its plan; no weights are needed."""
    plan = plan_of(config_of("70b"), 0.85)
    shapes = plan.linear_shapes()
    shapes.pop("lm_head")
    make_adapter(folder, shapes, "pruned")
    plan.save(folder)


def measure_in_process(arguments: list[str]) -> dict[str, Any]:
    """Run a loram command in a process of its own; returns seconds, peak RSS and the bytes that it read and wrote."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return {"seconds": time.monotonic() - started, **json.loads(done.stdout.splitlines()[-1])}


def measure(arguments: list[str]) -> None:
    """Run a loram command in this process, which `measure_in_process` starts, and print the figures."""
    sys.argv[0] = "loram"
    from loram import cli

    code = cli._main(arguments)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    io = dict(line.split(": ", 1) for line in Path("/proc/self/io").read_text().splitlines())
    print()
    print(
        json.dumps(
            {
                "peak_rss": int(status["VmHWM"].split()[0]) * 1024,
                "bytes_read": int(io["rchar"]),
                "bytes_written": int(io["wchar"]),
            }
        )
    )
    sys.exit(code)


def drop_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(model: Path, out: Path) -> dict[str, Any]:
    """Copy the files of a model and sync them; returns the same figures as `measure_in_process`."""
    started = time.monotonic()
    shutil.copytree(model, out)
    for path in out.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    size = sum(path.stat().st_size for path in model.iterdir())
    return {"seconds": time.monotonic() - started, "peak_rss": None, "bytes_read": size, "bytes_written": size}


def time_compute(model: Path, pruned: Path, layers: int) -> dict[str, float]:
    """Measure the seconds of magnitude pruning that are not input or output: scoring, narrowing and SHA-256."""
    import torch

    from loram.disk.checkpoint import Checkpoint
    from loram.model.plan import PruningPlan
    from loram.model.resize import narrow
    from loram.pruning.criteria import ExpertRules
    from loram.pruning.score import _Tally

    checkpoint, plan = Checkpoint(model), PruningPlan.load(pruned)
    layer = min(plan.layers)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names() if f".layers.{layer}." in name}
    started = time.monotonic()
    _Tally(checkpoint, ["magnitude"], [layer], ExpertRules(), 0).finished(layer, tensors)
    for name, tensor in tensors.items():
        narrow(name, tensor, plan)
    scoring = (time.monotonic() - started) * layers
    block = bytes(1 << 28)
    started = time.monotonic()
    hashlib.sha256(block)
    rate = len(block) / (time.monotonic() - started)
    size = sum(path.stat().st_size for path in pruned.glob("*.safetensors"))
    return {"threads": torch.get_num_threads(), "scoring": scoring, "sha256": size / rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="13b")
    parser.add_argument("--ratio", type=float, default=0.65)
    parser.add_argument("--criteria", nargs="*", default=["magnitude", "random", "taylor"])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/streaming"))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(json.loads(args.measure))
        return

    from loram.disk.checkpoint import Checkpoint
    from loram.model.geometry import Geometry
    from loram.planner import estimate

    config = config_of(args.shape)
    root = args.output_dir / args.shape
    model, adapter = root / "model", root / "adapter"
    if not model.exists():
        make_model(model, config)
    counted = estimate(config, ratio=args.ratio, refit=False)
    same = {"shape": args.shape, "ratio": args.ratio, "device": f"cpu, {os.cpu_count()} cores"}
    result: dict[str, Any] = {**same, "estimate": counted.model_dump(), "rows": {}}
    if args.json.exists() and same.items() <= (before := json.loads(args.json.read_text())).items():
        result["rows"] = before["rows"]
    rows = result["rows"]

    def step(name: str, source: Path, out: Path, arguments: list[str] | None) -> dict[str, Any] | None:
        """Do a step unless it was done before; returns its row if it is new."""
        if name in rows:
            return None
        shutil.rmtree(out, ignore_errors=True)
        drop_cache(source)
        row = copy(source, out) if arguments is None else measure_in_process(arguments)
        print(name, json.dumps(row), file=sys.stderr)
        return row

    def keep(name: str, row: dict[str, Any], out: Path) -> None:
        shutil.rmtree(out)
        rows[name] = row
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    if row := step("copy", model, root / "copy", None):
        keep("copy", row, root / "copy")
    for criterion in args.criteria:
        name, out = f"prune, {criterion}", root / "pruned"
        options = ["--ratio", str(args.ratio), "--criterion", criterion, "--no-refit", "--device", "cpu"]
        if row := step(name, model, out, ["prune", str(model), str(out), *options]):
            parameters = sum(math.prod(Checkpoint(out).shape(name)) for name in Checkpoint(out).names())
            assert parameters == counted.pruned_parameters, (parameters, counted)
            if criterion == "magnitude":
                row["compute"] = time_compute(model, out, counted.pruned_layers)
            keep(name, row, out)
    if not adapter.exists():
        shapes = Geometry.from_config(config).linear_shapes(LAYERS)
        shapes.pop("lm_head")
        make_adapter(adapter, shapes, str(model.absolute()))
    if row := step("merge", model, root / "merged", ["merge", str(model), str(adapter), str(root / "merged")]):
        keep("merge", row, root / "merged")
    trained, recovered = args.output_dir / "adapter-70b", args.output_dir / "recovered-70b"
    if not trained.exists():
        make_70b_adapter(trained)
    if row := step("recover, 70B shape", trained, recovered, ["recover", str(trained), str(recovered)]):
        keep("recover, 70B shape", row, recovered)

    print(f"{args.shape}, ratio {args.ratio}: {counted.parameters:,} -> {counted.pruned_parameters:,} parameters")
    print(f"{'':22}{'seconds':>9}{'peak RSS':>12}{'read':>12}{'written':>12}")
    for name, row in rows.items():
        peak = "" if row["peak_rss"] is None else f"{row['peak_rss'] / 2**30:.2f} GiB"
        sizes = "".join(f"{row[key] / 1e9:>9.2f} GB" for key in ("bytes_read", "bytes_written"))
        print(f"{name:22}{row['seconds']:>9.1f}{peak:>12}{sizes}")


if __name__ == "__main__":
    main()
