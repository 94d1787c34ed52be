"""Does training an adapter for a 70B model fit on a 12 GB card, and does the planner predict its peak memory?

The script writes the pruned model (ratio 0.85) with random weights directly in NF4. It trains some steps on it while
the device's memory is capped at the claim, and prints peak memory, speed and bytes of weights. LLaMA-2-70B's shape
takes 9 GB of disk; the full model's 138 GB are never written.

    python benchmarks/memory_70b.py                            # on a GPU; 70b and llama-3.1-70b
    python benchmarks/memory_70b.py --shape 160m --device cpu  # on any machine

The script writes memory_70b.json beside itself if it runs on a GPU, or the file that --json names.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from measured_training import GIB, device_name, measure_in_process
from random_models import LAYERS, SHAPES, config_of, make_model
from rich.console import Console
from rich.table import Table

from loram.model.geometry import Geometry
from loram.planner import estimate

# (shape, tokens per row) -> GiB that may be allocated on the device, including the CUDA context
CLAIMS = {("70b", 512): 10, ("70b", 2048): 12, ("llama-3.1-70b", 512): 12, ("llama-3.1-70b", 2048): 12}


def row(folder: Path, shape: str, ratio: float, tokens: int, steps: int, device: str) -> dict[str, Any]:
    """Measure one training and predict its memory."""
    config, claim = config_of(shape), CLAIMS.get((shape, tokens))
    cap = claim * GIB if claim is not None and device == "cuda" else None
    measured = measure_in_process(folder, tokens, steps=steps, device=device, cap=cap, load_in_4bit=True)
    predicted = estimate(
        config, ratio=ratio, load_in_4bit=True, max_length=tokens, per_device_train_batch_size=1, device=device
    )
    base = 2 * sum(math.prod(shape) for shape in Geometry.from_config(config).tensor_shapes(LAYERS).values())
    return {
        "shape": shape,
        "ratio": ratio,
        "tokens": tokens,
        "claim_gib": claim,
        **measured,
        "total_peak": measured["peak"] + measured["context"],
        "predicted": predicted.training.total,
        "base_bytes": base,
        "reduction": base / measured["weight_bytes"],
    }


def show(rows: list[dict[str, Any]], device: str) -> Table:
    """Format the rows as a table."""
    table = Table(title=f"training in NF4 on {device}, one row per step")
    for heading in (
        "shape",
        "tokens",
        "claim",
        "peak",
        "predicted",
        "weights",
        "of bf16 base",
        "tokens/s",
        "host peak",
    ):
        table.add_column(heading, justify="right")
    for result in rows:
        claim = "" if result["claim_gib"] is None else f"{result['claim_gib']} GiB"
        sizes = [f"{result[key] / GIB:.2f} GiB" for key in ("total_peak", "predicted", "weight_bytes")]
        table.add_row(
            result["shape"],
            f"{result['tokens']:,}",
            claim,
            *sizes,
            f"1/{result['reduction']:.2f}",
            f"{result['tokens_per_second']:.1f}",
            f"{result['host_peak'] / GIB:.2f} GiB",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["70b", "llama-3.1-70b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--ratio", type=float, default=0.85)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/memory"))
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    rows = []
    for shape in args.shape:
        folder = args.output_dir / f"{shape}-nf4"
        if not folder.exists():
            make_model(folder, config_of(shape), ratio=args.ratio, in_4bit=True)
        rows += [row(folder, shape, args.ratio, tokens, args.steps, args.device) for tokens in args.tokens]
        shutil.rmtree(folder)
    device = device_name(args.device)
    Console(width=140).print(show(rows, device))
    path = args.json or (Path(__file__).with_suffix(".json") if args.device == "cuda" else None)
    if path is not None:
        path.write_text(json.dumps({"device": device, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
