"""A 4-bit model equals a dense one with the dequantised weights: forward, backward, training, folders and bytes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import FAMILIES, make_model, own_names, relative
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import loram
from loram.compute.loading import load_model
from loram.compute.loss import use_chunked_loss_
from loram.compute.nf4 import count_parameters, is_4bit, load_4bit, nbytes, quantize
from loram.disk.checkpoint import Checkpoint

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
IDS = torch.arange(33).view(3, 11)
STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1}


@pytest.fixture(scope="module")
def wide_models(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models, pruned in layers 2 and 3, whose hidden size is a whole number of NF4 blocks, as in all real models."""
    root = tmp_path_factory.mktemp("wide")
    found = {}
    for family, tied in (("llama", True), ("qwen3", False), ("gemma3_text", True), ("phi3", False)):
        base = make_model(root / "full" / family, family, tokenizer, hidden_size=64, tie_word_embeddings=tied)
        found[family] = root / family
        loram.prune(base, found[family], ratio=0.5, criterion="magnitude", keep_first=2, keep_last=1)
    return found


def dense_(folder: Path, *, embedding: bool = True) -> Any:
    """Return the model in full precision, with every linear and the embedding rounded to NF4."""
    model = load_model(Checkpoint(folder), dtype=torch.float32)
    tied = model.get_input_embeddings().weight is model.lm_head.weight
    for module in model.modules():
        table = isinstance(module, nn.Embedding) and (embedding or not tied)
        if (isinstance(module, nn.Linear) and not (module is model.lm_head and tied)) or (table and embedding):
            with torch.no_grad():
                module.weight.copy_(dequantize_4bit(*quantize(module.weight.detach())))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantised_weights(family: str, pruned_models: dict[str, Path]) -> None:
    """The hidden size is 32, so that one block spans two rows of the embedding."""
    model = load_4bit(Checkpoint(pruned_models[family]), **CPU)
    with torch.no_grad():
        expected = dense_(pruned_models[family])(input_ids=IDS).logits
        assert relative(model(input_ids=IDS).logits, expected) < 1e-5
        plain = load_model(Checkpoint(pruned_models[family]), dtype=torch.float32).eval()
        assert relative(plain(input_ids=IDS).logits, expected) > 1e-3  # NF4 made a difference


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_looking_rows_up_in_4_bits(family: str, wide_models: dict[str, Path]) -> None:
    model: Any = load_4bit(Checkpoint(wide_models[family]), **CPU)
    with torch.no_grad():
        assert relative(model(input_ids=IDS).logits, dense_(wide_models[family])(input_ids=IDS).logits) < 1e-5
    embedding = model.get_input_embeddings()
    assert is_4bit(embedding.weight)
    assert (embedding.weight is model.lm_head.weight) == (family not in ("qwen3", "phi3"))


def test_an_embedding_in_host_memory_is_exact(wide_models: dict[str, Path]) -> None:
    folder = wide_models["qwen3"]
    model = load_4bit(Checkpoint(folder), **CPU, offload_embedding=True)
    with torch.no_grad():
        assert relative(model(input_ids=IDS).logits, dense_(folder, embedding=False)(input_ids=IDS).logits) < 1e-5
    assert not any("embed" in name and parameter.numel() for name, parameter in model.named_parameters())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_gradients_through_frozen_4_bit_weights(family: str, checkpointing: bool, wide_models: dict[str, Path]) -> None:
    """The adapters are on a frozen 4-bit lm_head and below it; the reference is the plain loss of the dense model."""
    targets = own_names(family, {"target_modules": ["lm_head", "q_proj", "down_proj"]})
    options = LoraConfig(r=3, **targets, init_lora_weights=False, task_type="CAUSAL_LM")
    labels = IDS.clone()
    labels[0, :5], labels[2, 8:] = -100, -100

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        adapted = get_peft_model(model, options)
        torch.manual_seed(2)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        adapted.train()
        adapted(input_ids=IDS, labels=labels).loss.backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}

    expected = gradients(dense_(wide_models[family]))
    model: Any = load_4bit(Checkpoint(wide_models[family]), **CPU)
    if checkpointing:
        model.activation_checkpointing_enable()
    use_chunked_loss_(model, chunk_tokens=7)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert any("lm_head.lora_A" in name for name in found)
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("family", ["llama", "qwen3"], ids=["tied", "untied"])
def test_a_folder_that_is_quantised_already(family: str, wide_models: dict[str, Path], tmp_path: Path) -> None:
    folder = loram.quantize(wide_models[family], tmp_path / "small", shard_bytes=30_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded, direct = load_4bit(Checkpoint(folder), **CPU), load_4bit(Checkpoint(wide_models[family]), **CPU)
    with torch.no_grad():
        expected = direct(input_ids=IDS).logits
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
    assert nbytes(loaded) == nbytes(direct)
    assert count_parameters(loaded) == count_parameters(load_model(Checkpoint(wide_models[family])))
    assert (folder / "loram_plan.json").read_bytes() == (wide_models[family] / "loram_plan.json").read_bytes()


def test_transformers_itself_loads_a_quantised_folder(wide_models: dict[str, Path], tmp_path: Path) -> None:
    """It gets the same weights as from the original folder, except for the embedding, which it never quantises."""
    folder = loram.quantize(wide_models["qwen3"], tmp_path / "small")
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[],
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        wide_models["qwen3"], quantization_config=options, dtype=torch.float32
    )
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
        if is_4bit(parameter):
            ours, state = found.get_parameter(name).quant_state, parameter.quant_state
            assert torch.equal(ours.absmax, state.absmax)
            assert torch.equal(ours.state2.absmax, state.state2.absmax)
            assert ours.offset.item() == pytest.approx(state.offset.item())
    assert is_4bit(found.lm_head.weight)


