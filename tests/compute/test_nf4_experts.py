"""Experts in NF4 equal experts whose matrices were rounded to NF4 one by one, and are never dequantised together."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import EXPERTS, relative
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import loram
from loram.compute.loading import load_model
from loram.compute.nf4 import as_4bit, count_parameters, is_4bit, load_4bit, nbytes, packed_tensors
from loram.compute.nf4_experts import open_experts_, share_no_stacks_
from loram.compute.original import check_original
from loram.disk.checkpoint import Checkpoint
from loram.export.quantize import quantization_config
from loram.planner.weights import nf4_bytes

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
IDS = torch.arange(33).view(3, 11)


def rounded_model(folder: Path) -> Any:
    """The model in float32 whose linears, embedding and single experts are rounded to NF4."""
    checkpoint = Checkpoint(folder)
    model = load_model(checkpoint, dtype=torch.float32)
    linears = {linear.path for linear in checkpoint.architecture.linears}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inner = (checkpoint.architecture.split(name) or (0, name))[1]
            if inner.removesuffix(".weight") in linears or "embed" in inner or "lm_head" in inner:
                parameter.copy_(as_4bit(parameter.detach()) if parameter.ndim == 2 else parameter)
            elif parameter.ndim == 3 and ".experts." in name:
                transposed = model.get_submodule(name.rpartition(".")[0]).is_transposed
                matrices = [(matrix.T if transposed else matrix).contiguous() for matrix in parameter.detach()]
                rounded = torch.stack([as_4bit(matrix) for matrix in matrices])
                parameter.copy_(rounded.mT if transposed else rounded)
    return model.eval()


def pass_through(model: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits, and the gradient of their squares by the inputs of the first layer."""
    inputs = embeddings.detach().clone().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    logits.square().mean().backward()
    assert inputs.grad is not None
    return logits.detach(), inputs.grad


@pytest.mark.parametrize("family", EXPERTS)
def test_logits_and_gradients_are_those_of_the_rounded_experts(family: str, pruned_models: dict[str, Path]) -> None:
    reference = rounded_model(pruned_models[family])
    embeddings = reference.get_input_embeddings()(IDS)
    expected = pass_through(reference, embeddings)
    plain = pass_through(load_model(Checkpoint(pruned_models[family]), dtype=torch.float32).eval(), embeddings)
    model: Any = load_4bit(Checkpoint(pruned_models[family]), **CPU)
    assert relative(model(input_ids=IDS).logits, expected[0]) < 1e-5
    found = pass_through(model, embeddings)
    model.train()
    model.activation_checkpointing_enable()
    for one, other, unrounded in zip(found, expected, plain, strict=True):
        assert relative(one, other) < 1e-5
        assert relative(unrounded, other) > 1e-3  # NF4 made a difference
    for one, other in zip(pass_through(model, embeddings), found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", [*EXPERTS, "gpt_oss", "qwen2_moe", "glm4_moe"])
def test_bytes(family: str, tiny_models: dict[str, Path]) -> None:
    """Each linear and each expert's matrix has the planner's bytes; routers, norms and biases have 4 per value."""
    model = load_4bit(Checkpoint(tiny_models[family]), **CPU)
    row = Checkpoint(tiny_models[family]).architecture
    expected = parameters = 0
    for name, parameter in load_model(Checkpoint(tiny_models[family]), dtype=torch.float32).named_parameters():
        inner = (row.split(name) or (0, name))[1]
        whole = parameter.ndim == 1 or (parameter.ndim == 2 and inner in {tensor.name for tensor in row.parameters})
        matrices = parameter.unbind() if parameter.ndim == 3 else [parameter]
        expected += 4 * parameter.numel() if whole else sum(sum(nf4_bytes(part.numel())) for part in matrices)
        parameters += parameter.numel()
    assert nbytes(model) - sum(buffer.nbytes for buffer in model.buffers()) == expected
    assert count_parameters(model) == parameters
    router = model.get_parameter(f"model.layers.4.{row.experts.router}")
    assert not is_4bit(router)


def test_no_dequantised_expert_waits_for_the_backward_pass(tiny_models: dict[str, Path]) -> None:
    model: Any = load_4bit(Checkpoint(tiny_models["mixtral"]), **CPU)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda it: it):
        model(inputs_embeds=torch.randn(1, 5, 32, requires_grad=True))
    assert not {(24, 32), (32, 24), (12, 32), (32, 12)} & set(kept)
    assert (32,) in kept  # norms, so that something is seen at all


