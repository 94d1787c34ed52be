"""Does a training that is killed again and again end with the same bytes as an undisturbed one?

The script prunes the model and trains the quickstart's adapter once without interruption. Then it trains the adapter
once more, sends SIGKILL after random times, and gives the same command again each time until it ends. Last it compares
every file of the two adapter folders.

    python benchmarks/kills.py --model models/SmolLM2-135M-Instruct --dataset data/word_problems/train.jsonl

It prints a table and writes kills.json beside itself.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Read a folder: file name -> content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main() -> None:
    """Measure, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--max-steps", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        root, loram = Path(folder), [sys.executable, "-m", "loram"]
        subprocess.run(
            [*loram, "prune", options.model, root / "pruned", "--ratio", "0.5", "--criterion", "magnitude"], check=True
        )
        train = [*loram, "train", root / "pruned", "--dataset", options.dataset, "--max-steps", str(options.max_steps)]
        train += ["--per-device-train-batch-size", str(options.batch_size), "--learning-rate", "1e-3"]
        train += ["--max-length", str(options.max_length), "--trainer", "save_steps=1", "--trainer", "logging_steps=5"]

        started = time.monotonic()
        with subprocess.Popen([*train, root / "undisturbed"], text=True) as process:
            while process.poll() is None and not (root / "undisturbed-checkpoints" / "checkpoint-1").exists():
                time.sleep(0.1)
            startup = time.monotonic() - started  # imports, tokenising, loading and the first step
        undisturbed = time.monotonic() - started
        if process.returncode:
            sys.exit("the undisturbed training failed")

        kills, started = 0, time.monotonic()
        while not (root / "killed").exists():
            with subprocess.Popen([*train, root / "killed"], stderr=subprocess.PIPE, text=True) as process:
                try:
                    # all kills together take about three quarters of the training's time, not counting the startups
                    room = 1.5 * (undisturbed - startup) / options.kills
                    wait = startup * chance.uniform(0.9, 1) + chance.uniform(0, room) if kills < options.kills else None
                    _, log = process.communicate(timeout=wait)
                    if process.returncode:
                        sys.exit(f"failed: {log}")
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
            print(f"{kills} kills, {len(list(root.glob('killed-checkpoints/checkpoint-*')))} checkpoints", flush=True)
        killed = time.monotonic() - started
        expected, actual = contents(root / "undisturbed"), contents(root / "killed")
        differing = sorted(name for name in {**expected, **actual} if expected.get(name) != actual.get(name))
        left = sorted(path.name for path in root.iterdir())
    result = {
        "steps": options.max_steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "kills": kills,
        "undisturbed_seconds": undisturbed,
        "killed_seconds": killed,
        "files": len(expected),
        "differing_files": differing,
        "left_beside_the_output": [name for name in left if name not in ("pruned", "undisturbed", "killed")],
    }
    for key, value in result.items():
        print(f"{key:24} {value}")
    (Path(__file__).parent / "kills.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
