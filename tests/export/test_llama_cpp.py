"""Exported adapters in llama.cpp itself, on GGUF files of their bases: its predictions are PEFT's."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import make_model, random_adapter
from helpers import LlamaCpp, log_probabilities
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import loram

pytest.importorskip("xllamacpp", reason="llama.cpp as a wheel is not installed (make test installs it)")
TOKENS = [5, 100, 17, 250, 33, 9, 211, 77, 140, 12]


def with_adapter(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def write_llama(base: Path, path: Path) -> Path:
    """A tiny llama as a GGUF file, written as llama.cpp's converter does."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += [f"unused {number}" for number in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a tiny llama, as `base` and `base.gguf`."""
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "base", "llama", tokenizer, attention_bias=False, mlp_bias=False, num_hidden_layers=3)
    write_llama(root / "base", root / "base.gguf")
    return root


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}, {"use_dora": True}],
    ids=["plain", "patterns", "dora"],
)
def test_a_tiny_llama_predicts_what_peft_does(tiny: Path, options: dict[str, Any], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny / "base")
    before = log_probabilities(base, TOKENS)
    adapter = random_adapter(base, tmp_path / "adapter", **options)
    expected = log_probabilities(with_adapter(tiny / "base", adapter), TOKENS)
    assert (expected - before).abs().max() > 1
    ways = []
    if not options.get("use_dora"):
        loram.export_adapter(adapter, tmp_path / "lora", to="gguf-lora")
        ways.append(LlamaCpp(tiny / "base.gguf", tmp_path / "lora" / "adapter.gguf"))
    loram.export_adapter(adapter, tmp_path / "merged", to="gguf", base_gguf=tiny / "base.gguf", outtype="f32")
    ways.append(LlamaCpp(tmp_path / "merged" / "model.gguf"))
    for way in ways:  # llama.cpp keeps keys and values in 16 bits
        assert (way.log_probabilities(TOKENS, 320) - expected).abs().max() <= 0.01


def test_what_the_adapter_leaves_is_copied(tiny: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny / "base")
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=["up_proj"])
    loram.export_adapter(adapter, tmp_path / "out", to="gguf", base_gguf=tiny / "base.gguf")
    before, after = (gguf.GGUFReader(path) for path in (tiny / "base.gguf", tmp_path / "out" / "model.gguf"))
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    for ours, theirs in zip(after.tensors, before.tensors, strict=True):
        if "ffn_up" in ours.name:
            assert ours.tensor_type == gguf.GGMLQuantizationType.F16
        else:
            assert ours.data.tobytes() == theirs.data.tobytes()
    changed = {"general.file_type"}
    for key, field in before.fields.items():
        assert (after.fields[key].contents() == field.contents()) != (key in changed), key


def test_another_family_s_file_is_refused(tiny: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"])
    adapter = random_adapter(base, tmp_path / "adapter")
    with pytest.raises(loram.UserError, match=r"general\.architecture is llama, and the adapter's base is a qwen3"):
        loram.export_adapter(adapter, tmp_path / "out", to="gguf", base_gguf=tiny / "base.gguf")
    assert not (tmp_path / "out").exists()