@pytest.mark.filterwarnings("ignore:Targeting parameters with:UserWarning")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"], ids=["plain", "transposed with biases"])
def test_an_adapter_on_experts(family: str, tiny_models: dict[str, Path]) -> None:
    """Outputs and gradients are those of PEFT's own adapter on the rounded experts, in several processes too."""
    names = [tensor.name for tensor in Checkpoint(tiny_models[family]).architecture.expert_matrices]
    options: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": names, "init_lora_weights": False}

    def loss_and_gradients(model: Any, wrap: Any) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=2, **options))
        wrapped = wrap(adapted.train())
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return loss, {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}

    def share(adapted: Any) -> Any:
        share_no_stacks_(adapted)
        return DistributedDataParallel(adapted, find_unused_parameters=True)

    expected = loss_and_gradients(rounded_model(tiny_models[family]), lambda adapted: adapted)
    model = load_4bit(Checkpoint(tiny_models[family]), **CPU)
    open_experts_(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = loss_and_gradients(model, share)
    finally:
        torch.distributed.destroy_process_group()
    assert relative(found[0], expected[0]) < 1e-5
    assert found[1].keys() == expected[1].keys()
    assert any(".experts." in name for name in found[1])
    for name, gradient in found[1].items():
        assert relative(gradient, expected[1][name]) < 1e-5, name


def test_training_an_adapter_on_experts(pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    trainer = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    loram.train(
        pruned_models["qwen3_moe"],
        tmp_path / "adapter",
        data=rows_file,
        load_in_4bit=True,
        lora={"target_parameters": "experts"},
        trainer={**trainer, "gradient_checkpointing": True},
    )
    entries = [json.loads(line) for line in (tmp_path / "adapter" / "training_log.jsonl").read_text().splitlines()]
    assert entries[-1]["loss"] < entries[0]["loss"]
    plain, corrected = (tmp_path / name for name in ("plain", "corrected"))
    loram.recover(tmp_path / "adapter", plain)
    loram.recover(tmp_path / "adapter", corrected, correct=True)
    weights = load_file(plain / "adapter_model.safetensors"), load_file(corrected / "adapter_model.safetensors")
    changed = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert any(".experts." in name for name in changed)


def test_a_folder_whose_linears_transformers_quantised(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """transformers leaves the experts as they are there, but not the gates of shared experts."""
    base = Checkpoint(tiny_models["qwen2_moe"])
    options: Any = BitsAndBytesConfig(**quantization_config([]))
    AutoModelForCausalLM.from_pretrained(base.folder, quantization_config=options).save_pretrained(tmp_path)
    packed = Checkpoint(tmp_path)
    check_original(base, packed)
    stored, direct = load_4bit(packed, **CPU), load_4bit(base, **CPU)
    gates = [name for name, _ in direct.named_parameters() if name.endswith("shared_expert_gate.weight")]
    assert gates
    with torch.no_grad():
        for name in gates:
            assert torch.equal(stored.get_parameter(name), as_4bit(direct.get_parameter(name)))
            stored.get_parameter(name).copy_(direct.get_parameter(name))
        assert torch.equal(stored(input_ids=IDS).logits, direct(input_ids=IDS).logits)


def test_quantize_refuses_experts(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match="has no place for experts"):
        loram.quantize(tiny_models["qwen3_moe"], tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_experts_that_are_in_4_bits_already_are_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Older versions of transformers wrote such folders, when every expert's matrices were linears."""
    copytree(tiny_models["qwen3_moe"], tmp_path / "small")
    (tmp_path / "small" / "loram_manifest.json").unlink(missing_ok=True)
    weights = load_file(tmp_path / "small" / "model.safetensors")
    for name in [name for name in weights if ".experts." in name]:
        weights |= packed_tensors(name, weights[name])
    save_file(weights, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["quantization_config"] = quantization_config([])
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(loram.UserError, match="are in 4 bits; start from"):
        load_4bit(Checkpoint(tmp_path / "small"), **CPU)
