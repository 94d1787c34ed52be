"""How does it affect the recovered adapter if the pruned model is in 4 bits during the training?

SmolLM2-135M-Instruct is pruned at 0.5 by Taylor importance, without alignment. The adapter is trained with the same
rows, steps and seeds on pruned weights in full precision and in NF4 (`load_in_4bit`). Both recovered adapters are
evaluated on the original full model in full precision, by the perplexity of GSM8K test answers and of WikiText-2 test
text. On two CPU cores this takes about half an hour per seed.

    python benchmarks/nf4_gsm8k.py --model models/SmolLM2-135M-Instruct --data DIR --output-dir runs/nf4

DIR contains gsm8k_train.jsonl and gsm8k_test.jsonl (rows of question and answer) and wikitext2_test.txt. The script
writes nf4_gsm8k.json beside itself. A second call only does what is missing.
"""

import argparse
import json
from pathlib import Path

import torch
from recovered_gsm8k import recipe
from rich.console import Console
from rich.table import Table

from loram.run.pipeline import run
from loram.run.recipe import EvaluateSection
from loram.run.report import RunReport


def compare(reports: dict[int, tuple[RunReport, RunReport]]) -> Table:
    """Tabulate the full model's perplexities: untuned, and with adapters from full-precision and 4-bit weights."""
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
    args = parser.parse_args()

    reports = {}
    for seed in args.seeds:
        pair = []
        for load_in_4bit in (False, True):
            out = args.output_dir / ("nf4" if load_in_4bit else "full")
            chosen = recipe(args.model, args.data, out, seed, args.ratio, args.steps, args.samples)
            trainer = {**chosen.train.trainer, "per_device_train_batch_size": args.batch}
            train = chosen.train.model_copy(update={"load_in_4bit": load_in_4bit, "trainer": trainer})
            evaluate = EvaluateSection.of(chosen.evaluate, full_lora=False)
            pair.append(run(chosen.model_copy(update={"train": train, "evaluate": evaluate})))
        reports[seed] = (pair[0], pair[1])
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
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
