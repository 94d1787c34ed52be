"""Which adapters go with which model: adapters of plain PEFT, repeated weights of the base, and models in 4 bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEARS, make_model, relative
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import loram
from loram.compute.belonging import load_for
from loram.compute.original import check_original
from loram.disk.checkpoint import Checkpoint

TOKENS = torch.randint(5, 290, (2, 24), generator=torch.Generator().manual_seed(0))
HEAD = "base_model.model.lm_head.base_layer.weight"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS).logits


def trained(model: Any, folder: Path, *, saved: dict[str, Any] | None = None, **options: Any) -> torch.Tensor:
    """Train three steps with plain PEFT, save the adapter, and return the logits of the model with it."""
    torch.manual_seed(5)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **chosen))
    steps = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    if saved:  # PEFT converts an adapter by its first values
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(saved["path_initial_model_for_weight_conversion"])
    for _ in range(3):
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        steps.step()
        steps.zero_grad()
    found = logits(adapted)
    adapted.save_pretrained(folder, **(saved or {}))
    return found


PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_an_adapter_of_plain_peft_merges_to_what_it_was_trained_to_be(
    kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models["mistral"]
    expected = trained(load(base), tmp_path / "adapter", **PLAIN[kind])
    loram.merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert relative(logits(load(tmp_path / "merged")), expected) <= 1e-5
    assert relative(logits(load(base)), expected) > 1e-3


def test_pissa_is_refused_and_merges_once_peft_has_converted_it(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_models["mistral"]
    trained(load(base), tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(loram.UserError, match="path_initial_model_for_weight_conversion"):
        loram.merge(base, tmp_path / "pissa", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    saved = {"path_initial_model_for_weight_conversion": str(tmp_path / "first")}
    expected = trained(load(base), tmp_path / "converted", saved=saved, init_lora_weights="pissa")
    loram.merge(base, tmp_path / "converted", tmp_path / "merged")
    assert relative(logits(load(tmp_path / "merged")), expected) <= 1e-5


def change(folder: Path, name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of a folder's only safetensors file."""
    (path,) = folder.glob("*model.safetensors")
    tensors = load_file(path)
    save_file({**tensors, name: by(tensors[name]).contiguous()}, path, {"format": "pt"})


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("family", ["llama", "mistral"], ids=["tied", "untied"])
def test_an_lm_head_that_peft_saved_with_its_adapter_is_accepted_if_it_is_the_base_s(
    family: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    base, pruned, targets = tiny_models[family], pruned_models[family], ["q_proj", "lm_head"]
    expected = trained(load(base), tmp_path / "full", target_modules=targets)
    assert HEAD in load_file(tmp_path / "full" / "adapter_model.safetensors")
    loram.merge(base, tmp_path / "full", tmp_path / "merged")
    assert relative(logits(load(tmp_path / "merged")), expected) <= 1e-5
    reports = [
        loram.evaluate(base, adapter=tmp_path / "full", data=rows_file, stream=stream).loss for stream in (False, True)
    ]
    assert reports[0] == pytest.approx(reports[1], rel=1e-5)

    trained(loram.load_pruned(pruned, dtype=torch.float32), tmp_path / "small", target_modules=targets)
    loram.PruningPlan.load(pruned).save(tmp_path / "small")
    loram.recover(tmp_path / "small", tmp_path / "recovered")
    assert HEAD not in load_file(tmp_path / "recovered" / "adapter_model.safetensors")
    assert load_for(Checkpoint(base), tmp_path / "recovered").modules

    for folder in (tmp_path / "full", tmp_path / "small"):
        change(folder, HEAD, lambda weight: weight + 0.01)
    for refused in (
        lambda: loram.merge(base, tmp_path / "full", tmp_path / "out"),
        lambda: loram.evaluate(base, adapter=tmp_path / "full", data=rows_file),
        lambda: loram.recover(tmp_path / "small", tmp_path / "out"),
        lambda: loram.recover(tmp_path / "small", tmp_path / "out", base=base),
        lambda: loram.recover(tmp_path / "small", tmp_path / "out", pruned=pruned),
    ):
        with pytest.raises(loram.UserError, match=r"lm_head\.base_layer\.weight is not the .*save_embedding_layers"):
            refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_recovery_without_any_model_to_compare_a_saved_lm_head_with_says_what_to_name(
    tiny_models: dict[str, Path], pruned_models: dict[str, Path], tmp_path: Path
) -> None:
    pruned = shutil.copytree(pruned_models["mistral"], tmp_path / "pruned")
    base = shutil.copytree(tiny_models["mistral"], tmp_path / "base")
    small = tmp_path / "small"
    trained(loram.load_pruned(pruned, dtype=torch.float32), small, target_modules=["q_proj", "lm_head"])
    plan = loram.PruningPlan.load(pruned)
    reference = plan.base.model_copy(update={"name": str(tmp_path / "gone")})
    plan.model_copy(update={"base": reference}).save(small)
    (pruned / "loram_plan.json").unlink()
    moved = pruned.rename(tmp_path / "moved")
    with pytest.raises(loram.UserError, match=r"--pruned, or the full model with --base"):
        loram.recover(small, tmp_path / "out")
    (moved / "loram_manifest.json").unlink()
    loram.recover(small, tmp_path / "by_pruned", pruned=moved)
    loram.recover(small, tmp_path / "by_base", base=base)


def test_whole_tables_beside_the_factors_are_accepted_if_they_are_the_base_s(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base, model = tiny_models["mistral"], load(tiny_models["mistral"])
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert load_for(Checkpoint(base), tmp_path / "adapter").base_weights.keys() == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    change(tmp_path / "adapter", "base_model.model.model.embed_tokens.weight", lambda weight: weight[:-1])
    with pytest.raises(loram.UserError, match=r"embed_tokens\.weight is not the .* it was trained or resized"):
        load_for(Checkpoint(base), tmp_path / "adapter")


WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 8, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("wide") / "base", "mistral", tokenizer, **WIDE)


def in_4bit(base: Path, folder: Path, tokenizer: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """What transformers and bitsandbytes make of a model, as on the hub."""
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **options}
    config = BitsAndBytesConfig(**options)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def on_4bit(wide: Path, rows_file: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `nf4`, a model in 4 bits, and `adapter`, which was trained on it."""
    root = tmp_path_factory.mktemp("on_4bit")
    in_4bit(wide, root / "nf4", tokenizer)
    loram.train(root / "nf4", root / "adapter", data=rows_file, trainer={"max_steps": 2})
    return root


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"bnb_4bit_use_double_quant": True},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "bnb_4bit_use_double_quant": True},
    ],
    ids=str,
)
def test_a_model_in_4_bits_knows_its_original(made: dict[str, Any], wide: Path, tokenizer: Any, tmp_path: Path) -> None:
    packed = Checkpoint(in_4bit(wide, tmp_path / "nf4", tokenizer, **made))
    check_original(Checkpoint(wide), packed)
    other = make_model(tmp_path / "other", "mistral", tokenizer, seed=1, **WIDE)
    with pytest.raises(loram.UserError, match=r"other: not the original of .*nf4"):
        check_original(Checkpoint(other), packed)


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("model.layers.1.mlp.up_proj.weight", lambda weight: weight.index_fill(0, torch.tensor([7]), 0.0)),
        ("model.layers.1.mlp.up_proj.weight", lambda weight: weight[:-1]),
        ("model.layers.2.self_attn.o_proj.weight", lambda weight: weight.T),
        ("model.norm.weight", lambda weight: weight * 1.01),
        ("model.embed_tokens.weight", lambda weight: weight.flip(0)),
    ],
)
def test_a_model_that_differs_in_one_tensor_is_not_the_original(
    name: str, by: Callable[[torch.Tensor], torch.Tensor], wide: Path, on_4bit: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(wide, tmp_path / "other")
    change(other, name, by)
    with pytest.raises(loram.UserError, match=rf"not the original of .*: {name} differs"):
        loram.merge(other, on_4bit / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_4_bit_model_goes_with_its_original(
    wide: Path, on_4bit: Path, rows_file: Path, tmp_path: Path
) -> None:
    adapter = on_4bit / "adapter"
    loram.merge(wide, adapter, tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(load(wide), adapter))
    assert relative(logits(load(tmp_path / "merged")), expected) <= 1e-5
    assert loram.evaluate(wide, adapter=adapter, data=rows_file).loss == pytest.approx(
        loram.evaluate(tmp_path / "merged", data=rows_file).loss, rel=1e-5
    )
    with pytest.raises(loram.UserError, match=r"quantised .*take its original"):
        loram.merge(on_4bit / "nf4", adapter, tmp_path / "out")


def test_an_adapter_of_a_4_bit_model_is_recovered_to_its_original_and_then_needs_no_other(
    wide: Path, on_4bit: Path, rows_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    root = shutil.copytree(on_4bit, tmp_path / "moved")
    adapter, nf4 = root / "adapter", root / "nf4"
    shutil.rmtree(on_4bit / "nf4")
    try:
        with pytest.raises(loram.UserError, match=r"loram recover ADAPTER OUT --base \S+ --pruned"):
            loram.merge(wide, adapter, tmp_path / "merged")
        with pytest.raises(loram.UserError, match="name its original with --base"):
            loram.recover(adapter, tmp_path / "recovered")
        other = make_model(tmp_path / "other", "mistral", tokenizer, seed=1, **WIDE)
        with pytest.raises(loram.UserError, match="not the original"):
            loram.recover(adapter, tmp_path / "recovered", base=other, pruned=nf4)
        with pytest.raises(loram.UserError, match="correction and multiplier need one"):
            loram.recover(adapter, tmp_path / "recovered", base=wide, pruned=nf4, correct=True)
        assert not (tmp_path / "recovered").exists()
        loram.recover(adapter, tmp_path / "recovered", base=wide, pruned=nf4)
    finally:
        shutil.copytree(nf4, on_4bit / "nf4")
    shutil.rmtree(nf4)
    config = json.loads((tmp_path / "recovered" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(wide)
    loram.merge(wide, tmp_path / "recovered", tmp_path / "merged")
    with pytest.raises(loram.UserError, match="fingerprint"):
        loram.merge(other, tmp_path / "recovered", tmp_path / "out")


def test_an_adapter_of_a_full_model_in_16_bits_has_nothing_to_recover(
    wide: Path, rows_file: Path, tmp_path: Path
) -> None:
    loram.train(wide, tmp_path / "adapter", data=rows_file, trainer={"max_steps": 1})
    with pytest.raises(loram.UserError, match="is for a full model already"):
        loram.recover(tmp_path / "adapter", tmp_path / "out", base=wide)
