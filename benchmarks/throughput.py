"""How much faster is training on the pruned model than on the full one, and how close is that to the FLOPs' limit?

One run measures LoRA and QLoRA on a full model with random weights, and LoRAM and QLoRAM on its pruned model: tokens
per second, peak memory and bytes of weights. The limit of the speed-up over LoRA is the ratio of the FLOPs per token.

    python benchmarks/throughput.py                            # on a GPU; 7b takes 14 GB of disk and 13 GB of the card
    python benchmarks/throughput.py --shape 160m --device cpu  # on any machine

The script writes throughput.json beside itself if it runs on a GPU, or the file that --json names.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from measured_training import GIB, device_name, measure_in_process
from random_models import SHAPES, config_of, make_model
from rich.console import Console
from rich.table import Table

from loram.planner import estimate

# name -> (whether the model is pruned, whether it is in 4 bits)
METHODS = {"LoRA": (False, False), "QLoRA": (False, True), "LoRAM": (True, False), "QLoRAM": (True, True)}


def rows(
    shape: str, ratio: float, tokens: int, steps: int, rounds: int, device: str, root: Path
) -> list[dict[str, Any]]:
    """Measure one row per method. The methods take turns, and the fastest round counts: others use the machine."""
    config, folders = config_of(shape), {pruned: root / ("pruned" if pruned else "full") for pruned in (False, True)}
    for pruned, folder in folders.items():
        if not folder.exists():
            make_model(folder, config, ratio=ratio if pruned else None)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, (pruned, in_4bit) in METHODS.items():
            runs[name].append(
                measure_in_process(folders[pruned], tokens, steps=steps, device=device, load_in_4bit=in_4bit)
            )
    table_rows = []
    for name, (pruned, in_4bit) in METHODS.items():
        best = max(runs[name], key=lambda run: float(run["tokens_per_second"]))
        planned = estimate(config, ratio=ratio if pruned else None, load_in_4bit=in_4bit, device=device)
        spread = [run["tokens_per_second"] for run in runs[name]]
        flops = planned.arithmetic
        table_rows.append({"method": name, **best, "all_tokens_per_second": spread, "flop_ratio": flops.times_fewer})
    return table_rows


def show(results: list[dict[str, Any]], title: str) -> Table:
    """Format the rows as a table."""
    table = Table(title=title)
    for heading in ("method", "tokens/s", "over LoRA", "FLOPs allow", "share of that", "peak", "weights"):
        table.add_column(heading, justify="right")
    for row in results:
        speedup = row["tokens_per_second"] / results[0]["tokens_per_second"]
        table.add_row(
            row["method"],
            f"{row['tokens_per_second']:.1f}",
            f"{speedup:.2f}x",
            f"{row['flop_ratio']:.2f}x",
            f"{speedup / row['flop_ratio']:.2f}",
            f"{(row['peak'] + row['context']) / GIB:.2f} GiB",
            f"{row['weight_bytes'] / GIB:.2f} GiB",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--ratio", type=float, default=0.65)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    root = args.output_dir / args.shape
    results = rows(args.shape, args.ratio, args.tokens, args.steps, args.rounds, args.device, root)
    shutil.rmtree(root)
    device = device_name(args.device)
    title = f"{args.shape}, ratio {args.ratio}, rows of {args.tokens} tokens, {device}"
    Console(width=140).print(show(results, title))
    path = args.json or (Path(__file__).with_suffix(".json") if args.device == "cuda" else None)
    if path is not None:
        about = {"device": device, "shape": args.shape, "ratio": args.ratio, "tokens": args.tokens}
        path.write_text(json.dumps({**about, "rows": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
