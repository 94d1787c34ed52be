"""Model folders are read lazily and written in shards, and broken ones give clear errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EMBEDDING, FAMILIES, HEAD
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loram
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.disk.tensorfile import TensorFile
from loram.disk.writer import ShardedWriter
from loram.model.families import architecture_of
from loram.model.plan import PruningPlan
from loram.pruning.check import check_weights


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def test_shards_are_bounded_and_transformers_reads_them(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    checkpoint = Checkpoint(tiny_llama)
    specs = {name: checkpoint.spec(name) for name in checkpoint.names()}
    with ShardedWriter(tmp_path / "out", specs, shard_bytes=30_000) as writer:
        for name in reversed(specs):
            writer.copy(name, checkpoint)
    shutil.copy(tiny_llama / "config.json", tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    largest = max(tensor.nbytes for tensor in load_file(tiny_llama / "model.safetensors").values())
    assert all(shard.stat().st_size < max(30_000, largest) + 5_000 for shard in shards)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert Checkpoint(tmp_path / "out").fingerprint == Checkpoint(tiny_llama).fingerprint


def test_a_sharded_pruned_folder_loads(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"ratio": 0.5, "criterion": "random", "keep_first": 1, "keep_last": 1}
    plan = loram.prune(tiny_llama, tmp_path / "one", **options)
    loram.prune(tiny_llama, tmp_path / "many", **options, shard_bytes=20_000)
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    one, many = loram.load_pruned(tmp_path / "one").state_dict(), loram.load_pruned(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert PruningPlan.load(tmp_path / "many") == plan


def test_names_count_as_a_person_does(tiny_llama: Path) -> None:
    names = Checkpoint(tiny_llama).names()
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)


def test_fingerprint_sees_other_weights(model: Path, tiny_llama: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert Checkpoint(model).fingerprint != Checkpoint(tiny_llama).fingerprint


def test_broken_weights_name_the_file(model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-10], whole + b"0", b"", whole[:4]):
        weights.write_bytes(content)
        with pytest.raises(loram.UserError, match=r"model\.safetensors: not a whole safetensors file"):
            Checkpoint(model)
    weights.unlink()
    with pytest.raises(loram.UserError, match=r"no model\.safetensors"):
        Checkpoint(model)
    (model / "pytorch_model.bin").touch()
    with pytest.raises(loram.UserError, match="pickled and never opened: convert it to safetensors"):
        Checkpoint(model)


def test_an_index_that_lies_is_refused(model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "model.extra.weight": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(loram.UserError, match=r"model\.extra\.weight is in model\.safetensors, but it is not there"):
        Checkpoint(model)
    (model / "model.safetensors").unlink()
    index["weight_map"] = {"model.norm.weight": "gone.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(loram.UserError, match=r"gone\.safetensors: the shard is missing"):
        Checkpoint(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "has more layers than"),
        ({"num_hidden_layers": 6}, r"no tensor model\.layers\.5"),
        ({"intermediate_size": 41}, r"has shape .*but config\.json says \(41, 32\)"),
        ({"num_key_value_heads": 2}, "but config.json says"),
    ],
    ids=str,
)
def test_weights_that_contradict_the_config(changes: dict[str, object], message: str, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    checkpoint = Checkpoint(model)
    with pytest.raises(loram.UserError, match=message):
        check_weights(checkpoint)


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(model: Path, message: str) -> None:
    with pytest.raises(loram.UserError, match=message):
        loram.prune(model, model.with_name("out"), ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    assert [path.name for path in model.parent.iterdir()] == [model.name]


TENSORS: list[tuple[str, str, Any, str]] = [
    (
        "llama",
        EMBEDDING,
        lambda t: t[:-1],
        r"embed_tokens\.weight has shape \(319, 32\), .* \(320, 32\) \(vocab_size, hid",
    ),
    ("llama", EMBEDDING, lambda t: t[:, :-1], r"embed_tokens\.weight has shape \(320, 31\), but config\.json says"),
    ("llama", EMBEDDING, None, r"no tensor model\.embed_tokens\.weight"),
    ("mistral", HEAD, lambda t: t[1:], r"lm_head\.weight has shape \(319, 32\), but config\.json says \(320, 32\)"),
    ("mistral", HEAD, None, r"no tensor lm_head\.weight, but config\.json's tie_word_embeddings is false"),
    ("llama", "model.norm.weight", None, r"no tensor model\.norm\.weight"),
    (
        "llama",
        "model.norm.weight",
        lambda t: t[1:],
        r"model\.norm\.weight has shape \(31,\), but config\.json says \(32,\)",
    ),
    ("llama", "model.layers.3.input_layernorm.weight", None, r"no tensor model\.layers\.3\.input_layernorm"),
    ("gemma2", "model.layers.1.pre_feedforward_layernorm.weight", None, r"no tensor model\.layers\.1\.pre_feedforward"),
    ("qwen3", "model.layers.1.self_attn.q_norm.weight", lambda t: t[1:], r"q_norm\.weight has shape \(7,\), .*\(8,\)"),
    ("llama", "model.layers.1.mlp.up_proj.bias", None, r"no tensor model\.layers\.1\.mlp\.up_proj\.bias"),
    ("llama", "model.norm.weight", lambda t: t.to(torch.int8), r"model\.norm\.weight is torch\.int8, not float32"),
    ("llama", HEAD, lambda t: t + 1, r"tie_word_embeddings is true, but lm_head\.weight differs .*set .* to false"),
    ("llama", HEAD, lambda t: t[1:], r"tie_word_embeddings is true, but lm_head\.weight differs"),
]


@pytest.mark.parametrize(("family", "name", "change", "message"), TENSORS, ids=[f"{t[1]} {t[3][:30]}" for t in TENSORS])
def test_tensors_that_contradict_the_config_fail_before_any_work(
    family: str, name: str, change: Any, message: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_models[family], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    if change is None:
        del weights[name]
    else:
        weights[name] = change(weights.get(name, weights[EMBEDDING])).clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    refused(model, message)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"vocab_size": 321},
            r"embed_tokens\.weight has shape \(320, 32\), but config\.json says \(321, 32\)",
        ),
        (
            "llama",
            {"hidden_size": 64},
            r"embed_tokens\.weight has shape \(320, 32\), but config\.json says \(320, 64\)",
        ),
        (
            "llama",
            {"num_attention_heads": 7},
            r"num_attention_heads \(7\) is not a multiple of num_key_value_heads \(4\)",
        ),
        ("llama", {"tie_word_embeddings": False}, r"no tensor lm_head\.weight"),
        ("mistral", {"tie_word_embeddings": True}, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
        ("llama", {"attention_bias": False}, r"has a tensor .*k_proj\.bias, but config\.json says .* no bias"),
    ],
    ids=str,
)
def test_configs_that_contradict_the_tensors_fail_before_any_work(
    family: str, changes: dict[str, Any], message: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_models[family], tmp_path / "model")
    change_config(model, **changes)
    refused(model, message)


WRONG = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
KEYS = ["model_type", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
KEYS += ["hidden_size", "intermediate_size", "tie_word_embeddings", "attention_bias", "mlp_bias", "quantization_config"]


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(KEYS), value=WRONG | st.integers(1, 10**15))
def test_a_config_of_wrong_values_is_a_clear_error_or_the_same_model(key: str, value: Any, tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    right = checkpoint.geometry
    checkpoint.__dict__["config"] = {**checkpoint.config, key: value}
    del checkpoint.__dict__["geometry"]
    try:
        check_weights(checkpoint)
    except loram.UserError:
        return
    assert checkpoint.geometry == right


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_tensors_that_its_row_says(family: str, tiny_models: dict[str, Path]) -> None:
    checkpoint = Checkpoint(tiny_models[family])
    shapes = checkpoint.geometry.tensor_shapes(architecture_of(checkpoint.config))
    assert shapes == {name: checkpoint.shape(name) for name in checkpoint.names()}


def test_a_tied_lm_head_that_is_written_out_is_fine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({**weights, HEAD: weights[EMBEDDING].clone()}, model / "model.safetensors", {"format": "pt"})
    blocks = TensorFile.blocks
    monkeypatch.setattr(TensorFile, "blocks", lambda self, name: blocks(self, name, 1000))
    checkpoint = Checkpoint(model)
    check_weights(checkpoint)


def test_open_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match=r"no config\.json here"):
        open_model(tmp_path)
    with pytest.raises(loram.UserError, match="no such file or folder"):
        open_model(tmp_path / "none")
    (tmp_path / "file.bin").touch()
    with pytest.raises(loram.UserError, match=r"neither a model folder nor a \.gguf file"):
        open_model(tmp_path / "file.bin")
    (tmp_path / "file.gguf").write_text("no")
    with pytest.raises(loram.UserError, match="not a GGUF file"):
        open_model(tmp_path / "file.gguf")
    with pytest.raises(loram.UserError, match="the hub did not give a model of that name"):
        open_model("owner/model")
