"""Merging: what plain transformers loads equals PEFT's model with the adapter."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, LINEARS, make_model, own_names, random_adapter, relative, targets_of
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import loram
from loram.disk.checkpoint import Checkpoint
from loram.disk.tensorfile import TensorFile

TOKENS = torch.arange(3, 15)[None]


def adapter_for(base: Path, folder: Path, **options: Any) -> Path:
    return random_adapter(AutoModelForCausalLM.from_pretrained(base), folder, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS).logits


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"up_proj": 3}, "rank_pattern": {"q_proj": 2}},
        {"target_modules": [*LINEARS, "lm_head"]},
    ],
    ids=["plain", "patterns", "lm_head"],
)
def test_merged_equals_base_with_adapter(
    family: str, options: dict[str, Any], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models[family]
    adapter = adapter_for(base, tmp_path / "adapter", **own_names(family, options))
    loram.merge(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    found = logits(merged)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    embedding = "model.embed_tokens.weight"  # tied or not, an adapter on lm_head must not reach the embedding
    assert torch.equal(merged.state_dict()[embedding], Checkpoint(base).tensor(embedding))
    tokenizer_files = {path.name for path in base.glob("tokenizer*")}
    assert tokenizer_files <= {path.name for path in (tmp_path / "merged").iterdir()}


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 26])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_by_rows_equals_peft_s_own_merge(
    family: str, block_bytes: int, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, starts = tiny_models[family], []
    blocks = TensorFile.blocks

    def small_blocks(self: TensorFile, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        for start, block in blocks(self, name, block_bytes):
            starts.append(start)
            yield start, block

    # not lm_head where it is tied: PEFT's merge changes the embedding with it
    targets = targets_of(family, *([] if Checkpoint(base).tied else ["lm_head"]))
    options = {"target_modules": targets, "use_rslora": True, "rank_pattern": {"o_proj": 2}}
    adapter = adapter_for(base, tmp_path / "adapter", **options)
    monkeypatch.setattr(TensorFile, "blocks", small_blocks)
    loram.merge(base, adapter, tmp_path / "merged")
    assert max(starts, default=0) == {1: 319, 1000: 315, 1 << 26: 0}[block_bytes]  # 320 rows of 128 bytes

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    # row by row a product is rounded otherwise than as a whole, and five layers carry that on
    assert relative(logits(merged), logits(whole)) <= (1e-6 if block_bytes == 1 << 26 else 1e-5)
    for name, weight in whole.state_dict().items():
        assert relative(merged.state_dict()[name], weight) <= 1e-6, name


def test_a_pruned_model_merges_with_its_own_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    loram.prune(tiny_llama, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    adapter = adapter_for(tmp_path / "pruned", tmp_path / "adapter")
    loram.merge(tmp_path / "pruned", adapter, tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(loram.load_pruned(tmp_path / "pruned"), adapter))
    assert torch.allclose(logits(loram.load_pruned(tmp_path / "merged")), expected, atol=1e-5)


def test_an_unrecovered_adapter_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    loram.prune(tiny_llama, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    adapter = adapter_for(tmp_path / "pruned", tmp_path / "adapter")
    with pytest.raises(loram.UserError, match="run `loram recover`"):
        loram.merge(tiny_llama, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_made_for_other_weights_is_refused(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    other = make_model(tmp_path / "other", "llama", tokenizer, seed=1)  # same shapes, other weights
    loram.prune(other, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    loram.train(tmp_path / "pruned", tmp_path / "adapter", data=rows_file, trainer={"max_steps": 1})
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    with pytest.raises(loram.UserError, match="fingerprint"):
        loram.merge(tiny_llama, tmp_path / "recovered", tmp_path / "merged")


def test_dtype_of_the_base_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    loram.merge(tmp_path / "base", adapter_for(tiny_llama, tmp_path / "adapter"), tmp_path / "merged")
    checkpoint = Checkpoint(tmp_path / "merged")
    assert {checkpoint.tensor(name).dtype for name in checkpoint.names()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
