"""A pruned folder loads wherever it should, and gives a clear error where it cannot."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, HYBRIDS, NEAR_LLAMA, ODDITIES, SIZES, elsewhere, make_model
from transformers import AutoConfig, AutoModelForCausalLM

import loram
from loram.compute.loading import load_model
from loram.disk.checkpoint import Checkpoint
from loram.model.modeling_loram import older_rope_keys, pruned_classes

TOKENS = torch.arange(3, 15)[None]


REMOTE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
result = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        result[folder] = model(torch.arange(3, 15)[None]).logits.sum().item()
    if model.config.model_type == "loram_llama":
        from peft import IA3Config, LoraConfig, get_peft_model  # after the model, and without target modules
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
        assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}
        get_peft_model(adapted.unload(), IA3Config(task_type="CAUSAL_LM"))
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
print(json.dumps(result))
"""


def test_trust_remote_code_loads_where_loram_is_not_imported(pruned_models: dict[str, Path], tmp_path: Path) -> None:
    folders = [pruned_models[family] for family in (*FAMILIES, "olmo2")]  # one with norms over all heads too
    done = elsewhere(REMOTE, *map(str, folders), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout)
    for folder in folders:
        with torch.inference_mode():
            ours = loram.load_pruned(folder).eval()(TOKENS).logits.sum().item()
        assert losses[str(folder)] == pytest.approx(ours, rel=1e-5)


def test_without_loram_and_without_trust_it_fails_loudly(pruned_models: dict[str, Path], tmp_path: Path) -> None:
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = elsewhere(code, str(pruned_models["llama"]), cwd=tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_loading_as_the_plain_family_fails_loudly(pruned_models: dict[str, Path], tmp_path: Path) -> None:
    code = "import sys; from transformers import LlamaForCausalLM as A; A.from_pretrained(sys.argv[1])"
    assert elsewhere(code, str(pruned_models["llama"]), cwd=tmp_path).returncode != 0


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_class_loads_once_loram_is_imported(family: str, pruned_models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned_models[family])
    assert type(model).__name__.startswith("Loram")
    plan = loram.PruningPlan.load(pruned_models[family])
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters()[1]


def test_kwargs_reach_from_pretrained(pruned_models: dict[str, Path]) -> None:
    assert loram.load_pruned(pruned_models["qwen2"], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_folder_is_ordinary_and_complete(pruned_models: dict[str, Path]) -> None:
    folder = pruned_models["gemma2"]
    config = json.loads((folder / "config.json").read_text())
    assert config["per_layer_config"].keys() == {"2", "3"}
    # half of 40 channels, and half of 4 groups of 2 heads
    assert config["per_layer_config"]["2"] == {
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert {"generation_config.json", "loram_plan.json", "loram_manifest.json", "modeling_loram.py"} <= names


def without_narrow_linears(folder: Path, out: Path) -> Path:
    """A pruned folder as it was made before config.json listed the narrow linears."""
    out.mkdir()
    for path in folder.iterdir():
        if path.name != "loram_manifest.json":
            (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((out / "config.json").read_text())
    del config["narrow_linears"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi3"])
def test_an_older_folder_that_only_has_widths_loads_as_before(
    family: str, pruned_models: dict[str, Path], tmp_path: Path
) -> None:
    ids, old = torch.arange(3, 15)[None], without_narrow_linears(pruned_models[family], tmp_path / "old")
    with torch.inference_mode():
        expected = loram.load_pruned(pruned_models[family]).eval()(ids).logits
        assert torch.equal(loram.load_pruned(old).eval()(ids).logits, expected)


def test_an_older_compensated_folder_loads_as_before(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    options = {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1, "bias_compensation": True}
    for family in ("llama", "mistral"):
        loram.prune(tiny_models[family], tmp_path / family, **options)
        old = loram.load_pruned(without_narrow_linears(tmp_path / family, tmp_path / f"{family}-old"))
        new = loram.load_pruned(tmp_path / family)
        assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in new.state_dict().items())


def test_config_json_lists_the_narrow_linears(pruned_models: dict[str, Path]) -> None:
    config = json.loads((pruned_models["phi3"] / "config.json").read_text())
    linears = {  # half of 40 channels, and half of 4 groups of two heads of 8
        "self_attn.qkv_proj": [32 + 16 + 16, 32, False],
        "self_attn.o_proj": [32, 32, False],
        "mlp.gate_up_proj": [20 + 20, 32, False],
        "mlp.down_proj": [32, 20, False],
    }
    assert config["narrow_linears"] == {"2": linears, "3": linears}


def test_every_layer_sees_its_own_widths(pruned_models: dict[str, Path]) -> None:
    model = loram.load_pruned(pruned_models["phi3"])
    layers = model.model.layers
    assert [layer.self_attn.config.num_attention_heads for layer in layers] == [8, 8, 4, 4, 8]
    assert [layer.self_attn.num_key_value_heads for layer in layers] == [4, 4, 2, 2, 4]
    model.set_attn_implementation("eager")  # reaches the layers, though each sees a config of its own
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {"eager"}
    again = copy.deepcopy(model)
    again.config._attn_implementation = "sdpa"
    assert again.model.layers[2].self_attn.config._attn_implementation == "sdpa"
    assert layers[2].self_attn.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (
            "phi3",
            {
                "head_dim": 4,
                "original_max_position_embeddings": 10,
                "rope_parameters": {
                    **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "factor": 2.0},
                    **{"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
                },
            },
        ),
        (
            "llama",
            {
                "max_position_embeddings": 10,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            },
        ),
    ],
    ids=["longrope", "dynamic"],
)
def test_rotary_tables_that_grow_with_the_text_have_the_full_models_sizes(
    family: str, changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", family, tokenizer, **changes)
    loram.prune(base, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    small, full = loram.load_pruned(tmp_path / "pruned").eval(), AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.inference_mode():
        for length in (8, 20):
            places, states = torch.arange(length)[None], torch.zeros(1, length, 32)
            tables = [model.model.rotary_emb(states, places) for model in (small, full)]
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(*tables, strict=True))
            assert torch.isfinite(small(places).logits).all()


@pytest.mark.parametrize("family", [*FAMILIES, *NEAR_LLAMA, *HYBRIDS])
def test_keys_for_transformers_4_say_of_rotary_embeddings_what_transformers_5_reads(family: str) -> None:
    config = AutoConfig.for_model(family, **{**SIZES, **ODDITIES[family]})
    keys = older_rope_keys(config.rope_parameters)
    assert keys["rope_theta"] == (config.rope_parameters.get("full_attention") or config.rope_parameters)["rope_theta"]
    again = {**config.to_dict(), "rope_parameters": None, **keys}
    for both in (again, {**again, "rope_parameters": config.rope_parameters}):
        assert type(config)(**copy.deepcopy(both)).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("version", ["4.57.6", "5.6.2"])
def test_an_older_transformers_is_named_with_what_is_needed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=f"need transformers >= 5.14, and {version} is installed"):
        pruned_classes("LlamaForCausalLM")


def test_load_pruned_needs_a_plan(tiny_llama: Path) -> None:
    with pytest.raises(loram.UserError, match=r"loram_plan\.json"):
        loram.load_pruned(tiny_llama)


def test_weights_that_do_not_fit_the_config_are_refused(pruned_models: dict[str, Path], tmp_path: Path) -> None:
    for path in pruned_models["llama"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(loram.UserError, match=r"config\.json: .* the manifest says"):
        Checkpoint(tmp_path)
    (tmp_path / "loram_manifest.json").unlink()
    with pytest.raises(loram.UserError, match="do not fit"):
        load_model(Checkpoint(tmp_path))
