"""Commands that stream never hold a model in memory: their peak memory, each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEARS
from transformers import PreTrainedTokenizerFast

import loram
from loram.disk.adapter import save_adapter
from loram.disk.tensorfile import TensorSpec
from loram.disk.writer import ShardedWriter
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory use from /proc/self/status")
MB = 1_000_000
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MIXTURE: dict[str, Any] = {
    **CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "head_dim": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1408,
}
# The script imports what a command needs, runs the command, and prints the memory that it took beyond the imports.
CHILD = """
import sys
import datasets, peft, torch, transformers.models.llama.modeling_llama, loram.export.merge, loram.pruning.prune
import loram.evaluation.evaluate
import loram.training.train, loram.compute.nf4, trl.trainer.sft_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from loram import cli

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

before = memory("VmRSS:")
code = cli._main(sys.argv[1:])
print()
print(memory("VmHWM:") - before)
sys.exit(code)
"""


def write_model(folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model in bfloat16. All layers are the same, since only their number matters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    shapes = Geometry.from_config(config).tensor_shapes(ARCHITECTURES[config["model_type"]])
    torch.manual_seed(0)
    noise = (0.02 * torch.randn(max(map(prod, shapes.values())))).bfloat16()
    specs = {name: TensorSpec(dtype=torch.bfloat16, shape=shape) for name, shape in shapes.items()}
    with ShardedWriter(folder, specs) as writer:
        for name, spec in specs.items():
            count = spec.nbytes // 2
            writer.write(
                name, torch.ones(count, dtype=spec.dtype) if "norm" in name else noise[:count].view(spec.shape)
            )
    return folder


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 0.55 GB in bfloat16, 1.1 GB in float32."""
    folder = write_model(tmp_path_factory.mktemp("large") / "model", CONFIG, tokenizer)
    assert (folder / "model.safetensors").stat().st_size > 500 * MB
    return folder


def write_adapter(folder: Path, base: Path, shapes: Mapping[str, tuple[int, int]], rank: int) -> Path:
    """An adapter on the linears of the decoder layers, whose factors are all ones."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(LINEARS)}
    tensors = {}
    for module, (rows, columns) in shapes.items():
        if module != "lm_head":
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, columns)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(rows, rank)
    save_adapter(folder, {**config, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}, tensors)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    geometry = Geometry.from_config(CONFIG)
    shapes = {
        f"model.layers.{layer}.{linear.path}": geometry.linear_shape(linear)
        for layer in range(CONFIG["num_hidden_layers"])
        for linear in ARCHITECTURES["llama"].linears
    }
    return write_adapter(tmp_path_factory.mktemp("adapter"), model, shapes, rank=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "one plus two is three. " * 40}) + "\n" for _ in range(2)))
    return path


def extra_memory(*arguments: str | Path) -> int:
    """Return the peak memory of a command in bytes, without the memory that importing its libraries takes."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


# A decoder layer has 45 MB in float32, and so do its gradients; the next layer has 23 MB while it is read. The refit
# has its products besides.
def test_pruning_takes_a_few_layers_memory(model: Path, text: Path, tmp_path: Path) -> None:
    options = ["--calibration", text, "--calibration-samples", "2", "--calibration-length", "64", "--device", "cpu"]
    assert extra_memory("prune", model, tmp_path / "pruned", "--ratio", "0.5", *options) < 460 * MB
    assert (tmp_path / "pruned" / "model.safetensors").stat().st_size > 100 * MB


def test_merging_takes_some_rows_memory(model: Path, adapter: Path, tmp_path: Path) -> None:
    assert extra_memory("merge", model, adapter, tmp_path / "merged") < 300 * MB
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 500 * MB


def test_streamed_evaluation_takes_a_few_layers_memory(model: Path, adapter: Path, text: Path) -> None:
    options = ["--stream", "--adapter", adapter, "--max-samples", "1", "--max-length", "64", "--device", "cpu"]
    assert extra_memory("eval", model, "--dataset", text, *options) < 400 * MB


def test_quantising_takes_a_tensors_memory(model: Path, tmp_path: Path) -> None:
    assert extra_memory("quantize", model, tmp_path / "small") < 200 * MB
    assert 130 * MB < (tmp_path / "small" / "model.safetensors").stat().st_size < 160 * MB


def test_training_in_4_bits_never_has_the_model_in_16(model: Path, tmp_path: Path) -> None:
    """The model has 550 MB in 16 bits and 142 MB in 4; the rest is an adapter, activations and imports."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one plus two is three."}\n')
    options = ["--max-steps", "1", "--lora-r", "1", "--device", "cpu", "--load-in-4bit"]
    assert extra_memory("train", model, tmp_path / "adapter", "--dataset", rows, *options) < 400 * MB


def test_training_in_4_bits_never_has_experts_in_16(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The model has 294 MB in 16 bits, of which experts have 277, and 76 MB in 4."""
    mixture = write_model(tmp_path / "mixture", MIXTURE, tokenizer)
    assert (mixture / "model.safetensors").stat().st_size > 290 * MB
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one plus two is three."}\n')
    options = ["--max-steps", "1", "--lora-r", "1", "--device", "cpu", "--load-in-4bit"]
    assert extra_memory("train", mixture, tmp_path / "adapter", "--dataset", rows, *options) < 220 * MB


def test_recovering_takes_the_adapters_memory(model: Path, tmp_path: Path) -> None:
    """The adapter before and after recovery has about 80 MB; the model, which is never read, has 550 MB."""
    plan = loram.prune(model, tmp_path / "pruned", ratio=0.65, criterion="random")
    (tmp_path / "adapter").mkdir()
    plan.save(tmp_path / "adapter")
    small = write_adapter(tmp_path / "adapter", tmp_path / "pruned", plan.linear_shapes(), rank=32)
    assert extra_memory("recover", small, tmp_path / "recovered") < 250 * MB
    assert (tmp_path / "recovered" / "adapter_model.safetensors").stat().st_size > 40 * MB
