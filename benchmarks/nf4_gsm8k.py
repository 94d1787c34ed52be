"""What does keeping the pruned model in 4 bits while training change, for the full model with the recovered adapter?

SmolLM2-135M-Instruct, structured Taylor pruning at 0.5, no alignment, the same rows, steps and seeds once with the
pruned weights in full precision and once in NF4 (`load_in_4bit`); perplexity of GSM8K test answers and of WikiText-2
test text. The recovered adapter is judged on the untouched full model in full precision both times. About half an hour
a seed on two CPU cores.

    python benchmarks/nf4_gsm8k.py --model models/SmolLM2-135M-Instruct --data DIR --output-dir runs/nf4

DIR holds gsm8k_train.jsonl, gsm8k_test.jsonl (question / answer rows) and wikitext2_test.txt. Writes nf4_gsm8k.json
beside this script. A second call does only what is missing.
"""

import argparse
import json
from pathlib import Path

import torch
from recovered_gsm8k import recipe
from rich.console import Console
from rich.table import Table

from loram.run.pipeline import run
from loram.run.report import RunReport


def compare(reports: dict[int, tuple[RunReport, RunReport]]) -> Table:
    """A line a seed: the recovered model's perplexities after training on full-precision and on 4-bit weights."""
    first = next(iter(reports.values()))[0]
    names = list(first.rows[0].perplexity)
    result = Table(title="full model + recovered adapter, trained on pruned weights in ...")
    result.add_column("seed")
    for name in names:
        for title in ("untuned", "32 bits", "NF4"):
            result.add_column(f"{name}: {title}", justify="right")
    for seed, (full, packed) in reports.items():
        cells = [
            f"{report.row(row).perplexity[name]:.3f}"
            for name in names
            for report, row in ((full, "base"), (full, "recovered"), (packed, "recovered"))
        ]
        result.add_row(str(seed), *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/nf4"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()

    reports = {}
    for seed in given.seeds:
        found = []
        for load_in_4bit in (False, True):
            out = given.output_dir / ("nf4" if load_in_4bit else "full")
            chosen = recipe(given.model, given.data, out, seed, given.ratio, given.steps, given.samples)
            trainer = {**chosen.train.trainer, "per_device_train_batch_size": given.batch}
            train = chosen.train.model_copy(update={"load_in_4bit": load_in_4bit, "trainer": trainer})
            evaluate = chosen.evaluate.model_copy(update={"full_lora": False})
            found.append(run(chosen.model_copy(update={"train": train, "evaluate": evaluate})))
        reports[seed] = (found[0], found[1])
    Console(width=120).print(compare(reports))
    result = {
        "device": "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "runs": {
            str(seed): {
                name: report.model_dump(mode="json") for name, report in zip(("full", "nf4"), pair, strict=True)
            }
            for seed, pair in reports.items()
        },
    }
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
