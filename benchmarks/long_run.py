"""Does a long training survive what happens to long trainings, and does its memory stay where it is?

The script trains an adapter once without interruption and notes the resident memory after each step. Then it trains it
once more and disturbs it again and again, each kind in turn, at steps spread evenly over the training:

    kill    SIGKILL
    stop    SIGTERM, which waits for the end of the step and its checkpoint
    disk    a full disk: from that step on the process may write no file beyond 2,000 bytes, so a checkpoint fails
    clock   SIGKILL; then the clock is a year ahead, or behind, and so are the times of change of all checkpoints

The same command is given again after each. At last every file of the two adapter folders is compared, and the log is
checked to have every step that it should have.

    python benchmarks/long_run.py --model models/SmolLM2-135M-Instruct --dataset data/word_problems/train.jsonl --tiny

With --tiny the model is a random one of two layers with the given model's tokenizer; without it, the given model pruned
by half. It prints a table and writes long_run.json beside itself.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

YEAR = 365 * 24 * 3600.0  # seconds
KINDS = ("kill", "stop", "disk", "clock")
CODES = {"kill": -signal.SIGKILL, "stop": 128 + signal.SIGTERM, "disk": 1, "clock": -signal.SIGKILL}


def make_tiny(folder: Path, model: Path) -> Path:
    """Write a random LLaMA of two layers with a model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(settings: dict[str, Any]) -> None:
    """Train in this process, which `run` starts, and print a line for each step: `step 50 123456789`."""
    from transformers import TrainerCallback

    import loram
    from loram.compute.device import rss

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            print(f"step {state.global_step} {rss()}", flush=True)

    now = time.time

    def changed_clock() -> float:
        return now() + float(settings["shift"])

    with mock.patch.object(time, "time", changed_clock):
        loram.train(
            settings["model"],
            settings["out"],
            data=settings["dataset"],
            trainer=settings["trainer"],
            callbacks=[Report()],
        )


def steps_of(process: "subprocess.Popen[str]", log: list[str]) -> Iterator[tuple[int, int]]:
    """Yield (step, resident bytes) as a training takes its steps; its other lines go to the log."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            _, step, size = line.split()
            yield int(step), int(size)
        else:
            log.append(line)


def disturb(kind: str, pid: int) -> None:
    """Do something to a training process."""
    if kind == "disk":
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (2000, 2000))
    else:
        os.kill(pid, signal.SIGTERM if kind == "stop" else signal.SIGKILL)


def run(settings: dict[str, Any], disturbances: list[tuple[int, str]]) -> dict[int, int]:
    """Train until the output is there, with one disturbance per process; returns the resident bytes by step.

    Raises:
        SystemExit: a process ended in another way than its disturbance says.
    """
    from loram.disk.artifacts import verify

    sizes: dict[int, int] = {}
    waiting, shift, out = list(disturbances), 0.0, Path(settings["out"])
    while not out.exists():
        at, kind = waiting.pop(0) if waiting else (None, "")
        command = [sys.executable, __file__, "--train", json.dumps({**settings, "shift": shift})]
        log: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for step, size in steps_of(process, log):
                sizes[step] = size
                if step == at:
                    disturb(kind, process.pid)
        if process.returncode != CODES.get(kind, 0):
            sys.exit(f"{kind or 'undisturbed'}: ended with {process.returncode}\n{''.join(log)}")
        checkpoints = list(out.parent.glob(f"{out.name}-checkpoints/checkpoint-*"))
        for checkpoint in checkpoints:
            verify(checkpoint)
        if kind == "clock":
            shift = -YEAR if shift > 0 else YEAR
            for path in [path for checkpoint in checkpoints for path in (checkpoint, *checkpoint.rglob("*"))]:
                changed = path.stat().st_mtime + shift
                os.utime(path, (changed, changed))
        if kind:
            print(f"step {at}: {kind}; checkpoints {sorted(path.name for path in checkpoints)}", file=sys.stderr)
    return sizes


def contents(folder: Path) -> dict[str, bytes]:
    """Read a folder: file name -> content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def median_size(sizes: dict[int, int], last: int) -> float:
    """Return the median of the resident bytes of ten steps up to a last one."""
    return statistics.median(sizes[step] for step in range(max(1, last - 9), last + 1))


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Train twice below a folder, and compare."""
    import loram

    model = root / "model"
    if args.tiny:
        make_tiny(model, args.model)
    else:
        loram.prune(args.model, model, ratio=0.5, criterion="magnitude")
    trainer = {
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "max_length": args.max_length,
        "learning_rate": 1e-3,
        "save_steps": args.save_steps,
        "logging_steps": args.logging_steps,
    }
    settings = {
        "model": str(model),
        "dataset": str(args.dataset.absolute()),
        "trainer": trainer,
    }
    # each halfway between two checkpoints, so that steps are lost
    gap = args.max_steps / (args.disturbances + 1)
    steps = [int(gap * (number + 1)) // args.save_steps * args.save_steps for number in range(args.disturbances)]
    disturbances = [(step + args.save_steps // 2, KINDS[number % len(KINDS)]) for number, step in enumerate(steps)]
    started = time.monotonic()
    sizes = run({**settings, "out": str(root / "undisturbed")}, [])
    undisturbed = time.monotonic() - started
    run({**settings, "out": str(root / "disturbed")}, disturbances)
    expected, actual = contents(root / "undisturbed"), contents(root / "disturbed")
    lines = [json.loads(line) for line in actual["training_log.jsonl"].decode().splitlines()]
    logged = [line["step"] for line in lines if "loss" in line]
    first, last = median_size(sizes, 50), median_size(sizes, args.max_steps)
    return {
        "model": "random, 2 layers" if args.tiny else f"{Path(args.model).name}, pruned by half",
        "steps": args.max_steps,
        "tokens_per_step": args.batch_size * args.max_length,
        "disturbances": [f"step {step}: {kind}" for step, kind in disturbances],
        "undisturbed_seconds": undisturbed,
        "disturbed_seconds": time.monotonic() - started - undisturbed,
        "rss_at_step_50": first,
        "rss_at_the_end": last,
        "growth": last / first - 1,
        "files": len(expected),
        "differing_files": sorted(name for name in {**expected, **actual} if expected.get(name) != actual.get(name)),
        "log_is_whole": logged == list(range(args.logging_steps, args.max_steps + 1, args.logging_steps)),
        "left_beside_the_output": sorted(
            {path.name for path in root.iterdir()} - {"model", "undisturbed", "disturbed"}
        ),
    }


def main() -> None:
    """Measure, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--disturbances", type=int, default=12)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="long-run-") as folder:
        result = measure(args, Path(folder))
    for key, value in result.items():
        print(f"{key:24} {value}")
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(json.loads(sys.argv[2]))
    else:
        main()
