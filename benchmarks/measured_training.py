"""Run `loram.train` in a process of its own, and measure its peak memory and its speed."""

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
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import loram
from loram.compute.device import peak_rss, reset_peak_rss, rss
from loram.compute.nf4 import nbytes

GIB = 1 << 30


class Meter(TrainerCallback):
    """Measures the seconds of each step and the bytes of the frozen weights."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.weight_bytes = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **rest: Any,
    ) -> None:
        """Count the bytes of the weights, including the constants of 4-bit weights."""
        assert model is not None
        trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        self.weight_bytes = nbytes(model) - trainable

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Start the clock when the device has finished its work."""
        _wait()
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Stop the clock when the device has finished its work."""
        _wait()
        self.seconds.append(time.perf_counter() - self.started)


def measure_in_process(
    folder: Path, tokens: int, *, steps: int, device: str, cap: int | None = None, **options: Any
) -> dict[str, Any]:
    """Train in a process of its own on rows of exactly `tokens` tokens, one row per step.

    Args:
        folder: the folder of the model.
        tokens: the number of tokens per row.
        steps: the number of steps; the first one does not count for the speed.
        device: the device to train on.
        cap: how many bytes may be allocated on a GPU, including its context; a CPU has no cap.
        options: options of `loram.train`.

    Returns:
        `peak` (bytes; on a CPU the growth of resident memory, on a GPU the maximum that the allocator reserved),
        `context` (bytes that the GPU used before any tensor), `weight_bytes`, `tokens_per_second`, and `host_peak` (the
        maximum of resident memory in bytes).
    """
    request = {"folder": str(folder), "tokens": tokens, "steps": steps, "device": device, "cap": cap}
    line = json.dumps({**request, "options": options})
    done = subprocess.run([sys.executable, __file__, line], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"training on {folder} with {tokens} tokens failed")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(
    folder: str, tokens: int, steps: int, device: str, cap: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Train and measure in this process, which `measure_in_process` starts."""
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
    """Return the name of the device for the results."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
