"""Does training an adapter for a 70B model fit on a 12 GB card? A measured peak under a cap, beside the prediction.

Writes the pruned model (ratio 0.85) straight in NF4 with random weights, trains real steps on it with the device's
memory capped at the claim, and prints peak, speed and weight bytes. LLaMA-2-70B's shape takes 9 GB of disk; nothing of
138 GB is anywhere.

    python benchmarks/memory_70b.py                                   # a GPU; 70b and llama-3.1-70b
    python benchmarks/memory_70b.py --shape 160m --device cpu         # anywhere

Writes memory_70b.json beside this script when it ran on a GPU, and where --json says.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from measured_training import GIB, device_name, measured
from random_models import LAYERS, SHAPES, config_of, make_model
from rich.console import Console
from rich.table import Table

from loram.model.geometry import Geometry
from loram.planner import estimate

# (shape, tokens of a row) -> GiB that the device may give out, the CUDA context included
CLAIMS = {("70b", 512): 10, ("70b", 2048): 12, ("llama-3.1-70b", 512): 12, ("llama-3.1-70b", 2048): 12}


def row(folder: Path, shape: str, ratio: float, tokens: int, steps: int, device: str) -> dict[str, Any]:
    """One measurement with what was predicted of it."""
    config, claim = config_of(shape), CLAIMS.get((shape, tokens))
    cap = claim * GIB if claim is not None and device == "cuda" else None
    found = measured(folder, tokens, steps=steps, device=device, cap=cap, load_in_4bit=True)
    predicted = estimate(
        config, ratio=ratio, load_in_4bit=True, max_length=tokens, per_device_train_batch_size=1, device=device
    )
    base = 2 * sum(math.prod(shape) for shape in Geometry.from_config(config).tensor_shapes(LAYERS).values())
    return {
        "shape": shape,
        "ratio": ratio,
        "tokens": tokens,
        "claim_gib": claim,
        **found,
        "total_peak": found["peak"] + found["context"],
        "predicted": predicted.training.total,
        "base_bytes": base,
        "reduction": base / found["weight_bytes"],
    }


def show(rows: list[dict[str, Any]], device: str) -> Table:
    """The rows for people."""
    table = Table(title=f"training in NF4 on {device}, one row a step")
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
    for found in rows:
        claim = "" if found["claim_gib"] is None else f"{found['claim_gib']} GiB"
        sizes = [f"{found[key] / GIB:.2f} GiB" for key in ("total_peak", "predicted", "weight_bytes")]
        table.add_row(
            found["shape"],
            f"{found['tokens']:,}",
            claim,
            *sizes,
            f"1/{found['reduction']:.2f}",
            f"{found['tokens_per_second']:.1f}",
            f"{found['host_peak'] / GIB:.2f} GiB",
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
    given = parser.parse_args()

    rows = []
    for shape in given.shape:
        folder = given.output_dir / f"{shape}-nf4"
        if not folder.exists():
            make_model(folder, config_of(shape), ratio=given.ratio, in_4bit=True)
        rows += [row(folder, shape, given.ratio, tokens, given.steps, given.device) for tokens in given.tokens]
        shutil.rmtree(folder)
    device = device_name(given.device)
    Console(width=140).print(show(rows, device))
    path = given.json or (Path(__file__).with_suffix(".json") if given.device == "cuda" else None)
    if path is not None:
        path.write_text(json.dumps({"device": device, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
