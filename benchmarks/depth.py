"""What is a model worth that has lost whole layers, compared with one that has lost as much width?

Three pruned models have about as many parameters. One has lost whole layers. One is narrowed by Taylor in all layers
but the first 4 and the last 2, at the ratio (in steps of 0.01) whose number of parameters is nearest. One has lost half
as many layers, and width for the rest. Each is judged by its own perplexity of WikiText-2 test text, without training.

    python benchmarks/depth.py --model models/SmolLM2-135M-Instruct --text DIR/wikitext2_test.txt

It prints a table and writes depth.json beside itself. It takes some minutes on a CPU.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import loram

RESULTS = Path(__file__).with_suffix(".json")
LENGTH = 256


def nearest_ratio(model: Path, parameters: int, drop: int = 0) -> float:
    """Return the ratio with which a model has nearly so many parameters, if some layers are dropped besides."""
    ratios = [step / 100 for step in range(1, 100)]

    def distance(ratio: float) -> int:
        return abs(loram.estimate(model, ratio=ratio, drop_layers=drop).pruned_parameters - parameters)

    return min(ratios, key=distance)


def measure(model: Path, text: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Prune a model, and return what is left of it and how well that predicts."""
    folder = Path(tempfile.mkdtemp()) / "pruned"
    plan = loram.prune(model, folder, refit=False, **options)
    result = loram.evaluate(folder, data=text)
    shutil.rmtree(folder.parent)
    return {
        **options,
        "dropped": list(plan.dropped),
        "parameters": plan.parameters()[1],
        "perplexity": result.perplexity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--pieces", type=int, default=16, help=f"pieces of {LENGTH} tokens to judge by")
    parser.add_argument("--drop", type=int, nargs="+", default=[8], help="numbers of layers to drop")
    args = parser.parse_args()
    text = {"path": str(args.text), "max_samples": args.pieces, "max_length": LENGTH}
    whole = loram.evaluate(args.model, data=text)
    rows: dict[str, dict[str, Any]] = {
        "full": {"parameters": loram.estimate(args.model).parameters, "perplexity": whole.perplexity}
    }
    for drop in args.drop:
        size = loram.estimate(args.model, drop_layers=drop).pruned_parameters
        width = {"ratio": nearest_ratio(args.model, size)}
        both = {"ratio": nearest_ratio(args.model, size, drop // 2), "drop_layers": drop // 2}
        for name, options in (("depth", {"drop_layers": drop}), ("width", width), ("both", both)):
            rows[f"{drop} layers, {name}"] = measure(args.model, text, options)
            print(f"{drop} layers, {name}: {rows[f'{drop} layers, {name}']}", flush=True)
            RESULTS.write_text(json.dumps({"pieces": args.pieces, "length": LENGTH, "rows": rows}, indent=2) + "\n")
    for name, row in rows.items():
        print(f"{name:<20}{row['parameters']:>14,}{row['perplexity']:>12.2f}  {row.get('dropped', '')}")


if __name__ == "__main__":
    main()
