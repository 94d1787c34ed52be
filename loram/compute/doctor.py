"""What this machine and installation can do: versions, devices, fast dtypes, free disk, and missing packages."""

import importlib.util
import os
import platform
import shutil
import time
from pathlib import Path

import torch
from huggingface_hub import constants
from pydantic import BaseModel, ConfigDict

from loram.base.paths import cache_folder
from loram.compute.device import compute_dtype, free_memory
from loram.disk.artifacts import library_versions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Optional package -> what it is for.
_OPTIONAL = {
    "gguf": "to read GGUF files",
    "tensorboard": "for report_to: tensorboard",
    "trackio": "for report_to: trackio",
    "wandb": "for report_to: wandb",
}


class Device(BaseModel):
    """A device to compute on.

    Args:
        device: its name in torch: cpu, cuda:0.
        name: the product name of a GPU, or the architecture of a CPU.
        cores: the number of CPU cores that this process may use; None for a GPU.
        memory: the bytes of a GPU's own memory; None for a CPU, which uses the system's memory.
        free_memory: the bytes of that memory that are free; None if the system does not tell.
        bfloat16: whether torch can compute in bfloat16 there, fast or slowly.
        gflops: dtype -> billions of floating-point operations per second in a small matrix product.
        computes_in: the dtype that loram uses there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    name: str
    cores: int | None = None
    memory: int | None = None
    free_memory: int | None = None
    bfloat16: bool
    gflops: dict[str, float]
    computes_in: str


class Room(BaseModel):
    """The free bytes on the disk of a folder that loram, or the Hugging Face hub, writes to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    folder: str
    free: int


class Missing(BaseModel):
    """A package or device that is not here, and what it would be used for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    use: str


class Diagnosis(BaseModel):
    """The report of `doctor`; `versions` has those of Python, loram and its libraries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: dict[str, str]
    devices: list[Device]
    disk: list[Room]
    missing: list[Missing]

    def text(self) -> str:
        """Format the report for people."""
        lines = [", ".join(f"{name} {version}" for name, version in self.versions.items()), "", "Devices"]
        for device in self.devices:
            lines += [f"  {_title(device)}", f"    {_speed(device)}"]
        lines += ["", "Free disk", *(f"  {room.what}: {_gb(room.free)} ({room.folder})" for room in self.disk)]
        lines += ["", "Not here", *(f"  {missing.what}: {missing.use}" for missing in self.missing)]
        return "\n".join(lines if self.missing else lines[:-2])


def doctor() -> Diagnosis:
    """Examine this machine and installation. After torch is imported, this takes a second or two."""
    missing = [
        Missing(what=name, use=f"{use} (pip install {name})")
        for name, use in _OPTIONAL.items()
        if importlib.util.find_spec(name) is None
    ]
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if not any(gpu.bfloat16 for gpu in gpus):
        what = "a GPU with bfloat16" if gpus else "a GPU that torch can use"
        missing.append(Missing(what=what, use="to train in bfloat16, in half the memory"))
    folders = {
        "current folder": Path.cwd(),
        "Hugging Face cache": Path(constants.HF_HUB_CACHE),
        "loram's cache": cache_folder(),
    }
    return Diagnosis(
        versions={"python": platform.python_version(), **library_versions()},
        devices=[*gpus, _cpu()],
        disk=[Room(what=what, folder=str(folder), free=_free_disk(folder)) for what, folder in folders.items()],
        missing=missing,
    )


def _cpu() -> Device:
    device = torch.device("cpu")
    return Device(
        device="cpu",
        name=platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        free_memory=free_memory(),
        bfloat16=True,
        gflops=_gflops(device, 256),
        computes_in=_name(compute_dtype(device)),
    )


def _gpu(index: int) -> Device:
    device = torch.device("cuda", index)
    with torch.cuda.device(device):
        free, total = torch.cuda.mem_get_info()
        return Device(
            device=str(device),
            name=torch.cuda.get_device_name(),
            memory=total,
            free_memory=free,
            bfloat16=torch.cuda.is_bf16_supported(),
            gflops=_gflops(device, 4096),
            computes_in=_name(compute_dtype(device)),
        )


def _gflops(device: torch.device, size: int) -> dict[str, float]:
    """Measure each dtype for a fifth of a second and take the best run, since other programs may be running."""
    speeds = {}
    for dtype in _DTYPES:
        matrix, times = torch.ones(size, size, dtype=dtype, device=device), [0.0]
        while sum(times) < 0.2:
            started = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # reading a value waits for the device
            times.append(time.perf_counter() - started)
        speeds[_name(dtype)] = float(f"{2e-9 * size**3 / min(times[1:]):.3g}")
    return speeds


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _title(device: Device) -> str:
    parts = [f"{device.cores} cores"] if device.cores is not None else []
    if device.memory is not None:
        parts.append(f"{_gb(device.memory)} of its own memory")
    if device.free_memory is not None:
        parts.append(f"{_gb(device.free_memory)} of memory free")
    if not device.bfloat16:
        parts.append("no bfloat16")
    return f"{device.device} ({device.name}): {', '.join(parts)}"


def _speed(device: Device) -> str:
    """Format the speeds and what follows from them, such as `bfloat16 is 60x slower than float32 here`."""
    speeds = ", ".join(f"{dtype} {speed:,.{0 if speed >= 10 else 1}f}" for dtype, speed in device.gflops.items())
    single = device.gflops["float32"]
    notes = []
    for dtype, speed in device.gflops.items():
        ratio = single / speed
        if ratio >= 2:
            notes.append(f"{dtype} is {ratio:.0f}x slower than float32 here")
        elif ratio <= 0.5:
            notes.append(f"{dtype} is {1 / ratio:.0f}x faster than float32 here")
    reason = ", ".join(notes) + ": " if notes else ""
    return f"{speeds} GFLOP/s; {reason}loram computes in {device.computes_in}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
