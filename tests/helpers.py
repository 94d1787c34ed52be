"""Helpers for the tests of several rooms: they count live tensors, compare folders and stop trainings."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Trainer

import loram
from loram.model.plan import PruningPlan


class Live(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of all live tensors after each operation, each storage once, and remembers the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def launch(script: Path, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes that torchrun starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, str(script), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},  # the machine's host name may not resolve
    )
    assert ended.returncode == 0, ended.stderr
    return ended


class Stopped(BaseException):
    """The exception that a test raises in a training."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Make the next training raise `error` in the batch with this number, counted from 1."""
    count, step = itertools.count(1), Trainer.training_step

    def training_step(self: Trainer, *args: Any, **options: Any) -> Any:
        if next(count) == number:
            raise error
        return step(self, *args, **options)

    patch.setattr(Trainer, "training_step", training_step)


class WithoutExperts(TorchFunctionMode):
    """Give the logits of dropped experts as minus infinity wherever a router's weight is multiplied.

    A bias that only the choice of experts sees becomes minus infinity too: it comes after a sigmoid or softmax.
    """

    def __init__(self, model: Any, plan: PruningPlan) -> None:
        super().__init__()
        self.dropped: dict[int, list[int]] = {}
        for layer, spaces in plan.layers.items():
            row = plan.geometry.layer(plan.architecture, layer)
            if row.experts is not None and "experts" in spaces:
                assert plan.geometry.num_experts is not None
                router = model.get_parameter(f"{row.layer_path(layer)}.{row.experts.router}")
                gone = set(range(plan.geometry.num_experts)) - set(spaces["experts"])
                self.dropped[router.data_ptr()] = sorted(gone)
                for part in row.parameters:
                    if part.name.endswith("e_score_correction_bias"):
                        model.state_dict()[f"{row.layer_path(layer)}.{part.name}"][..., sorted(gone)] = -torch.inf

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear and (gone := self.dropped.get(args[1].data_ptr())):
            result[..., gone] = -torch.inf
        return result


def zeroed(base: Path, plan: PruningPlan) -> Any:
    """The full model with the weights of its pruned heads and channels set to zero."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(loram.widen(name, loram.narrow(name, tensor, plan), plan))
    return model


class LlamaCpp:
    """llama.cpp's server, with a model and maybe a LoRA adapter."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp as a wheel is not installed")
        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx, options.n_parallel = str(model), 128, 1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.warmup, options.verbosity = False, 0
        if adapter is not None:
            options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = xllamacpp.Server(options)

    def _complete(self, tokens: list[int], count: int, ranked: int) -> list[dict[str, Any]]:
        request = {"prompt": tokens, "max_tokens": count, "logprobs": ranked, "temperature": 0.0, "ignore_eos": True}
        answer = self.server.handle_completions({**request, "cache_prompt": False})
        content: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
        return content

    def log_probabilities(self, tokens: list[int], vocabulary: int) -> Tensor:
        values = torch.full((vocabulary,), float("nan"))
        for entry in self._complete(tokens, 1, vocabulary)[0]["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        return values

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        return [entry["id"] for entry in self._complete(tokens, count, 1)]


def log_probabilities(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model.eval()(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
