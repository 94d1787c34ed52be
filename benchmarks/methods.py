"""Every method beside LoRAM's pruners: quality of the full model, memory, time, what trains, in one sitting.

SmolLM2-135M-Instruct, GSM8K training rows, the same steps, rows and seed for all; perplexity of GSM8K test answers of
the full model with what was trained. It is recipes/compare.yaml with other data. Each variant runs in a process of its
own; peak memory is that of the training, the process's resident memory with all libraries in it.

    python benchmarks/methods.py --model models/SmolLM2-135M-Instruct --data DIR --output-dir runs/methods

DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl. A second call does only what is missing. Writes methods.json,
methods.md (the table) and methods.png beside this script.
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

RECIPE = Path(__file__).parent.parent / "recipes" / "compare.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()

    logging.basicConfig(format="%(message)s")
    logging.getLogger("loram").setLevel(logging.INFO)
    recipe = load_recipe(
        RECIPE,
        [
            f"model_name_or_path={given.model}",
            f"output_dir={given.output_dir}",
            f"dataset={{path: {given.data / 'gsm8k_train.jsonl'}, max_samples: 512}}",
            f"eval_dataset={{gsm8k: {{path: {given.data / 'gsm8k_test.jsonl'}, max_samples: {given.samples}}}}}",
            f"train.trainer.max_steps={given.steps}",
        ],
    )
    rows = compare(recipe)
    Console(width=140).print(table(rows))
    result = {
        "device": "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "steps": given.steps,
        "samples": given.samples,
        "seed": recipe.seed,
        "rows": [row.model_dump() for row in rows],
    }
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(given.output_dir / TABLE_NAME, given.json.with_suffix(".md"))
    if (given.output_dir / PLOT_NAME).is_file():
        shutil.copyfile(given.output_dir / PLOT_NAME, given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
