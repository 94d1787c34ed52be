"""Reading and writing model folders: lazily, in shards, and with clear errors for broken ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loram
from loram.model.architecture import architecture_of
from loram.model.checkpoint import Checkpoint, ShardedWriter, open_model
from loram.model.plan import PruningPlan
from loram.prune.stage import check_weights


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
    from safetensors.torch import save_file

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
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
    ids=str,
)
def test_weights_that_contradict_the_config(changes: dict[str, object], message: str, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    checkpoint = Checkpoint(model)
    with pytest.raises(loram.UserError, match=message):
        check_weights(checkpoint, architecture_of(checkpoint.config))


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
