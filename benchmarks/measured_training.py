"""A real `loram.train` in a process of its own: what it held at its peak, and how fast it was."""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import loram
from loram.compute.device import peak_rss, reset_peak_rss, rss
from loram.compute.nf4 import nbytes

GIB = 1 << 30


class Meter(TrainerCallback):  # type: ignore[misc]
    """Seconds of every step, and the bytes of the frozen weights."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.weight_bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Count the weights, constants of 4-bit ones included."""
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        self.weight_bytes = nbytes(model) - trained

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start the clock, once the device has caught up."""
        _wait()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Stop it."""
        _wait()
        self.seconds.append(time.perf_counter() - self.started)


def measured(
    folder: Path, tokens: int, *, steps: int, device: str, cap: int | None = None, **options: Any
) -> dict[str, Any]:
    """Train on rows of exactly `tokens` tokens, one a step.

    Args:
        folder: the model.
        tokens: of a row.
        steps: how many; the first is not in the speed.
        device: where.
        cap: bytes that the device may give out, its context included; on a CPU nothing is capped.
        options: of `loram.train`.

    Returns:
        `peak` (on a CPU the growth of resident memory, on a GPU what the allocator reserved at most), `context` (what
        the GPU held before any tensor), `weight_bytes`, `tokens_per_second`, and `host_peak`: of resident memory.
    """
    request = {"folder": str(folder), "tokens": tokens, "steps": steps, "device": device, "cap": cap}
    line = json.dumps({**request, "options": options})
    done = subprocess.run([sys.executable, __file__, line], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"training on {folder} with {tokens} tokens failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    folder: str, tokens: int, steps: int, device: str, cap: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """What the process does that `measured` starts."""
    context = 0
    if device == "cuda":
        torch.empty(1, device=device)
        free, total = torch.cuda.mem_get_info()
        context = total - free
        if cap is not None:
            torch.cuda.set_per_process_memory_fraction((cap - context) / total)
    meter = Meter()
    trainer = {"per_device_train_batch_size": 1, "max_length": tokens, "max_steps": steps, "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "rows.txt"
        text.write_text("".join(chr(97 + number % 26) for number in range(tokens * steps)), encoding="utf-8")
        reset_peak_rss()
        before = rss()
        loram.train(
            folder,
            Path(scratch) / "adapter",
            data=text,
            device=device,
            callbacks=[meter],
            **{**options, "trainer": {**trainer, **options.get("trainer", {})}},
        )
    growth = peak_rss() - before
    return {
        "peak": torch.cuda.max_memory_reserved() if device == "cuda" else growth,
        "peak_allocated": torch.cuda.max_memory_allocated() if device == "cuda" else growth,
        "context": context,
        "host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weight_bytes": meter.weight_bytes,
        "tokens_per_second": tokens / statistics.median(meter.seconds[1:]),
        "steps": steps,
    }


def device_name(device: str) -> str:
    """What results are filed under."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
