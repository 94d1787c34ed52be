"""Does an adapter trained on the pruned model improve the full one, and by how much of what LoRA on the full one does?

SmolLM2-135M-Instruct, structured Taylor pruning at 0.5, no alignment, 50 steps x 8 GSM8K problems; perplexity of 100
GSM8K test answers and of 40 x 256 tokens of WikiText-2 test text. About half an hour a seed on two CPU cores.

    python benchmarks/recovered_gsm8k.py --model models/SmolLM2-135M-Instruct --data DIR --output-dir runs/gsm8k

DIR holds gsm8k_train.jsonl, gsm8k_test.jsonl (question / answer rows) and wikitext2_test.txt. Writes
recovered_gsm8k.json beside this script. A second call does only what is missing.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from loram.run.pipeline import run
from loram.run.recipe import Recipe
from loram.run.report import RunReport, table


def recipe(model: Path, data: Path, out: Path, seed: int, ratio: float, steps: int, samples: int) -> Recipe:
    """The recipe of one seed."""
    return Recipe.model_validate(
        {
            "model_name_or_path": str(model),
            "output_dir": out / f"seed-{seed}",
            "seed": seed,
            "dataset": str(data / "gsm8k_train.jsonl"),
            "eval_dataset": {
                "gsm8k": {"path": str(data / "gsm8k_test.jsonl"), "max_samples": samples},
                "wikitext2": {"path": str(data / "wikitext2_test.txt"), "max_samples": 40, "max_length": 256},
            },
            "prune": {"ratio": ratio},
            "train": {
                "anchor_steps": 0,
                "trainer": {
                    "max_steps": steps,
                    "per_device_train_batch_size": 8,
                    "learning_rate": 1e-3,
                    "logging_steps": 5,
                },
            },
            "evaluate": {"full_lora": True},
        }
    )


def mean_and_spread(reports: dict[int, RunReport]) -> Table:
    """Mean over seeds of each row's perplexities, with the least and the greatest where there are several."""
    first = next(iter(reports.values()))
    result = Table(title=f"mean of {len(reports)} seed(s), least and greatest in brackets")
    result.add_column("model")
    for name in first.rows[0].perplexity:
        result.add_column(f"perplexity {name}", justify="right")
    for row in first.rows:
        cells = []
        for name in row.perplexity:
            found = [report.row(row.name).perplexity[name] for report in reports.values()]
            cells.append(f"{sum(found) / len(found):.3f} [{min(found):.3f}, {max(found):.3f}]")
        result.add_row(row.name, *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()

    console = Console(width=120)
    reports = {}
    for seed in given.seeds:
        chosen = recipe(given.model, given.data, given.output_dir, seed, given.ratio, given.steps, given.samples)
        reports[seed] = run(chosen)
        console.print(f"seed {seed}, kept gain {reports[seed].kept_gain}")
        console.print(table(reports[seed]))
    console.print(mean_and_spread(reports))
    result = {
        "device": "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "runs": {str(seed): report.model_dump(mode="json") for seed, report in reports.items()},
    }
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
