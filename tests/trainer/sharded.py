"""The trainings that each of two processes runs for test_sharding.py under FSDP2.

torchrun --nproc-per-node 2 tests/trainer/sharded.py MODEL ROWS OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from together import LORA, TRAINER, Stop
from transformers import TrainerCallback

import loram
from loram.base import processes

OPTIONS: dict[str, Any] = {"lora": LORA, "device": "cpu"}


def shard_on_cpus() -> None:
    """Let accelerate shard on CPUs as it does on GPUs: nothing but its choice of the device keeps it from that."""
    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    sys.modules["loram.training.train"].check_sharding = lambda trainer, device: None  # type: ignore[attr-defined]


class Bytes(TrainerCallback):  # type: ignore[misc]
    """Counts the bytes of the parameters that this process holds, and of all."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        parameters = list(model.parameters())
        self.local = sum(parameter.to_local().nbytes for parameter in parameters)
        self.whole = sum(parameter.nbytes for parameter in parameters)


def trainer(**more: Any) -> dict[str, Any]:
    """Return the Trainer's options, with the same batches in any number of processes."""
    return {**TRAINER, "per_device_train_batch_size": 4 // processes.count(), "logging_steps": 1, **more}


def work(model: Path, rows: Path, out: Path) -> None:
    """Train without and with an interruption."""
    counted = Bytes()
    loram.train(model, out / "plain", data=rows, trainer=trainer(fsdp=True), callbacks=[counted], **OPTIONS)
    interrupted = trainer(fsdp=True, save_steps=3)
    try:
        loram.train(model, out / "resumed", data=rows, trainer=interrupted, callbacks=[Stop()], **OPTIONS)
    except InterruptedError:
        processes.wait()
    loram.train(model, out / "resumed", data=rows, trainer=interrupted, **OPTIONS)
    counts = processes.gather((counted.local, counted.whole))
    if processes.first():
        (out / "bytes.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    import loram.training.train  # so that it is there to be changed

    shard_on_cpus()
    torch.set_flush_denormal(True)
    work(*map(Path, sys.argv[1:]))
    processes.leave()
