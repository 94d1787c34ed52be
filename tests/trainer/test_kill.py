"""After SIGKILL at any point of a save, or a full disk, what is in place is whole, and the same command resumes.

`LORAM_KILL_EVERY=1 pytest tests/test_kill.py` kills at every single point; by default at every 13th.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EVERY = int(os.environ.get("LORAM_KILL_EVERY", "13"))
# The script imports once and forks for each training. A point is just before one of the calls that make, rename or
# delete files.
SCRIPT = """
import itertools, json, os, pathlib, shutil, signal, sys
import safetensors.torch, torch
import loram, loram.training.train
from loram.disk import artifacts
from loram.disk import adapter
import peft, trl, transformers.models.mistral.modeling_mistral

model, rows, root, every = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4])
OPTIONS = {"max_steps": 2, "save_steps": 1, "learning_rate": 5e-3}

def train(out, kill_at=None):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        count = itertools.count()
        def deadly(function):
            def call(*args, **options):
                if next(count) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)
            return call
        for place, name in ((artifacts, "sync"), (artifacts, "file_sha256"), (pathlib.Path, "rename"), (torch, "save"),
                            (pathlib.Path, "write_text"), (shutil, "rmtree"), (adapter, "save_file")):
            setattr(place, name, deadly(getattr(place, name)))
        loram.train(model, out, data=rows, trainer=OPTIONS, lora={"r": 2})
        (root / "points").open("w").write(str(next(count)))
        code = 0
    finally:
        os._exit(code)

def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

assert train(root / "whole") == 0
expected, points = contents(root / "whole"), int((root / "points").read_text())
problems, stages = [], set()
for point in range(0, points, every):
    out = root / f"out{point}"
    code = train(out, kill_at=point)
    if code != -signal.SIGKILL:
        problems.append(f"point {point}: exit code {code}")
    if out.exists() and contents(out) != expected:
        problems.append(f"point {point}: the output is there and not whole")
    for checkpoint in root.glob(f"out{point}-checkpoints/checkpoint-*"):
        artifacts.verify(checkpoint)
        stages.add(checkpoint.name)
    stages.add("output" if out.exists() else "no output")
    if not out.exists():
        if (code := train(out)) != 0:
            problems.append(f"point {point}: going on failed with {code}")
        elif contents(out) != expected:
            problems.append(f"point {point}: other bytes after going on")
        elif left := [path.name for path in root.glob(f"*out{point}*") if path != out]:
            problems.append(f"point {point}: left behind {left}")
print()
print(json.dumps({"points": points, "problems": problems, "stages": sorted(stages)}))
"""


def run_script(script: str, *arguments: Any) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kill_at_any_point_of_a_save_loses_nothing(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    found = run_script(SCRIPT, pruned_models["mistral"], rows_file, tmp_path, EVERY)
    assert found["points"] > 50
    assert found["problems"] == []
    assert {"no output", "checkpoint-1", "checkpoint-2"} <= set(found["stages"])


FULL_DISK = """
import json, os, pathlib, resource, sys, time
import loram
from loram.disk import artifacts
from loram.trainer import checkpoints
from loram import cli
from transformers import TrainerCallback

model, rows, root = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
adopt, (_, most) = checkpoints.Checkpoints.adopt, resource.getrlimit(resource.RLIMIT_FSIZE)
def then_the_disk_is_full(self, step):
    adopt(self, step)
    if step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))
def train(out):
    trainer = ["--trainer", "save_steps=1", "--trainer", "logging_steps=1"]
    return cli._main(["train", model, str(root / out), "--dataset", rows, "--max-steps", "4", *trainer])
checkpoints.Checkpoints.adopt = then_the_disk_is_full
code = train("out")
for path in root.glob("out-checkpoints/checkpoint-*"):
    artifacts.verify(path)
left = sorted(str(path.relative_to(root)) for path in [*root.glob("*"), *root.glob("out-checkpoints/*")])

def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
checkpoints.Checkpoints.adopt, now = adopt, time.time
year = 365 * 24 * 3600
time.time = lambda: now() - year  # the clock was put back, and what is older looks newer
for step in (1, 2):
    os.utime(root / f"out-checkpoints/checkpoint-{step}", (now() - step * year, now() - step * year))
codes = [code, train("out"), train("undisturbed")]
same = contents(root / "out") == contents(root / "undisturbed")
steps = [json.loads(line).get("step") for line in (root / "out" / "training_log.jsonl").read_text().splitlines()]
print()
print(json.dumps({"codes": codes, "left": left, "same": same, "steps": steps}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """With room again, and another clock, the same command ends with an undisturbed training's bytes and log."""
    found = run_script(FULL_DISK, pruned_models["mistral"], rows_file, tmp_path)
    assert found["codes"] == [1, 0, 0]
    assert found["left"] == ["out-checkpoints", "out-checkpoints/checkpoint-1", "out-checkpoints/checkpoint-2"]
    assert found["same"]
    assert [step for step in found["steps"] if step] == [1, 2, 3, 4]
