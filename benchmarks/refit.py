"""What do the refit at pruning and its bypass do for the adapter that is recovered?

SmolLM2-135M-Instruct is pruned by Taylor importance, plainly, with a refit, and with a refit and a bypass. Adapters are
trained on each as in quality.py: 20 steps of 4 GSM8K training rows. The results are the perplexities of the full model
with the recovered adapter, those of the pruned model itself, and the CPU time and the peak memory of pruning. What
LoRA on the full model reaches, and the model without training, is in quality.json, and counts as 100% and 0%.

    python benchmarks/refit.py --model models/SmolLM2-135M-Instruct --data DIR --output-dir runs/refit

DIR is as for quality.py. Refits read the first rows of one of three texts: the ten built-in passages; `general`, which
is WikiText-2 validation text; or `mixed`, which is 20 pieces of that and 30 GSM8K training rows that no adapter is
trained on. The script writes refit.json beside itself after each row. A second call only does what is missing.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from quality import TASK, TEXT, Bench
from quality_jobs import Job
from rich.console import Console
from rich.table import Table

import loram
from loram.compute.loading import load_tokenizer
from loram.disk.checkpoint import Checkpoint

HERE = Path(__file__).parent
PIECES, ROWS, FIRST_ROW, LENGTH = 20, 30, 4000, 256
REFIT: dict[str, Any] = {"refit": True}
BYPASS: dict[str, Any] = {"refit": True, "bypass_rank": 32}
# ratio, text, options
VARIANTS: list[tuple[float, str, dict[str, Any]]] = [
    (0.5, "mixed", BYPASS),
    (0.5, "mixed", REFIT),
    (0.5, "mixed", {}),
    (0.75, "mixed", BYPASS),
    (0.5, "general", BYPASS),
    (0.5, "built-in", {}),
    (0.75, "mixed", {}),
    (0.5, "built-in", BYPASS),
    (0.5, "mixed", {"refit": True, "bypass_rank": 128}),
]


def write_texts(model: Path, data: Path, out: Path) -> None:
    """Write the calibration texts, one piece or row per line."""
    tokenizer = load_tokenizer(Checkpoint(model))
    ids = tokenizer((data / "wikitext2_valid.txt").read_text())["input_ids"]
    starts = range(0, len(ids) - LENGTH, LENGTH)
    general = [tokenizer.decode(ids[start : start + LENGTH]) for start in islice(starts, PIECES + ROWS)]
    with (data / "gsm8k_train.jsonl").open() as file:
        rows = [json.loads(line) for line in islice(file, FIRST_ROW, FIRST_ROW + ROWS)]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
            tokenize=False,
        )
        for row in rows
    ]
    # two pieces, three rows, and so on, so that scoring, which reads the first ten, reads both kinds
    mixed = [text for n in range(PIECES // 2) for text in (*general[2 * n : 2 * n + 2], *chats[3 * n : 3 * n + 3])]
    for name, texts in (("general", general), ("mixed", mixed)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (out / f"{name}.jsonl").write_text("".join(lines))


class Refits(Bench):
    """Prunes in a process of its own, whose time and memory are measured."""

    def variant(self, ratio: float, text: str, options: dict[str, Any]) -> dict[str, Any]:
        """Compute a row."""
        name = f"p{ratio}-{text}" + ("-refit" if options else "") + f"-{options.get('bypass_rank', 0)}"
        pruned, job = self.out / name, Job(ratio=ratio, seed=42)
        cost_file = self.out / f"{name}.cost.json"
        if not cost_file.exists():
            cost_file.write_text(json.dumps(self.prune(pruned, ratio, text, options)))
        adapter = self.make(f"{name}-adapter", lambda out: self.train(job, pruned, out))
        recovered = self.make(f"{name}-recovered", lambda out: loram.recover(adapter, out))
        plan = loram.PruningPlan.load(pruned)
        return {
            "ratio": ratio,
            "text": text,
            **options,
            "parameters": plan.parameters()[1],
            "prune": json.loads(cost_file.read_text()),
            "pruned": self.judge(pruned, None),
            "recovered": self.judge(self.args.model, recovered),
        }

    def prune(self, out: Path, ratio: float, text: str, options: dict[str, Any]) -> dict[str, float]:
        """Prune, and return the CPU seconds and the peak resident memory of that process, in bytes."""
        command = [sys.executable, "-m", "loram", "prune", str(self.args.model), str(out), "--ratio", str(ratio)]
        if text != "built-in":
            command += ["--calibration", str(self.out / f"{text}.jsonl"), "--calibration-length", str(LENGTH)]
        for key, value in options.items():
            command += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(process.returncode)
        return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_rss": usage.ru_maxrss * 1024}


def recorded() -> dict[str, dict[str, Any]]:
    """Return the rows of quality.json that gains are measured by."""
    rows = json.loads((HERE / "quality.json").read_text())["rows"]
    wanted = ("untuned", "LoRA on the full model")
    return {row["name"]: row for row in rows if row["name"] in wanted and row["job"]["seed"] == 42}


def kept(row: dict[str, Any], references: dict[str, dict[str, Any]]) -> float:
    """Return the share of LoRA's gain that a recovered adapter keeps, as quality.py counts it."""
    untuned, full = (math.log(references[name][TASK]) for name in ("untuned", "LoRA on the full model"))
    return (untuned - math.log(row["recovered"][TASK])) / (untuned - full)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/refit"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--train-samples", type=int, default=512)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--pieces", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    bench, references, rows = Refits(args), recorded(), []
    write_texts(args.model, args.data, bench.out)
    for ratio, text, options in VARIANTS:
        row = bench.variant(ratio, text, options)
        rows.append({**row, "kept_gain": kept(row, references)})
        print(rows[-1], flush=True)
        args.json.write_text(json.dumps({"references": references, "rows": rows}, indent=2) + "\n")
    table = Table("ratio", "text", "refit", "pruned: task, general", "recovered: task, general", "kept")
    for row in rows:
        refit = f"rank {row.get('bypass_rank', 0)}" if row.get("refit") else "no"
        own, full = (f"{row[part][TASK]:.2f}, {row[part][TEXT]:.1f}" for part in ("pruned", "recovered"))
        table.add_row(str(row["ratio"]), row["text"], refit, own, full, f"{row['kept_gain']:.0%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
