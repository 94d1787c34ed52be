"""What does a refit add to the scoring pass over the same text?

The script prunes a model by half with each criterion, on rows that are both scored on and fitted to, and adds up the
CPU seconds of three parts within one run: the products that the refit gathers, the least squares that it solves, and
everything else, which is what pruning takes without a refit. One thread computes, so that a busy machine changes the
figures little and their ratio less.

    python benchmarks/refit.py --model models/SmolLM2-135M-Instruct --dataset data/word_problems/train.jsonl

It prints a table and writes refit.json beside itself.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return a function that also notes the CPU seconds of each of its calls."""

    def call(*args: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args, **options)
        finally:
            seconds.append(time.process_time() - started)

    return call


def measure(model: str, dataset: str, criterion: str, rank: int, rows: int) -> dict[str, Any]:
    """Prune a model by half, and return the CPU seconds of each part."""
    import loram
    from loram.pruning import refit

    gathering: list[float] = []
    adding: list[float] = []  # the held-out rows, which `refit` adds
    fitting: list[float] = []
    with (
        mock.patch.object(refit.Products, "add_", timed(refit.Products.add_, gathering)),
        mock.patch.object(refit.Products, "add_held_", timed(refit.Products.add_held_, adding)),
        mock.patch.object(refit, "refit", timed(refit.refit, fitting)),
        tempfile.TemporaryDirectory() as folder,
    ):
        started = time.process_time()
        loram.prune(
            model,
            Path(folder) / "pruned",
            ratio=0.5,
            criterion=criterion,
            calibration=dataset,
            calibration_samples=rows,
            refit_samples=rows,
            bypass_rank=rank,
            device="cpu",
        )
        total = time.process_time() - started
    products, solutions = sum(gathering) + sum(adding), sum(fitting) - sum(adding)
    rest = total - products - solutions
    return {
        "criterion": criterion,
        "bypass_rank": rank,
        "rows": rows,
        "everything_else": rest,
        "products": products,
        "solutions": solutions,
        "added": (products + solutions) / rest,
    }


def main() -> None:
    """Measure, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--criteria", nargs="*", default=["taylor", "flap"])
    parser.add_argument("--bypass-rank", type=int, default=32)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    results = []
    print(f"{'CPU seconds':12}{'everything else':>18}{'products':>12}{'solutions':>12}{'added':>9}")
    for criterion in args.criteria:
        result = measure(args.model, args.dataset, criterion, args.bypass_rank, args.rows)
        results.append(result)
        parts = f"{result['everything_else']:>18.1f}{result['products']:>12.1f}{result['solutions']:>12.1f}"
        print(f"{criterion:12}{parts}{result['added']:>9.0%}", flush=True)
    args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
