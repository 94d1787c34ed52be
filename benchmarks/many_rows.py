"""How much memory and time do a million rows take?

The script writes synthetic rows of a prompt and a completion (JSON lines, 25 words) and a tiny random LLaMA with the
tokenizer of a real model, so that what is measured is the data and not the model. Then it trains for two steps, each
time in a process of its own: with an empty cache of tokens, with the cache that this left, and with streamed rows. Rows
are plain text, unless `--chats` writes them through the chat template, which takes longer.

    python benchmarks/many_rows.py --tokenizer models/SmolLM2-135M-Instruct --output-dir runs/many_rows

It prints a table and writes many_rows.json beside the rows.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORDS = (
    "one",
    "two",
    "three",
    "apples",
    "pears",
    "boys",
    "girls",
    "gives",
    "takes",
    "how",
    "many",
    "are",
    "left",
    "in",
)


def write_rows(path: Path, count: int) -> None:
    """Write synthetic rows; the same ones each time."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            prompt = " ".join(draw.choices(WORDS, k=16))
            row = {"prompt": f"{prompt} {number}?", "completion": " " + " ".join(draw.choices(WORDS, k=8))}
            handle.write(json.dumps(row) + "\n")


def make_model(folder: Path, tokenizer: str) -> None:
    """Write a tiny random model with a real tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoTokenizer.from_pretrained(tokenizer)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=len(read), num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    read.save_pretrained(folder)


def measured(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; return its wall-clock seconds, its processor's seconds and its peak resident memory in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, **environment})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    peak = used.ru_maxrss * 1024  # Linux counts KiB
    return {"seconds": time.monotonic() - started, "cpu": used.ru_utime + used.ru_stime, "peak_rss": peak}


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", required=True, help="a model folder or hub id")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--chats", action="store_true", help="write the rows through the chat template")
    arguments = parser.parse_args()
    out: Path = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)
    rows, model, cache = out / f"{arguments.rows}.jsonl", out / "model", out / "cache"
    if not rows.exists():
        write_rows(rows, arguments.rows)
    if not model.exists():
        make_model(model, arguments.tokenizer)
    shutil.rmtree(cache, ignore_errors=True)
    line = [sys.executable, "-m", "loram", "train", str(model), str(out / "adapter"), "--max-steps", "2"]
    line += ["--per-device-train-batch-size", "4", "--max-length", "128", "--device", "cpu", "--dataset", str(rows)]
    line += [] if arguments.chats else ["--no-apply-chat-template"]
    results = {}
    for name, more in {"empty cache": [], "from the cache": [], "streamed": ["--streaming"]}.items():
        shutil.rmtree(out / "adapter", ignore_errors=True)
        results[name] = measured([*line, *more], {"LORAM_CACHE": str(cache)})
        seconds, cpu, peak = results[name].values()
        print(f"{name}: {seconds:.0f} s, {cpu:.0f} s of processor time, peak RSS {peak / 1e9:.2f} GB", flush=True)
    sizes = {"text": rows.stat().st_size, "tokens": sum(file.stat().st_size for file in cache.rglob("*.arrow"))}
    print(f"{arguments.rows:,} rows: {sizes['text'] / 1e6:.0f} MB of text, {sizes['tokens'] / 1e6:.0f} MB of tokens")
    text = json.dumps({"rows": arguments.rows, **sizes, "trainings": results}, indent=2)
    (out / "many_rows.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
