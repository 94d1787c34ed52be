"""Measure on a GPU, in one sitting of about twelve minutes, all that this project has no figure for.

    python benchmarks/gpu/run.py                          # everything, the most valuable steps first
    python benchmarks/gpu/run.py --only flows memory      # some groups of steps
    python benchmarks/gpu/run.py --device cpu --small     # a rehearsal, on any machine

`results.json` in the output folder is written after every step, and a step that has a result there does not run again:
so a sitting can go on where another one ended. What the steps print is in `log.txt`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the other benchmarks
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project

from cost import memory, planner, throughput, write_4bit, write_16bit
from flows import flows
from machine import clear, machine
from passes import anchored, streamed
from session import Session, Setting

GROUPS = ("machine", "flows", "memory", "throughput", "streamed", "planner", "more", "anchored")
# (shape, tokens per row) -> GiB that may be allocated, the CUDA context included
CAPS = {("70b", 512): 10, ("70b", 2048): 12, ("llama-3.1-70b", 512): 12, ("llama-3.1-70b", 2048): 12}
# name -> (pruned, in 4 bits, rows per step)
METHODS = {
    "LoRA": (False, False, 16),
    "LoRAM": (True, False, 16),
    "QLoRA": (False, True, 16),
    "QLoRAM": (True, True, 16),
    "LoRA, one row": (False, False, 1),
    "LoRAM, one row": (True, False, 1),
}


def measure_memory(session: Session, small: bool) -> None:
    """Train the 70B shapes under their caps; where a cap does not hold, find out why and how much they need."""
    for shape, ratio in (("nano", 0.5),) if small else (("70b", 0.85), ("llama-3.1-70b", 0.85)):
        if all(session.done(f"memory {shape} {tokens}") for tokens in (512, 2048)):
            continue
        session.run(f"write {shape}", write_4bit, limit=90, shape=shape, ratio=ratio)
        if not session.done(f"write {shape}"):
            continue
        for tokens in (128,) if small else (512, 2048):
            name, cap = f"memory {shape} {tokens}", CAPS.get((shape, tokens))
            options: dict[str, Any] = {"shape": shape, "ratio": ratio, "tokens": tokens}
            session.run(name, memory, limit=75, cap=cap, **options)
            if not session.done(name) and not small:
                session.run(f"{name}, expandable", memory, limit=60, cap=cap, expandable=True, **options)
                session.run(f"{name}, no cap", memory, limit=60, **options)
        session.run(f"delete {shape}", clear, limit=30, folders=(f"{shape}-nf4",))
        session.results.pop(f"write {shape}", None)  # the files are gone


def measure_throughput(session: Session, small: bool) -> None:
    """Compare the methods on one shape."""
    names = [f"throughput {name}" for name in (*METHODS, "streamed")]
    if all(map(session.done, names)):
        return
    shape, ratio, tokens = ("nano", 0.5, 64) if small else ("7b", 0.65, 512)
    session.run("write 16 bits", write_16bit, limit=90, shape=shape, ratio=ratio)
    for name, (pruned, in_4bit, rows) in METHODS.items():
        session.run(
            f"throughput {name}",
            throughput,
            limit=60,
            shape=shape,
            ratio=ratio,
            rows=min(rows, 2) if small else rows,
            tokens=tokens,
            pruned=pruned,
            in_4bit=in_4bit,
        )
    session.run(
        "throughput streamed",
        throughput,
        limit=150,
        shape=shape,
        ratio=ratio,
        rows=2 if small else 16,
        tokens=tokens,
        pruned=False,
        in_4bit=False,
        steps=3,
        engine="streamed",
    )
    session.run("delete 16 bits", clear, limit=30, folders=(f"{shape}-full", f"{shape}-pruned"))
    session.results.pop("write 16 bits", None)  # the files are gone


def sit(session: Session, groups: list[str], small: bool) -> None:
    """Run the steps of some groups, the most valuable first."""
    rows, tokens = (2, 64) if small else (4, 512)
    for group in groups:
        match group:
            case "machine":
                session.run("machine", machine, limit=70)
            case "flows":
                session.run("flows llama", flows, limit=150, family="llama")
            case "memory":
                measure_memory(session, small)
            case "throughput":
                measure_throughput(session, small)
            case "streamed":
                session.run("streamed", streamed, limit=60, rows=4 * rows, tokens=tokens)
            case "planner":
                shape, ratios = ("nano", (None, 0.5)) if small else ("1b", (None, 0.5, 0.65))
                session.run("planner", planner, limit=110, shape=shape, ratios=ratios)
            case "more":
                session.run("more flows llama", flows, limit=200, family="llama", more=True)
                for family in ("qwen3_moe", "gemma2", "qwen3"):
                    session.run(f"flows {family}", flows, limit=100, family=family)
            case "anchored":
                session.run("anchored", anchored, limit=150, rows=rows, tokens=tokens)


def show(results: dict[str, Any]) -> None:
    """Print what matters most, and what failed."""
    for name, row in results.items():
        line = row.get("error") or row.get("skipped")
        if line is None and "tokens_per_second" in row:
            line = f"{row['tokens_per_second']:,.0f} tokens/s, {row['tflops']:.1f} TFLOP/s"
        elif line is None and "measured" in row:
            line = f"{row['measured']['total']:.2f} GiB, {row['predicted']['total']:.2f} predicted"
        elif line is None and "failed" in row:
            line = "all passed" if not row["failed"] else f"failed: {', '.join(row['failed'])}"
        print(f"{name:32} {row.get('wall', 0):6.1f} s  {line or ''}")
    rates = {name: results.get(f"throughput {name}", {}).get("tokens_per_second") for name in METHODS}
    for full, pruned in (("LoRA", "LoRAM"), ("QLoRA", "QLoRAM"), ("LoRA, one row", "LoRAM, one row")):
        if rates[full] and rates[pruned]:
            allowed, ratio = results[f"throughput {pruned}"]["times_fewer_flops"], rates[pruned] / rates[full]
            print(f"{pruned} is {ratio:.2f}x as fast as {full}: {ratio / allowed:.2f} of the {allowed:.2f}x of FLOPs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="take sizes that a CPU can do")
    parser.add_argument("--seconds", type=float, default=720, help="how long the sitting may take")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of steps, in order")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        setting = Setting(device=args.device, small=args.small, work=Path(work))
        session = Session(setting, args.output_dir, args.seconds)
        sit(session, args.only, args.small)
    show(session.results)
    print(json.dumps({"results": str(args.output_dir / "results.json")}))


if __name__ == "__main__":
    main()
