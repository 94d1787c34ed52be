"""The jobs that each of two processes runs for test_shared.py, one after the other.

torchrun --nproc-per-node 2 tests/compute/shared.py DENSE EXPERTS ROWS TASK OUT
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import loram
from loram.base import processes
from loram.cli import _main as command

# name -> (which of the two models is pruned, how)
PRUNED = {
    "taylor": ("dense", "--ratio 0.5 --drop-layers 1 --bypass-rank 2 --refit-samples 20"),
    "flap": ("dense", "--ratio 0.5 --criterion flap --no-refit --bias-compensation"),
    "activation": ("dense", "--ratio 0.5 --criterion activation --no-refit"),
    "magnitude": ("dense", "--ratio 0.5 --criterion magnitude"),
    "sparsegpt": ("dense", "--ratio 0.5 --pattern unstructured"),
    "wanda": ("dense", "--pattern 4:8 --criterion wanda"),
    "random": ("dense", "--pattern 4:8 --criterion random"),
    "reap": ("experts", "--experts-ratio 0.5 --criterion wanda"),
}
LAYERS = ("--keep-first", "1", "--keep-last", "1")


@mock.patch.object(processes, "leave")  # a command does so at its end, and here are more of them
def work(dense: Path, experts: Path, rows: Path, task: Path, out: Path, _: mock.Mock) -> None:
    """Make each folder that the tests compare, and a file of the results."""
    models = {"dense": str(dense), "experts": str(experts)}
    text = ("--calibration", str(rows), "--calibration-samples", "9")
    for name, (model, how) in PRUNED.items():
        layers = () if "--pattern" in how else LAYERS
        assert command(["prune", models[model], str(out / name), *how.split(), *layers, *text]) == 0
    cache = ["--dataset", str(rows), "--part-tokens", "150", "--top-k", "4"]
    assert command(["teach", str(dense), str(out / "teacher"), *cache]) == 0
    results = {}
    for name, flags in {
        "resident": (),
        "streamed": ("--stream",),
        "one row": ("--max-samples", "1", "--stream"),
    }.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert command(["eval", str(dense), "--dataset", str(rows), "--json", *flags]) == 0
        assert bool(printed.getvalue()) == processes.first()
        results[name] = json.loads(printed.getvalue() or "{}")
    for name, stream in (("tasks", False), ("streamed tasks", True)):
        results[name] = loram.evaluate_tasks(dense, tasks=[str(task)], stream=stream).model_dump()
    if processes.first():
        (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
    processes.leave()
