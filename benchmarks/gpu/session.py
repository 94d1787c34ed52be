"""Runs steps one after the other, each in a process and within a time of its own, and writes what each one gives.

A step is a function that yields (key, value) pairs. Each pair is written as it comes, so a step that fails, hangs or
runs out of memory loses only what it has not measured yet, and costs no other step anything.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Pairs = Iterator[tuple[str, Any]]
# What takes long to import and does not touch the GPU, which a process that has been forked could then not use.
_SLOW_IMPORTS = ("torch", "datasets", "transformers", "transformers.modeling_utils", "accelerate.utils", "pydantic")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where steps run, and how large.

    Args:
        device: `cuda`, or `cpu` for a rehearsal.
        small: take sizes that a CPU can do in seconds.
        work: the folder for models and data, which are deleted in the end.
    """

    device: str
    small: bool
    work: Path


class Session:
    """A sitting at a machine.

    Args:
        setting: where steps run.
        out: the folder of `results.json` and `log.txt`. Steps that have results there do not run again.
        seconds: how long the sitting may take.
        least: with how many seconds left a step still begins.
    """

    def __init__(self, setting: Setting, out: Path, seconds: float, least: float = 15) -> None:
        self._least = least
        self.setting, self.out, self._end = setting, out, time.monotonic() + seconds
        for folder in (out, setting.work):
            folder.mkdir(parents=True, exist_ok=True)
        self._path = out / "results.json"
        self.results: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._how = "fork"
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that asking for a GPU does not start one here
        for module in _SLOW_IMPORTS:
            importlib.import_module(module)

    @property
    def left(self) -> float:
        """How many seconds are left."""
        return self._end - time.monotonic()

    def done(self, name: str) -> bool:
        """Return whether a step has come to its end, in this sitting or in an earlier one."""
        row = self.results.get(name)
        return row is not None and "error" not in row and "skipped" not in row

    def run(self, name: str, step: Callable[..., Pairs], *, limit: float, **options: Any) -> None:
        """Run a step, unless it is done.

        Args:
            name: what results.json calls it.
            step: the step; it gets the setting and the options.
            limit: how many seconds it may take; in a rehearsal, five times as many.
            options: the step's own options.
        """
        limit = min(limit * (5 if self.setting.small else 1), self.left - 5)
        if self.done(name):
            return
        if limit < self._least:
            self._keep(name, {"skipped": f"{max(0, self.left):.0f} s were left"})
            return
        say(f"{name} (at most {limit:.0f} s)")
        started, row = time.monotonic(), self._in_process(step, limit, options)
        if self._how == "fork" and "forked subprocess" in str(row.get("error")):
            say("a forked process cannot use the GPU here; each step imports its libraries from now on")
            self._how = "spawn"
            row = self._in_process(step, min(limit, self.left - 5), options)
        self._keep(name, {**row, "wall": round(time.monotonic() - started, 1)})
        say(f"{name}: {row.get('error', 'done')}")

    def _in_process(self, step: Callable[..., Pairs], limit: float, options: dict[str, Any]) -> dict[str, Any]:
        answer = self.setting.work / "answer.json"
        answer.unlink(missing_ok=True)
        arguments = (step, self.setting, options, answer, self.out / "log.txt")
        context: Any = multiprocessing.get_context(self._how)
        process = context.Process(target=_work, args=arguments)
        process.start()
        process.join(limit)
        problem = None
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            problem = f"took more than {limit:.0f} s"
        elif process.exitcode:
            problem = f"the process ended with {process.exitcode}"
        row = json.loads(answer.read_text()) if answer.exists() else {}
        return {**row, **({} if problem is None or "error" in row else {"error": problem})}

    def _keep(self, name: str, row: dict[str, Any]) -> None:
        self.results[name] = row
        _write(self._path, self.results)


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _work(step: Callable[..., Pairs], setting: Setting, options: dict[str, Any], answer: Path, log: Path) -> None:
    """Do a step in this process, which was started for it; everything that it prints goes to the log."""
    os.setsid()
    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    row: dict[str, Any] = {}
    try:
        for key, value in step(setting, **options):
            row[key] = value
            _write(answer, row)
    except BaseException as error:  # a step that is stopped has failed too
        traceback.print_exc()
        row |= {"error": f"{type(error).__name__}: {error}"[:800], "where": traceback.format_exc(limit=-6)[-2500:]}
    _write(answer, row)
    os._exit(0)  # libraries' threads may not end by themselves


def _write(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    aside.rename(path)
