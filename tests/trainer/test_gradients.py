"""What should train and gets no gradient is an error that names it; 4-bit weights always hand gradients on."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import Trainer

import loram
from loram.disk.adapter import Adapter
from loram.trainer.guard import MissingGradientError, check_gradients

STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3}


@pytest.fixture
def avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes see a CPU with AVX512-BF16, where it packs 4-bit weights anew: that is an error here."""
    modules: Any = bitsandbytes.nn.modules

    def pack(*_: Any) -> None:
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", pack)


@pytest.mark.usefixtures("avx512_bf16")
@pytest.mark.parametrize(
    "options",
    [{"lora": {"init_lora_weights": "eva"}}, {"anchor_steps": 1, "anchor_gradients": False}],
    ids=["EVA", "anchors without gradients"],
)
def test_4_bit_weights_stay_as_they_are_packed(
    options: dict[str, Any], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    out = loram.train(
        pruned_models["llama"], tmp_path / "out", data=rows_file, load_in_4bit=True, trainer=STEPS, **options
    )
    factors = Adapter.load(out).tensors
    assert all(tensor.any() for name, tensor in factors.items() if "lora_B" in name)


@pytest.mark.usefixtures("avx512_bf16")
def test_a_quantised_folder_of_any_width_is_evaluated(tokenizer: Any, rows_file: Path, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen3", tokenizer, hidden_size=64)
    loram.prune(base, tmp_path / "pruned", ratio=0.65, criterion="magnitude", keep_first=2, keep_last=1)
    plain = loram.evaluate(tmp_path / "pruned", data=rows_file, device="cpu")
    quantised = loram.quantize(tmp_path / "pruned", tmp_path / "quantised")
    assert loram.evaluate(quantised, data=rows_file, device="cpu").loss == pytest.approx(plain.loss, rel=0.1)


def test_a_parameter_without_a_gradient_stops_the_training_and_is_named(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, lost = Trainer.training_step, "model.layers.1.mlp.up_proj.lora_B"

    def training_step(self: Trainer, network: Any, *args: Any, **options: Any) -> Any:
        loss = step(self, network, *args, **options)
        network.get_submodule(f"base_model.model.{lost}.default").weight.grad = None
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(MissingGradientError, match=rf"step 1: {lost}\.weight should train but got no gradient"):
        loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, trainer=STEPS)
    assert list(tmp_path.iterdir()) == []


def test_a_training_whose_gradients_are_all_zero_stops(tokenizer: Any, rows_file: Path, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama", tokenizer, tie_word_embeddings=False)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"].zero_()  # then no gradient comes down from the loss
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(MissingGradientError, match="the gradient of every parameter is zero"):
        loram.train(base, tmp_path / "out", data=rows_file, trainer=STEPS)


def test_single_gradients_may_be_zero_but_not_missing() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    a.grad, b.grad = torch.zeros(2), torch.ones(2)
    assert check_gradients({"a": a, "b": b}, 1) == {"a": a.grad, "b": b.grad}
    a.grad = b.grad = None
    with pytest.raises(MissingGradientError, match="step 3: a should train but got no gradient, and so did 1 others"):
        check_gradients({"a": a, "b": b}, 3)
