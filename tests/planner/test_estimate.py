"""Counts: the paper's to the last digit, and transformers' own for every family."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_FAMILY, EXPERTS, FAMILIES, HYBRID_EXPERTS, ODDITIES, SIZES, WRAPPED
from transformers import AutoConfig, AutoModelForCausalLM

import loram
from loram.model.plan import PruningPlan

LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("vocabulary", "full", "pruned"),
    [(32000, 68_976_648_192, 16_272_924_672), (128256, 70_553_706_496, 17_849_982_976)],
    ids=["llama-2", "llama-3.1"],
)
def test_the_papers_70b_counts(vocabulary: int, full: int, pruned: int) -> None:
    found = loram.estimate({**LLAMA_70B, "vocab_size": vocabulary}, ratio=0.85)
    assert (found.parameters, found.pruned_parameters) == (full, pruned)
    assert found.parameter_reduction == full / pruned
    assert found.units == {"kv_groups": 2, "channels": 4300}


COUNTED = (*EVERY_FAMILY, *EXPERTS, *HYBRID_EXPERTS)
# transformers builds no HunYuan model whose config leaves head_dim out, and no OLMoE that works with another one
DEFAULTS = [family for family in COUNTED if family not in ("hunyuan_v1_dense", "olmoe")]


def meta_parameters(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", COUNTED)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}], ids=str)
def test_full_counts_are_transformers_own(family: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **{**SIZES, **ODDITIES[family], **changes})
    found = loram.estimate(config.to_dict(), ratio=0.5, keep_first=1, keep_last=1)
    assert found.parameters == meta_parameters(config)


@pytest.mark.parametrize("family", DEFAULTS)
def test_a_sparse_config_gets_the_familys_defaults(family: str) -> None:
    """Many files on the hub hold only what differs from the defaults."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    config = AutoConfig.for_model(family, **sizes)
    sparse = {"model_type": family, **sizes}
    found = loram.estimate(sparse, ratio=0.5, keep_first=1, keep_last=1)
    assert found.parameters == meta_parameters(config)
    assert loram.estimate(config.to_diff_dict() | sparse, ratio=0.5, keep_first=1, keep_last=1) == found


@pytest.mark.parametrize("model_type", WRAPPED)
def test_of_a_wrapped_model_the_text_model_is_counted(model_type: str) -> None:
    family = WRAPPED[model_type][0]
    text = AutoConfig.for_model(family, **{**SIZES, **ODDITIES[family]})
    config = {"model_type": model_type, "text_config": text.to_dict(), "vision_config": {"hidden_size": 16}}
    found = loram.estimate(config, ratio=0.5, keep_first=1, keep_last=1)
    assert found.parameters == meta_parameters(text)
    assert (found.model_type, found.wrapper) == (family, model_type)
    expected = loram.estimate(text.to_dict(), ratio=0.5, keep_first=1, keep_last=1)
    assert found.model_copy(update={"wrapper": None}) == expected


def test_gemma_3_4b_is_counted_from_the_hubs_config() -> None:
    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text = {**sizes, "model_type": "gemma3_text", "sliding_window": 1024}
    found = loram.estimate({"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": text})
    assert found.parameters == meta_parameters(AutoConfig.for_model(**text)) == 3_880_263_168


@pytest.mark.parametrize("family", DEFAULTS)
@pytest.mark.parametrize("dropped", ["num_key_value_heads", "head_dim", "tie_word_embeddings"])
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str, dropped: str) -> None:
    # 64 heads: more than any family's own number of key-value heads, and a whole multiple of it
    sizes = {**SIZES, "hidden_size": 128, "num_attention_heads": 64, "tie_word_embeddings": True}
    del sizes[dropped]
    found = loram.estimate({"model_type": family, **sizes}, ratio=0.5, keep_first=1, keep_last=1)
    assert found.parameters == meta_parameters(AutoConfig.for_model(family, **sizes))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_that_transformers_writes(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **{**SIZES, **ODDITIES[family]})
    config.save_pretrained(tmp_path)
    found = loram.estimate(tmp_path, ratio=0.5, keep_first=1, keep_last=1)
    assert found.parameters == meta_parameters(config)
    assert loram.estimate(str(tmp_path / "config.json"), ratio=0.5, keep_first=1, keep_last=1) == found


def test_a_config_without_key_value_heads_has_one_for_each_head() -> None:
    config = {key: value for key, value in LLAMA_70B.items() if key != "num_key_value_heads"}
    assert loram.estimate(config, ratio=0.85).units["kv_groups"] == 10  # ceil(64 * 0.15)


@pytest.mark.parametrize("family", COUNTED)
def test_pruned_counts_are_those_of_the_real_plan(family: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    loram.prune(tiny_models[family], tmp_path / "out", ratio=0.7, criterion="random", keep_first=1, keep_last=2)
    found = loram.estimate(tiny_models[family], ratio=0.7, keep_first=1, keep_last=2)
    assert (found.parameters, found.pruned_parameters) == PruningPlan.load(tmp_path / "out").parameters()
    model = loram.load_pruned(tmp_path / "out")
    assert found.pruned_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"model_type": "gpt2"},
            {},
            "'gpt2' is not supported; supported families are llama, mistral, qwen2, qwen3, gemma2, gemma3_text",
        ),
        ({"hidden_size": None}, {}, "hidden_size"),
        ({"vocab_size": "many"}, {}, "config: vocab_size: "),
        ({"num_key_value_heads": 0}, {}, "num_key_value_heads"),
        ({"num_attention_heads": 0}, {}, "num_attention_heads"),
        ({"head_dim": 0}, {}, "head_dim"),
        ({"model_type": "loram_llama"}, {}, "already pruned"),
        ({"num_attention_heads": 63}, {}, "not a multiple"),
        ({}, {"ratio": 0.0}, "between 0 and 1"),
        ({}, {"ratio": 1.0}, "between 0 and 1"),
        ({}, {"ratio": 0.99999}, "leaves none of 28672 channels"),
        ({}, {"keep_first": 50, "keep_last": 30}, "leave no layer of 80"),
        ({}, {"keep_first": -1}, "keep_first -1"),
    ],
    ids=str,
)
def test_bad_input(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(loram.UserError, match=message):
        loram.estimate({**LLAMA_70B, **changes}, **{"ratio": 0.85, **options})


@pytest.mark.parametrize("key", [key for key in LLAMA_70B if key not in ("num_key_value_heads", "tie_word_embeddings")])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(loram.UserError, match=key):
        loram.estimate({name: value for name, value in LLAMA_70B.items() if name != key}, ratio=0.85)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(loram.UserError, match=r"config\.json: not valid JSON"):
        loram.estimate(tmp_path, ratio=0.5)
    with pytest.raises(loram.UserError, match="no such file or folder"):
        loram.estimate(tmp_path / "none.json", ratio=0.5)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv[0] = 'loram'\nfrom loram.planner import estimate\n"
        f"print(estimate({LLAMA_70B!r}, ratio=0.85).pruned_parameters)\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "16272924672\n"), done.stderr
