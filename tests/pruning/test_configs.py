"""A folder that one stage makes, the next one takes: over the configs that models come with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, relative
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
from loram.run.dry_run import dry_run
from loram.run.recipe import Recipe

TRAINED = 24  # positions that the models were trained on, as far as their rotary tables know
SHORT = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))
LONG = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(1))
PRUNE: dict[str, Any] = {"ratio": 0.5, "criterion": "random", "keep_first": 1, "keep_last": 1}
ABSENT = object()
ROPES: dict[str, dict[str, Any]] = {  # for heads of 8
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}


def edited(folder: Path, changes: dict[str, Any]) -> Path:
    """Change keys of a model's config.json."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    config = {key: value for key, value in config.items() if value is not ABSENT}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def rope(kind: str, spelling: str) -> dict[str, Any]:
    """The keys of a config.json that scale the rotary tables, as different versions of transformers spell them."""
    length = {"max_position_embeddings": TRAINED if kind == "dynamic" else 4 * TRAINED}
    if spelling == "new":
        return {**length, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}}
    key = {"old": "rope_type", "oldest": "type"}[spelling]
    return {**length, "rope_parameters": ABSENT, "rope_theta": 1e4, "rope_scaling": {key: kind, **ROPES[kind]}}


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(tokens).logits
    return result


def check_chain(base: Path, rows: Path, out: Path) -> None:
    """Prune a model, load it in two ways, train, recover, and use the adapter in plain PEFT on the base."""
    recipe = {"model_name_or_path": str(base), "output_dir": out / "run", "dataset": str(rows), "prune": PRUNE}
    dry_run(Recipe.model_validate(recipe))
    plan = loram.prune(base, out / "pruned", **PRUNE)
    small = AutoModelForCausalLM.from_pretrained(out / "pruned", dtype=torch.float32).eval()
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    untouched = logits(full, SHORT)
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            parameter.copy_(loram.widen(name, loram.narrow(name, parameter, plan), plan))
    for tokens in (SHORT, LONG, SHORT):  # a longer text than the models were trained on, and back
        assert relative(logits(small, tokens), logits(full, tokens)) <= 1e-5
    small.save_pretrained(out / "saved")
    again = AutoModelForCausalLM.from_pretrained(out / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again, LONG), logits(small, LONG))
    streamed = loram.evaluate(out / "pruned", data=rows, stream=True).loss
    assert loram.evaluate(out / "pruned", data=rows).loss == pytest.approx(streamed, rel=1e-5)
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    loram.train(out / "pruned", out / "adapter", data=rows, trainer=options)
    loram.recover(out / "adapter", out / "recovered")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, out / "recovered").eval()
    assert relative(logits(adapted, SHORT), untouched) > 1e-3


