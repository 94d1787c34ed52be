"""Recovery is exact and quick, writes a stock PEFT adapter, and refuses what makes no sense; see also tests/laws."""

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEARS, random_adapter
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import loram
from loram.disk.adapter import save_adapter
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.plan import BaseReference, PruningPlan

LLAMA_2_70B = Geometry(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)


def lora_config(base: str = "pruned") -> dict[str, Any]:
    config = {key: value for key, value in LoraConfig(r=8, lora_alpha=16).to_dict().items() if key != "runtime_config"}
    config |= {"target_modules": list(LINEARS), "base_model_name_or_path": base, "peft_type": "LORA"}
    return {key: value for key, value in config.items() if not isinstance(value, set)}


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    loram.prune(tiny_llama, root / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    return loram.train(root / "pruned", root / "adapter", data=rows_file, trainer={"max_steps": 2})


def test_the_adapter_of_a_70b_plan_takes_seconds(tmp_path: Path) -> None:
    kept = {"kv_groups": (1, 6), "channels": tuple(range(0, 28672, 7))}
    plan = PruningPlan(
        model_type="llama",
        base=BaseReference(name="meta-llama/Llama-2-70b-hf", fingerprint="0" * 64),
        geometry=LLAMA_2_70B,
        criterion="random",
        ratio=0.85,
        seed=0,
        keep_first=4,
        keep_last=2,
        versions={},
        layers=dict.fromkeys(range(4, 78), kept),
    )
    tensors = {}
    for layer in range(80):
        for linear in ARCHITECTURES["llama"].linears:
            rows, columns = plan.geometry.linear_shape(linear, plan.units(layer))
            prefix = f"base_model.model.model.layers.{layer}.{linear.path}"
            tensors[f"{prefix}.lora_A.weight"] = torch.ones(8, columns, dtype=torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = torch.ones(rows, 8, dtype=torch.bfloat16)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", lora_config(), tensors)
    plan.save(tmp_path / "adapter")
    started = time.monotonic()
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    assert time.monotonic() - started < 60  # it takes seconds; the bound only catches loops over rows
    wide = load_file(tmp_path / "recovered" / "adapter_model.safetensors")
    assert wide["base_model.model.model.layers.40.mlp.down_proj.lora_A.weight"].shape == (8, 28672)
    assert wide["base_model.model.model.layers.40.self_attn.q_proj.lora_B.weight"].shape == (8192, 8)
    assert wide["base_model.model.model.layers.40.self_attn.q_proj.lora_B.weight"].sum() == 2 * 1024 * 8


def test_recovered_config_is_stock_peft(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    loram.recover(trained, tmp_path / "recovered")
    config = json.loads((tmp_path / "recovered" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    assert (config["task_type"], config["peft_type"], config["r"]) == ("CAUSAL_LM", "LORA", 8)
    assert config["rank_pattern"] == {}
    assert config.keys() <= {field.name for field in fields(LoraConfig)} | {"peft_version"}
    ranks = {
        t.shape[0] for n, t in load_file(tmp_path / "recovered" / "adapter_model.safetensors").items() if "_A" in n
    }
    assert ranks == {8}


def test_the_base_that_is_named_is_checked_and_written_down(
    trained: Path, tiny_llama: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_llama, tmp_path / "moved")
    loram.recover(trained, tmp_path / "recovered", base=moved)
    config = json.loads((tmp_path / "recovered" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)
    with pytest.raises(loram.UserError, match=r"not the full model that the plan was made from.*--base"):
        loram.recover(trained, tmp_path / "out", base=tiny_models["mistral"])
    with pytest.raises(loram.UserError, match="no such file or folder"):
        loram.recover(trained, tmp_path / "out", base=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_base_on_the_hub_is_named_and_compared_where_it_is_in_the_cache(
    trained: Path,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loram.recover(trained, tmp_path / "recovered", base="someone/model")
    assert "someone/model: not on this disk" in caplog.text
    config = json.loads((tmp_path / "recovered" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/model"
    for family, refused in (("mistral", True), ("llama", False)):
        folder = str(tiny_models[family])
        monkeypatch.setattr("loram.disk.opening.snapshot_download", lambda *_, folder=folder, **__: folder)
        monkeypatch.setattr("loram.disk.opening.hf_hub_download", lambda *_, f=folder: f"{f}/config.json")
        expected = (
            pytest.raises(loram.UserError, match="someone/model: not the full model") if refused else nullcontext()
        )
        caplog.clear()
        with expected:
            loram.recover(trained, tmp_path / family, base="someone/model")
        assert "not on this disk" not in caplog.text


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_adapter_on_a_tied_head_comes_with_a_warning(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for targets, warned in ((["q_proj"], False), (["q_proj", "lm_head"], True)):
        folder = tmp_path / f"adapter-{warned}"
        random_adapter(loram.load_pruned(trained.parent / "pruned"), folder, target_modules=targets)
        loram.recover(folder, tmp_path / f"recovered-{warned}")  # its plan is in the folder that it names
        assert ("loram merge" in caplog.text) == warned


def test_inputs_are_not_written_to(trained: Path, tmp_path: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in trained.iterdir()}
    loram.recover(trained, tmp_path / "recovered")
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in trained.iterdir()}


def test_an_adapter_of_the_full_model_has_nothing_to_recover(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    loram.train(tiny_llama, tmp_path / "adapter", data=rows_file, trainer={"max_steps": 1})
    with pytest.raises(loram.UserError, match=r"no loram_plan\.json"):
        loram.recover(tmp_path / "adapter", tmp_path / "out")


def test_recovering_twice_is_refused(trained: Path, tmp_path: Path) -> None:
    loram.recover(trained, tmp_path / "once")
    with pytest.raises(loram.UserError, match="already"):
        loram.recover(tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if "layers.2.mlp.up_proj.lora_B" not in n}, "up_proj lacks lora_B"),
        (lambda t: {**t, next(iter(t)): next(iter(t.values())) * float("nan")}, "not finite"),
        (
            lambda t: {n: v[:, :5] if "layers.2.mlp.down_proj.lora_A" in n else v for n, v in t.items()},
            r"down_proj is for a weight of shape \(32, 5\)",
        ),
        (lambda t: {f"x.{n}": v for n, v in t.items()}, "not a LoRA factor"),
        (lambda t: {}, "no LoRA factors"),
    ],
    ids=["missing factor", "nan", "shape", "prefix", "empty"],
)
def test_a_damaged_adapter_is_refused(damage: Any, message: str, trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "adapter")
    (copy / "loram_manifest.json").unlink()
    weights = copy / "adapter_model.safetensors"
    save_file({n: v.contiguous() for n, v in damage(load_file(weights)).items()}, weights)
    with pytest.raises(loram.UserError, match=message):
        loram.recover(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
