"""How do the training methods compare in quality, memory, time and number of trainable parameters?

All methods train SmolLM2-135M-Instruct with the same steps, rows and seed on GSM8K training rows. The quality is the
perplexity of GSM8K test answers under the full model with the result of the training. This script runs
loram/recipes/compare.yaml with other data. Each variant runs in a process of its own; its peak memory is the resident
memory of that process during the training, including all libraries.

    python benchmarks/methods.py --model models/SmolLM2-135M-Instruct --data DIR --output-dir runs/methods

DIR contains gsm8k_train.jsonl and gsm8k_test.jsonl. A second call only does what is missing. The script writes
methods.json, methods.md (the table) and methods.png beside itself.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch
from rich.console import Console

from loram.run.compare import PLOT_NAME, TABLE_NAME, compare, table
from loram.run.recipe import load_recipe

RECIPE = Path(__file__).parent.parent / "loram" / "recipes" / "compare.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    logging.basicConfig(format="%(message)s")
    logging.getLogger("loram").setLevel(logging.INFO)
    recipe = load_recipe(
        RECIPE,
        [
            f"model_name_or_path={args.model}",
            f"output_dir={args.output_dir}",
            f"dataset={{path: {args.data / 'gsm8k_train.jsonl'}, max_samples: 512}}",
            f"eval_dataset={{gsm8k: {{path: {args.data / 'gsm8k_test.jsonl'}, max_samples: {args.samples}}}}}",
            f"train.trainer.max_steps={args.steps}",
        ],
    )
    rows = compare(recipe)
    Console(width=140).print(table(rows))
    result = {
        "device": "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "steps": args.steps,
        "samples": args.samples,
        "seed": recipe.seed,
        "rows": [row.model_dump() for row in rows],
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(args.output_dir / TABLE_NAME, args.json.with_suffix(".md"))
    if (args.output_dir / PLOT_NAME).is_file():
        shutil.copyfile(args.output_dir / PLOT_NAME, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