@pytest.mark.parametrize(
    ("kind", "spelling"), [*((kind, "new") for kind in ROPES), ("linear", "old"), ("llama3", "old")]
)
def test_every_kind_of_rotary_scaling(
    kind: str, spelling: str, tokenizer: Any, rows_file: Path, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", "llama", tokenizer)
    before = logits(AutoModelForCausalLM.from_pretrained(base), LONG)
    edited(base, rope(kind, spelling))
    assert relative(logits(AutoModelForCausalLM.from_pretrained(base), LONG), before) > 1e-3  # the kind matters
    check_chain(base, rows_file, tmp_path)


PHI3_LONG = {  # as microsoft/Phi-3-mini-128k-instruct has it
    "max_position_embeddings": 4 * TRAINED,
    "original_max_position_embeddings": TRAINED,
    "rope_parameters": ABSENT,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]},
}
GEMMA3_LAYERS = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    },
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # name -> family, sizes, changes of config.json
    "qwen2-dynamic": ("qwen2", {}, rope("dynamic", "oldest")),
    "mistral-yarn": ("mistral", {}, rope("yarn", "oldest")),
    "phi3-longrope": ("phi3", {"num_attention_heads": 4}, PHI3_LONG),
    "gemma3-layers": ("gemma3_text", {}, GEMMA3_LAYERS),
    "gemma3-local": (
        "gemma3_text",
        {},
        {"rope_parameters": ABSENT, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
    ),
    "no-rope-keys": ("llama", {}, {"rope_parameters": ABSENT, "rope_scaling": None}),
    "null-quantisation": ("llama", {}, {"quantization_config": None}),
    "no-dtype": ("llama", {}, {"dtype": ABSENT}),
    "old-dtype": ("llama", {}, {"dtype": ABSENT, "torch_dtype": "float32"}),
    "foreign-code": ("qwen3", {}, {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}),
    "no-architectures": ("qwen3", {}, {"architectures": None, "use_cache": False}),
    "another-head": ("llama", {}, {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}}),
    "null-head-dim": ("llama", {"head_dim": 4}, {"head_dim": None}),
    "no-kv-heads": ("llama", {"num_key_value_heads": 8}, {"num_key_value_heads": ABSENT}),
    "odd-tokens": ("llama", {}, {"pad_token_id": -1, "eos_token_id": [2, 1], "bos_token_id": None}),
    "no-biases": ("llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}, {}),
    "tied-gemma2": ("gemma2", {}, {"tie_word_embeddings": ABSENT, "layer_types": ABSENT}),
    "untied-qwen2": ("qwen2", {"tie_word_embeddings": False}, {"sliding_window": 4096, "use_sliding_window": False}),
    "leftovers": ("mistral", {}, {"output_attentions": True, "my_key": {"a": 1}, "transformers_version": "4.30.0"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_as_models_come_with_them(variant: str, tokenizer: Any, rows_file: Path, tmp_path: Path) -> None:
    family, sizes, changes = VARIANTS[variant]
    check_chain(edited(make_model(tmp_path / "base", family, tokenizer, **sizes), changes), rows_file, tmp_path)


@pytest.fixture
def with_tensors(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the tiny Llama and add tensors to it."""

    def copy(tensors: dict[str, Tensor]) -> Path:
        folder = tmp_path / "base"
        folder.mkdir()
        for path in tiny_llama.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, **tensors}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


@pytest.mark.parametrize(
    "name",
    [
        "v_head.summary.weight",
        "score.weight",
        "model.layers.1.self_attn.bias",
        "model.layers.1.self_attn.masked_bias",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
    ],
)
def test_tensors_that_the_model_does_not_have_are_refused(
    name: str, with_tensors: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    base = with_tensors({name: torch.ones(1, 32)})
    recipe = {"model_name_or_path": str(base), "output_dir": tmp_path / "run", "dataset": str(rows_file)}
    with pytest.raises(loram.UserError, match=f"has a tensor {name}, which LlamaForCausalLM does not have"):
        dry_run(Recipe.model_validate({**recipe, "prune": PRUNE}))
    for options in (PRUNE, {"pattern": "4:8", "criterion": "magnitude"}):
        with pytest.raises(loram.UserError, match=f"has a tensor {name}"):
            loram.prune(base, tmp_path / "pruned", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_tables_that_the_model_computes_itself_are_left_out(
    with_tensors: Callable[..., Path], tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    base = with_tensors({f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(5)})
    check_chain(base, rows_file, tmp_path)
    assert not any("inv_freq" in name for name in load_file(tmp_path / "pruned" / "model.safetensors"))
    loram.quantize(base, tmp_path / "packed")
    expected = loram.evaluate(loram.quantize(tiny_llama, tmp_path / "other"), data=rows_file)
    found = loram.evaluate(tmp_path / "packed", data=rows_file)
    assert (found.loss, found.parameters) == (expected.loss, expected.parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, "cannot build the model .*'magic'"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}, "rope_parameters": ABSENT}, "low_freq_factor"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    **ROPES["longrope"],
                    "long_factor": [1.0] * 3,
                }
            },
            "cannot compute the rotary tables",
        ),
        ({"hidden_act": "swishy"}, "cannot build the model .*'swishy'"),
        ({"dtype": "float33"}, "cannot build the model .*float33"),
    ],
    ids=["kind", "keys", "factors", "activation", "dtype"],
)
def test_configs_that_cannot_work_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tokenizer: Any, rows_file: Path, tmp_path: Path
) -> None:
    base = edited(make_model(tmp_path / "base", "llama", tokenizer), changes)
    recipe = {"model_name_or_path": str(base), "output_dir": tmp_path / "run", "dataset": str(rows_file)}
    with pytest.raises(loram.UserError, match=message) as refused:
        dry_run(Recipe.model_validate({**recipe, "prune": PRUNE}))
    assert str(refused.value).startswith(str(base / "config.json"))
    assert "\n" not in str(refused.value)
    with pytest.raises(loram.UserError, match=message):
        loram.prune(base, tmp_path / "pruned", **PRUNE)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_what_one_stage_makes_the_next_one_takes(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    """Merged and quantised folders, aligned ones and sparse ones go through the stages like the folders they are of."""
    out, trainer = tmp_path, {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    loram.prune(tiny_llama, out / "pruned", **PRUNE)
    loram.align(out / "pruned", out / "aligned", data=rows_file, trainer=trainer, probe=False)
    loram.quantize(out / "aligned", out / "packed")
    loram.train(out / "packed", out / "adapter", data=rows_file, trainer=trainer)
    loram.recover(out / "adapter", out / "recovered", correct=True, pruned=out / "aligned")
    loram.merge(tiny_llama, out / "recovered", out / "merged")
    expected = loram.evaluate(tiny_llama, adapter=out / "recovered", data=rows_file).loss
    assert loram.evaluate(out / "merged", data=rows_file).loss == pytest.approx(expected, rel=1e-5)
    loram.quantize(out / "merged", out / "merged_packed")
    assert loram.evaluate(out / "merged_packed", data=rows_file).loss == pytest.approx(expected, rel=0.05)
    loram.prune(out / "merged", out / "sparse", pattern="4:8", criterion="magnitude")
    loram.train(out / "sparse", out / "masked", data=rows_file, trainer=trainer, mask_update=True, load_in_4bit=True)
    loram.merge(out / "merged", out / "masked", out / "twice")
    loram.prune(out / "twice", out / "again", **PRUNE, bias_compensation=True)
    loram.train(out / "again", out / "last", data=rows_file, trainer=trainer)
    loram.recover(out / "last", out / "last_recovered")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "twice"), out / "last_recovered")
    untouched = logits(AutoModelForCausalLM.from_pretrained(out / "twice"), SHORT)
    assert relative(logits(adapted.eval(), SHORT), untouched) > 1e-3