@pytest.mark.parametrize(
    "options",
    [{}, {"offload_embedding": True}, {"lora_dtype": "bfloat16"}, {"trainer": {"optim": "adamw_8bit"}}],
    ids=str,
)
def test_training_in_4_bits_recovers(
    options: dict[str, Any], wide_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    trainer = {**STEPS, "max_steps": 12, "learning_rate": 2e-2, **options.get("trainer", {})}
    loram.train(
        wide_models["qwen3"],
        tmp_path / "adapter",
        data=rows_file,
        load_in_4bit=True,
        **{**options, "trainer": trainer},
    )
    entries = [json.loads(line) for line in (tmp_path / "adapter" / "training_log.jsonl").read_text().splitlines()]
    assert entries[-1]["loss"] < entries[0]["loss"]
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()}
    assert dtypes == {getattr(torch, options.get("lora_dtype", "float32"))}
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    full = wide_models["qwen3"].parent / "full" / "qwen3"
    plain = loram.evaluate(full, data=rows_file).perplexity
    assert loram.evaluate(full, adapter=tmp_path / "recovered", data=rows_file).perplexity != plain


def test_a_quantised_folder_trains_and_evaluates_as_the_original_does(
    wide_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """The bytes are the same without load_in_4bit. Adapters fit both folders, but not a third one."""
    small = loram.quantize(wide_models["qwen3"], tmp_path / "small")
    loram.train(wide_models["qwen3"], tmp_path / "direct", data=rows_file, trainer=STEPS, load_in_4bit=True)
    loram.train(small, tmp_path / "stored", data=rows_file, trainer=STEPS)
    direct, stored = (tmp_path / name / "adapter_model.safetensors" for name in ("direct", "stored"))
    assert direct.read_bytes() == stored.read_bytes()
    plain = loram.evaluate(small, data=rows_file)
    adapted = loram.evaluate(small, data=rows_file, adapter=tmp_path / "stored")
    assert adapted.perplexity < plain.perplexity
    assert plain.parameters == loram.evaluate(wide_models["qwen3"], data=rows_file).parameters
    assert loram.evaluate(small, data=rows_file, adapter=tmp_path / "direct").perplexity == adapted.perplexity
    loram.evaluate(wide_models["qwen3"], data=rows_file, adapter=tmp_path / "stored")
    other = loram.quantize(wide_models["qwen3"].parent / "full" / "qwen3", tmp_path / "other")
    with pytest.raises(loram.UserError, match="was trained on a pruned model"):
        loram.evaluate(other, data=rows_file, adapter=tmp_path / "stored")
    loram.recover(tmp_path / "stored", tmp_path / "recovered")
    recovered = loram.evaluate(other, data=rows_file, adapter=tmp_path / "recovered")
    assert recovered.perplexity != loram.evaluate(other, data=rows_file).perplexity


def test_what_cannot_be_done_with_4_bits(wide_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    small = loram.quantize(wide_models["qwen3"], tmp_path / "small")
    full = wide_models["qwen3"].parent / "full" / "qwen3"
    small_full = loram.quantize(full, tmp_path / "small_full")
    with pytest.raises(loram.UserError, match="is quantised already"):
        loram.quantize(small, tmp_path / "again")
    with pytest.raises(loram.UserError, match="quantised; prune the original"):
        loram.prune(small_full, tmp_path / "again", ratio=0.5, keep_first=1, keep_last=1)
    with pytest.raises(loram.UserError, match="cannot be streamed"):
        loram.evaluate(small, data=rows_file, stream=True)
    with pytest.raises(loram.UserError, match="cannot be streamed"):
        loram.teach(small_full, tmp_path / "again", data=rows_file)
    assert not (tmp_path / "again").exists()


def test_a_merge_into_4_bits_is_refused(wide_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    small = loram.quantize(wide_models["qwen3"], tmp_path / "small")
    loram.train(small, tmp_path / "adapter", data=rows_file, trainer=STEPS)
    with pytest.raises(loram.UserError, match="is quantised"):
        loram.merge(small, tmp_path / "adapter", tmp_path / "merged")


def test_bytes(wide_models: dict[str, Path], tmp_path: Path) -> None:
    """The planner counts 4 bits per weight, 8 per block of 64 weights, 32 per 256 blocks, and the codes."""
    model = load_4bit(Checkpoint(wide_models["qwen3"]), **CPU)
    expected = 0
    for name, parameter in load_model(Checkpoint(wide_models["qwen3"]), dtype=torch.float32).named_parameters():
        count = parameter.numel()
        blocks = -(-count // 64)
        packed = count // 2 + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
        expected += packed if parameter.ndim == 2 else 4 * count
        assert parameter.ndim in (1, 2), name
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert nbytes(model) - buffers == expected
    folder = loram.quantize(wide_models["qwen3"], tmp_path / "small")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.uint8


@pytest.mark.parametrize("shape", [(40, 32), (5, 100), (3, 22), (7, 4300), (4, 64)], ids=str)
def test_any_width_is_dequantised_on_a_cpu(shape: tuple[int, int]) -> None:
    """Blocks of 64 go on through the rows. With AVX-512, bitsandbytes alone fails this."""
    packed, state = quantize_4bit(torch.randn(shape), quant_type="nf4", blocksize=64, compress_statistics=False)
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()[: math.prod(shape)]
    expected = state.code[halves] * state.absmax.repeat_interleave(64)[: math.prod(shape)]
    assert torch.allclose(dequantize_4bit(packed, state), expected.view(shape), atol=1e-6)
