"""What the machine is and does: versions, bitsandbytes against plain arithmetic, and the rates that bound all else."""

import importlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from session import Pairs, Setting
from tools import seconds_of

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "numpy")
# Products of pruned models leave numbers of channels that are no multiples of 64; beside each is the nearest that is.
_PRODUCTS = {
    "70b gate, whole": (28672, 8192),
    "70b gate at 0.85": (4300, 8192),
    "70b gate, 4352 channels": (4352, 8192),
    "70b down at 0.85": (8192, 4300),
    "70b down, 4352 channels": (8192, 4352),
    "7b down at 0.65": (4096, 3852),
    "7b down, 3840 channels": (4096, 3840),
    "lora_A": (8, 8192),
}


def machine(setting: Setting) -> Pairs:
    """Measure the machine."""
    device = setting.device
    for name in _LIBRARIES:
        yield name, importlib.import_module(name).__version__
    if device == "cuda":
        torch.empty(1, device=device)
        free, total = torch.cuda.mem_get_info()
        yield "gpu", torch.cuda.get_device_name()
        yield "memory", total
        yield "context", total - free
    yield "nf4", {columns: nf4_errors(columns, device) for columns in (512, 516)}
    yield "products", products(setting)
    if device == "cuda":
        yield "copies_gb_per_s", copies(device)
    yield "host_gb_per_s", host_rates(setting)


def nf4_errors(columns: int, device: str) -> dict[str, float]:
    """Compare NF4 on the device with NF4 on the CPU, and its product and gradient with those of the dense weight."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.nn import Params4bit

    from loram.compute.nf4 import as_4bit, dequantized_rows, quantize

    torch.manual_seed(0)
    weight = torch.randn(768, columns).bfloat16()
    dense, on_cpu = as_4bit(weight.to(device)).float(), as_4bit(weight).float()
    packed, state = quantize(weight.to(device))
    parameter = Params4bit(packed, quant_state=state, blocksize=64, quant_type="nf4", bnb_quantized=True)
    rows = torch.randint(768, (33,), device=device)
    x = torch.randn(4, columns, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = matmul_4bit(x, parameter.data, quant_state=state)
    y.float().square().sum().backward()
    assert x.grad is not None
    product = x.detach().float() @ dense.T
    return {
        "device against cpu": float((dense.cpu() - on_cpu).abs().max() / on_cpu.abs().max()),
        "rows": float((dequantized_rows(parameter, rows).float() - dense[rows]).abs().max()),
        "product": _distance(y.float(), product),
        "gradient": _distance(x.grad.float(), 2 * product @ dense),
    }


def _distance(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    return float((tensor - expected).norm() / expected.norm())


def products(setting: Setting) -> dict[str, dict[str, float]]:
    """Measure matrix products of 4,096 tokens in bf16, in TFLOP/s, and the milliseconds to dequantise each weight."""
    from bitsandbytes.functional import dequantize_4bit

    from loram.compute.nf4 import quantize

    device, tokens, rates = setting.device, 64 if setting.small else 4096, {}
    for name, shape in _PRODUCTS.items():
        rows, columns = (max(8, size // 16) for size in shape) if setting.small else shape
        weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
        y = torch.randn(tokens, rows, device=device, dtype=torch.bfloat16)
        tflop = 2 * tokens * rows * columns / 1e12
        packed, state = quantize(weight)
        rates[name] = {
            "forward": tflop / seconds_of(lambda: x @ weight.T, device, 10),  # noqa: B023
            "backward": tflop / seconds_of(lambda: y @ weight, device, 10),  # noqa: B023
            "dequantise_ms": 1e3 * seconds_of(lambda: dequantize_4bit(packed, state), device),  # noqa: B023
        }
    return rates


def copies(device: str) -> dict[str, float]:
    """Measure copies between host and device, in GB/s of what is in the host's memory."""
    size = 1 << 28
    on = torch.empty(size, dtype=torch.uint8, device=device)
    pageable, pinned = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8).pin_memory()
    halves = pageable.view(torch.bfloat16)[: 1 << 24]
    calls = {
        "to device, pageable": (size, lambda: on.copy_(pageable)),
        "to device, pinned": (size, lambda: on.copy_(pinned, non_blocking=True)),
        "to host, pageable": (size, lambda: on.to("cpu")),
        "to host, pinned": (size, lambda: pinned.copy_(on, non_blocking=True)),
        "bf16 to float32 on the device": (halves.nbytes, lambda: halves.to(device, torch.float32)),
    }
    return {name: count / 1e9 / seconds_of(call, device) for name, (count, call) in calls.items()}


def host_rates(setting: Setting) -> dict[str, float]:
    """Measure writing a weight, and reading it from the page cache into fresh memory and into memory used before."""
    from loram.compute.device import return_freed_memory_
    from loram.disk.tensorfile import TensorFile, TensorFileWriter, TensorSpec

    shape = (2867, 8192) if setting.small else (28672, 8192)
    gigabytes, path = 2 * math.prod(shape) / 1e9, setting.work / "rates.safetensors"
    path.unlink(missing_ok=True)
    tensor = torch.ones(shape, dtype=torch.bfloat16)

    def write() -> None:
        path.unlink(missing_ok=True)
        with TensorFileWriter(path, {"w": TensorSpec(dtype=torch.bfloat16, shape=shape)}) as writer:
            writer.write("w", tensor)

    rates = {"write": gigabytes / seconds_of(write, "cpu", 1, 0)}
    return_freed_memory_()
    file = TensorFile(path)
    rates["read into fresh memory"] = gigabytes / seconds_of(lambda: file.read("w"), "cpu", 3, 1)
    used: Any = memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    rates["read into memory used before"] = gigabytes / seconds_of(lambda: _read_into(path, used), "cpu", 3, 1)
    path.unlink()
    return rates


def _read_into(path: Path, memory: Any) -> None:
    with path.open("rb", buffering=0) as file:
        os.lseek(file.fileno(), -len(memory), os.SEEK_END)
        while memory:
            memory = memory[file.readinto(memory) :]


def clear(setting: Setting, folders: tuple[str, ...]) -> Pairs:
    """Delete models that later steps do not need."""
    for name in folders:
        shutil.rmtree(setting.work / name, ignore_errors=True)
    yield "deleted", folders
