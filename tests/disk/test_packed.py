"""Checkpoints in FP8 and MXFP4 are read as the dense model that transformers makes of them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_wrapped, random_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import loram
from loram.compute.loading import load_model
from loram.disk import packed
from loram.disk.checkpoint import Checkpoint
from loram.disk.tensorfile import StoredTensor, TensorFile, TensorSpec
from loram.model.packing import Packing, packing_of

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
ROW = "model.layers.1.mlp.up_proj.weight"
PRUNING = {"ratio": 0.5, "keep_first": 1, "keep_last": 1}
SHORT = {"max_steps": 1, "per_device_train_batch_size": 2}


def quantised(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in FP8, its scales, and what the two stand for, in bfloat16."""
    grid = [math.ceil(size / part) for size, part in zip(weight.shape, block, strict=True)]
    scales = torch.zeros(grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            part = weight[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            scales[row, column] = part.abs().max() / 448
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    spread = spread[: weight.shape[0], : weight.shape[1]]
    values = (weight / spread).to(torch.float8_e4m3fn)
    return values, scales, (values.float() * spread).bfloat16()


def in_fp8(base: Path, folder: Path, block: tuple[int, int] = (128, 128), text: str = "model.") -> tuple[Path, Path]:
    """A model with its text model's linears in FP8, and its dense twin in bfloat16."""
    stored, dense = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        stored[name] = dense[name] = tensor.bfloat16()
        if name.startswith(f"{text}layers.") and tensor.ndim == 2 and not name.endswith("mlp.gate.weight"):
            stored[name], stored[f"{name}_scale_inv"], dense[name] = quantised(tensor, block)
    return twins(base, folder, stored, dense, {**FP8, "weight_block_size": list(block)})


def in_mxfp4(base: Path, folder: Path) -> tuple[Path, Path]:
    """A gpt-oss with random experts in MXFP4, and its dense twin in bfloat16."""
    dense = {name: tensor.bfloat16() for name, tensor in weights(base).items()}
    stored = dict(dense)
    for name in [name for name in dense if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        grid = (experts, outputs, inputs // 32)
        blocks, scales = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8), torch.randint(118, 125, grid)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales.to(torch.uint8)}
        dense[name] = convert_moe_packed_tensors(blocks, scales)
    return twins(base, folder, stored, dense, {"quant_method": "mxfp4"})


def twins(
    base: Path, folder: Path, stored: dict[str, Tensor], dense: dict[str, Tensor], packing: dict[str, Any]
) -> tuple[Path, Path]:
    config, folders = {**json.loads((base / "config.json").read_text()), "dtype": "bfloat16"}, []
    for kind, tensors, more in (("packed", stored, {"quantization_config": packing}), ("dense", dense, {})):
        folders.append(shutil.copytree(base, folder / kind))
        save_file(tensors, folders[-1] / "model.safetensors", {"format": "pt"})
        (folders[-1] / "config.json").write_text(json.dumps({**config, **more}))
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama in FP8 whose linears are no multiples of its blocks, and its dense twin."""
    root = tmp_path_factory.mktemp("fp8")
    base = make_model(root / "base", "llama", tokenizer, hidden_size=160, intermediate_size=136, num_hidden_layers=4)
    return in_fp8(base, root)


@pytest.fixture(scope="module")
def gpt_oss(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny gpt-oss in MXFP4, and its dense twin."""
    root = tmp_path_factory.mktemp("mxfp4")
    sizes = {"intermediate_size": 32, "num_hidden_layers": 3, "layer_types": None}
    return in_mxfp4(make_model(root / "base", "gpt_oss", tokenizer, **sizes), root)


@pytest.fixture(scope="module")
def qwen3_moe(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny mixture in FP8 with one tensor per expert, and its dense twin."""
    root = tmp_path_factory.mktemp("experts")
    return in_fp8(make_model(root / "base", "qwen3_moe", tokenizer), root, (16, 16))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def shown(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def test_fp8_is_shown_as_its_dense_twin(llama: tuple[Path, Path]) -> None:
    fp8, dense = Checkpoint(llama[0]), Checkpoint(llama[1])
    assert same(shown(llama[0]), weights(llama[1]))
    assert fp8.names() == dense.names()
    assert {name: fp8.spec(name) for name in fp8.names()} == {name: dense.spec(name) for name in dense.names()}
    assert fp8.config == dense.config
    assert not fp8.quantized
    assert fp8.parameters == dense.parameters


def test_weights_in_fp8_are_what_transformers_makes_of_them(tokenizer: Any, tmp_path: Path) -> None:
    """transformers divides each size by its number of blocks, so sizes are multiples of the blocks here."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 2}
    fp8, _ = in_fp8(make_model(tmp_path / "base", "qwen3", tokenizer, **sizes), tmp_path)
    config = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(fp8, quantization_config=config, dtype=torch.bfloat16)
    assert same(shown(fp8), theirs.state_dict())
    assert same(load_model(Checkpoint(fp8), dtype=torch.bfloat16).state_dict(), theirs.state_dict())


def test_weights_in_mxfp4_are_what_transformers_makes_of_them(gpt_oss: tuple[Path, Path]) -> None:
    options = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(gpt_oss[0], **options).state_dict()
    assert same(shown(gpt_oss[0]), theirs)
    assert same(shown(gpt_oss[1]), theirs)


def test_every_byte_of_mxfp4(tmp_path: Path) -> None:
    values, scales = torch.meshgrid(torch.arange(256), torch.arange(255), indexing="ij")  # 255 stands for no number
    blocks = values.to(torch.uint8).reshape(3, -1, 5, 1).repeat(1, 1, 1, 16)
    scales = scales.to(torch.uint8).reshape(3, -1, 5)
    save_file({"experts_blocks": blocks, "experts_scales": scales}, tmp_path / "file")
    packing = packing_of({"quantization_config": {"quant_method": "mxfp4"}}, "config.json")
    assert packing is not None
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        experts = packed.unpacked(stored_in(tmp_path / "file"), packing, dtype)["experts"]
        expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert torch.equal(experts.read(), expected)
        assert torch.equal(experts.read(1, 2), expected[1:2])


def test_the_fingerprint_of_mxfp4_is_of_what_is_stored(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name, fingerprints = "model.layers.0.mlp.experts.down_proj", set()
    for expert in (0, 1):
        blocks, scales = torch.zeros(2, 4, 3, 16, dtype=torch.uint8), torch.full((2, 4, 3), 127, dtype=torch.uint8)
        scales[expert, 2, 1] = 128
        save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
        checkpoint = Checkpoint(tmp_path)
        assert checkpoint.names() == [name]
        assert checkpoint.spec(name) == TensorSpec(dtype=torch.bfloat16, shape=(2, 96, 4))
        fingerprints.add(checkpoint.fingerprint)
    assert len(fingerprints) == 2


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int] | None, torch.dtype]] = {
    "tensor": ((40, 70), (), None, torch.float32),
    "one": ((40, 70), (1,), None, torch.bfloat16),
    "rows": ((40, 70), (40,), None, torch.float32),
    "channel": ((40, 70), (40, 1), None, torch.bfloat16),
    "blocks": ((40, 70), (3, 5), (16, 16), torch.float32),
    "groups": ((40, 64), (40, 2), (1, 32), torch.float8_e8m0fnu),
    "bytes": ((40, 64), (40, 2), (1, 32), torch.uint8),
    "experts": ((5, 40, 70), (5, 3, 5), (16, 16), torch.float32),
    "one per expert": ((5, 40, 70), (5, 1, 1), None, torch.float32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_bytes", [1 << 26, 500])
def test_any_rows_of_any_layout(layout: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "BLOCK_BYTES", block_bytes)
    shape, grid, block, dtype = LAYOUTS[layout]
    torch.manual_seed(0)
    values = torch.randn(shape).to(torch.float8_e4m3fn)
    exponents = torch.randint(100, 150, grid)
    scales = torch.exp2(exponents - 127.0) * (1 if dtype.itemsize == 1 else 1.5)
    expected, spread = values.float(), scales.view(*grid, *[1] * (len(shape) - len(grid)))
    for axis, size in enumerate(shape):
        if 1 < spread.shape[axis] < size:
            assert block is not None
            spread = spread.repeat_interleave(block[axis - len(shape)], axis).narrow(axis, 0, size)
    expected = (expected * spread).bfloat16()
    stored = exponents.to(torch.uint8) if dtype == torch.uint8 else scales.to(dtype)
    save_file({"a.weight": values, "a.weight_scale": stored, "a.input_scale": torch.ones(1)}, tmp_path / "file")
    weights = packed.unpacked(stored_in(tmp_path / "file"), Packing(bits=8, block=block), torch.bfloat16)
    assert list(weights) == ["a.weight"]
    for start, stop in [(0, None), (1, 3), (2, 2), (shape[0] - 1, shape[0]), (3, 99)]:
        assert torch.equal(weights["a.weight"].read(start, stop), expected[start:stop])
    assert torch.equal(torch.cat([rows for _, rows in weights["a.weight"].blocks()]), expected)


def stored_in(path: Path) -> dict[str, StoredTensor]:
    file = TensorFile(path)
    return {name: StoredTensor(file=file, name=name) for name in file.specs}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{ROW}_scale_inv"), rf"{ROW} is torch.float8_e4m3fn, and of its values and scales only one"),
        (
            lambda t: t.update({f"{ROW}_scale_inv": torch.ones(3, 2)}),
            r"_scale_inv of shape \(3, 2\) does not fit .*up_proj",
        ),
        (lambda t: t.update({f"{ROW}_scale_inv": torch.ones(2, 2, 1)}), r"shape \(2, 2, 1\) does not fit"),
    ],
    ids=["missing", "another grid", "another rank"],
)
def test_scales_that_do_not_fit_are_refused(
    change: Any, message: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, tensors = shutil.copytree(llama[0], tmp_path / "broken"), weights(llama[0])
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(loram.UserError, match=message):
        Checkpoint(folder)


def test_the_fingerprint_is_of_what_is_stored(llama: tuple[Path, Path], tmp_path: Path) -> None:
    fingerprint = Checkpoint(llama[0]).fingerprint
    assert fingerprint != Checkpoint(llama[1]).fingerprint
    folder, tensors = shutil.copytree(llama[0], tmp_path / "copy"), weights(llama[0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    assert Checkpoint(folder).spec(ROW).dtype == torch.float32
    assert Checkpoint(folder).fingerprint == fingerprint
    tensors[f"{ROW}_scale_inv"][0, 0] *= 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert Checkpoint(folder).fingerprint != fingerprint


@pytest.mark.parametrize("model", ["llama", "qwen3_moe", "gpt_oss"])
def test_stages_on_packed_weights_give_what_they_give_on_the_dense_twin(
    model: str, request: pytest.FixtureRequest, rows_file: Path, tmp_path: Path
) -> None:
    two: tuple[Path, Path] = request.getfixturevalue(model)
    dense = AutoModelForCausalLM.from_pretrained(two[1])
    adapter = random_adapter(dense, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    made: list[dict[str, Any]] = []
    for base in two:
        pruned, merged = tmp_path / base.name / "pruned", tmp_path / base.name / "merged"
        loram.prune(base, pruned, criterion="taylor", calibration=rows_file, calibration_samples=4, **PRUNING)
        loram.merge(base, adapter, merged)
        losses = [loram.evaluate(base, adapter=adapter, data=rows_file, stream=stream).loss for stream in (True, False)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        configs = [(folder / "config.json").read_text() for folder in (pruned, merged)]
        made.append({"pruned": weights(pruned), "merged": weights(merged), "losses": losses, "configs": configs})
    of_packed, of_dense = made
    assert same(shown(two[0]), shown(two[1]))
    assert same(of_packed["pruned"], of_dense["pruned"])
    assert same(of_packed["merged"], of_dense["merged"])
    assert not same(of_packed["merged"], weights(two[1]))
    assert of_packed["losses"] == of_dense["losses"]
    assert of_packed["configs"] == of_dense["configs"]


def test_training_the_weights_of_an_fp8_model_makes_a_dense_one(
    llama: tuple[Path, Path], rows_file: Path, tmp_path: Path
) -> None:
    trained = loram.train(llama[0], tmp_path / "trained", data=rows_file, method="full", trainer=SHORT)
    assert Checkpoint(trained).config == Checkpoint(llama[1]).config
    assert {name: tensor.dtype for name, tensor in weights(trained).items()} == {
        name: tensor.dtype for name, tensor in weights(llama[1]).items()
    }
    AutoModelForCausalLM.from_pretrained(trained)


def test_an_fp8_model_goes_into_4_bits_as_its_dense_twin(llama: tuple[Path, Path], tmp_path: Path) -> None:
    small, twin = loram.quantize(llama[0], tmp_path / "small"), loram.quantize(llama[1], tmp_path / "twin")
    assert same(weights(small), weights(twin))
    assert (small / "config.json").read_text() == (twin / "config.json").read_text()
    assert Checkpoint(small).quantized
    assert Checkpoint(small).fingerprint == Checkpoint(llama[0]).fingerprint


def test_a_wrapped_model_in_fp8(tokenizer: Any, rows_file: Path, tmp_path: Path) -> None:
    base = make_wrapped(tmp_path / "base", "mistral3", tokenizer)
    fp8, dense = in_fp8(base, tmp_path, (16, 16), "model.language_model.")
    assert same(shown(fp8), shown(dense))
    assert fp8.joinpath("config.json").read_text() != dense.joinpath("config.json").read_text()
    loram.prune(fp8, tmp_path / "pruned", criterion="magnitude", **PRUNING)
    adapter = loram.train(tmp_path / "pruned", tmp_path / "adapter", data=rows_file, trainer=SHORT)
    recovered = loram.recover(adapter, tmp_path / "recovered")
    merged = loram.merge(fp8, recovered, tmp_path / "merged")
    tensors, twin = weights(merged), weights(dense)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {n: tensor.dtype for n, tensor in twin.items()}
    towers = {name for name in twin if "language_model" not in name}
    assert all(torch.equal(tensors[name], twin[name]) for name in towers)
    assert json.loads((merged / "config.json").read_text()) == json.loads((dense / "config.json").read_text())


def test_other_formats_are_refused_by_every_stage(llama: tuple[Path, Path], rows_file: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama[1], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    for stage in (
        lambda: loram.prune(folder, tmp_path / "out", criterion="magnitude", **PRUNING),
        lambda: loram.train(folder, tmp_path / "out", data=rows_file),
        lambda: loram.evaluate(folder, data=rows_file),
        lambda: loram.quantize(folder, tmp_path / "out"),
        lambda: loram.merge(folder, tmp_path / "adapter", tmp_path / "out"),
        lambda: loram.estimate(folder),
    ):
        with pytest.raises(loram.UserError, match=r"quantization_config\.quant_method is 'gptq', and not one of fp8"):
            stage()
    assert not (tmp_path / "out").exists()
