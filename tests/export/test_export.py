"""Exported adapters: what another tool computes from the files is the adapter's own update."""

import json
import math
import sys
from pathlib import Path
from typing import Any, get_args

import gguf
import pytest
import torch
from conftest import make_wrapped, own_names, random_adapter, targets_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import loram
from loram import cli
from loram.disk.adapter import Adapter
from loram.export.forms.rank import reduced, uniform
from loram.export.forms.table import FORMS
from loram.export.options import ExportOptions
from loram.model.families import ARCHITECTURES
from loram.model.gguf_names import GGUF_FAMILIES

PATTERNS = {
    "lora_alpha": 5,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, "down_proj": 5},
    "alpha_pattern": {"up_proj": 3},
}
QUERIES = "model.layers.2.self_attn.q_proj"


def adapter_for(base: Path, folder: Path, **options: Any) -> Path:
    return random_adapter(AutoModelForCausalLM.from_pretrained(base), folder, **options)


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_for(tiny_llama, tmp_path_factory.mktemp("adapters") / "plain")


@pytest.fixture(scope="module")
def patterned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_for(tiny_llama, tmp_path_factory.mktemp("adapters") / "patterned", **PATTERNS)


def close(exported: Tensor, expected: Tensor) -> bool:
    return bool((exported - expected).abs().max() <= 1e-6 * expected.abs().max())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a GGUF file."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return tensors, {field.name: field.contents() for field in reader.fields.values()}


def paired(rows: Tensor, head_dim: int) -> Tensor:
    """Rows as llama.cpp rotates them: row i of a head beside row i + head_dim / 2."""
    pairs = [
        h + i + half for h in range(0, len(rows), head_dim) for i in range(head_dim // 2) for half in (0, head_dim // 2)
    ]
    return rows[pairs]


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("adapter", ["plain", "patterned"])
def test_gguf_lora_is_the_update(adapter: str, outtype: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(adapter)
    loram.export_adapter(folder, tmp_path / "out", to="gguf-lora", outtype=outtype)
    tensors, metadata = read(tmp_path / "out" / "adapter.gguf")
    ours = Adapter.load(folder)
    assert {metadata[key] for key in ("general.type", "adapter.type", "general.architecture")} == {
        "adapter",
        "lora",
        "llama",
    }
    assert len(tensors) == 2 * len(ours.modules)
    bits = {"f32": 24, "f16": 10, "bf16": 7}[outtype]
    for layer in range(5):
        for name, module in (
            ("attn_q", "self_attn.q_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("ffn_down", "mlp.down_proj"),
        ):
            a, b = (tensors[f"blk.{layer}.{name}.weight.lora_{part}"] for part in "ab")
            expected = ours.delta(f"model.layers.{layer}.{module}")
            expected = paired(expected, 8) if name == "attn_q" else expected
            exported = metadata["adapter.lora.alpha"] / len(a) * (b @ a)  # as llama.cpp
            assert (exported - expected).abs().max() <= 4 * 2**-bits * expected.abs().max()
    if adapter == "plain" and outtype == "f32":  # the factors themselves, bit for bit
        assert torch.equal(tensors["blk.2.ffn_up.weight.lora_b"], ours.modules["model.layers.2.mlp.up_proj"]["B"])
        assert metadata["adapter.lora.alpha"] == 6


def test_gguf_lora_of_fused_linears(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter_for(tiny_models["phi3"], tmp_path / "adapter")
    loram.export_adapter(folder, tmp_path / "out", to="gguf-lora")
    tensors, metadata = read(tmp_path / "out" / "adapter.gguf")
    assert metadata["general.architecture"] == "phi3"
    ours = Adapter.load(folder).modules["model.layers.0.self_attn.qkv_proj"]
    assert torch.equal(tensors["blk.0.attn_qkv.weight.lora_b"], ours["B"])  # not in pairs


def test_gguf_lora_of_a_wrapped_model(tokenizer: Any, tmp_path: Path) -> None:
    """It goes on the text model's file, and Mistral has an architecture of its own in a mistral3."""
    base = make_wrapped(tmp_path / "base", "mistral3", tokenizer)
    model = AutoModelForImageTextToText.from_pretrained(base)
    pattern = r"model\.language_model.*(q_proj|up_proj)"
    config = LoraConfig(r=3, target_modules=pattern, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    folder = tmp_path / "adapter"
    loram.export_adapter(folder, tmp_path / "out", to="gguf-lora")
    tensors, metadata = read(tmp_path / "out" / "adapter.gguf")
    assert metadata["general.architecture"] == "mistral3"
    ours = Adapter.load(folder).modules["model.language_model.layers.1.self_attn.q_proj"]
    assert torch.equal(tensors["blk.1.attn_q.weight.lora_b"], paired(ours["B"], 8))
    with pytest.raises(loram.UserError, match=r"is a mistral3, whose modules mlx-lm names otherwise; merge"):
        loram.export_adapter(folder, tmp_path / "mlx", to="mlx")


@pytest.mark.parametrize("family", [family for family in GGUF_FAMILIES if family in ARCHITECTURES])
def test_gguf_has_names_for_the_default_targets(family: str) -> None:
    row, name = ARCHITECTURES[family], GGUF_FAMILIES[family].architecture
    (arch,) = (arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, 3)
    paths = [linear.path for linear in row.linears if linear.adapted]
    assert all(names.get_name(f"{row.layer_path(2)}.{path}") for path in paths)


@pytest.mark.parametrize("adapter", ["plain", "patterned"])
def test_vllm_gets_one_scaling(adapter: str, tiny_llama: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """It multiplies all modules by lora_alpha / r, whatever the patterns say."""
    folder = request.getfixturevalue(adapter)
    report = loram.export_adapter(folder, tmp_path / "served", to="vllm")
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "served" / "adapter_model.safetensors")
    ours = Adapter.load(folder)
    assert not config["rank_pattern"]
    assert not config["use_rslora"]
    for module in ours.modules:
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        assert close(config["lora_alpha"] / config["r"] * (b @ a), ours.delta(module))
    assert config["r"] == report.rank == (5 if adapter == "patterned" else 3)
    base = tiny_llama
    served = f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules served={tmp_path / 'served'}"
    assert report.command == served
    tokens = torch.arange(3, 15)[None]
    with torch.inference_mode():  # and PEFT reads it as what it was
        exported, expected = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()(tokens).logits
            for path in (tmp_path / "served", folder)
        )
    assert (exported - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("adapter", ["plain", "patterned"])
def test_mlx_computes_the_update(adapter: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(adapter)
    loram.export_adapter(folder, tmp_path / "out", to="mlx")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    options, tensors = config["lora_parameters"], load_file(tmp_path / "out" / "adapters.safetensors")
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 5)
    assert "self_attn.q_proj" in options["keys"]
    assert len(options["keys"]) == 7
    ours = Adapter.load(folder)
    assert len(tensors) == 2 * len(ours.modules)
    for module in ours.modules:
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]  # (in, r), (r, out)
        assert a.shape[1] == b.shape[0] == options["rank"]
        assert close(options["scale"] * (a @ b).T, ours.delta(module))


def test_ollama_has_a_modelfile(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match=r"needs the base: --base-gguf FILE, or .* --ollama-base NAME"):
        loram.export_adapter(plain, tmp_path / "out", to="ollama")
    assert not (tmp_path / "out").exists()
    report = loram.export_adapter(plain, tmp_path / "out", to="ollama", ollama_base="smollm2:135m")
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM smollm2:135m\nADAPTER ./adapter.gguf\n"
    assert report.command == f"ollama create out --file {tmp_path / 'out' / 'Modelfile'}"
    assert "blk.0.attn_q.weight.lora_a" in read(tmp_path / "out" / "adapter.gguf")[0]


def test_a_reduced_update_is_the_nearest_of_its_rank(patterned: Path) -> None:
    adapter = Adapter.load(patterned)
    smaller, overall, shares = reduced(adapter, 2)
    kept = whole = 0.0
    for module in adapter.modules:
        delta = adapter.delta(module)
        values = torch.linalg.svdvals(delta.double())
        error = (smaller.delta(module) - delta).double().square().sum()
        assert math.isclose(error, values[2:].square().sum(), rel_tol=1e-4, abs_tol=1e-9)
        assert math.isclose(shares[module], values[:2].square().sum() / values.square().sum(), rel_tol=1e-5)
        kept, whole = kept + float(values[:2].square().sum()), whole + float(values.square().sum())
    assert math.isclose(overall, kept / whole, rel_tol=1e-5)
    assert {smaller.rank(module) for module in smaller.modules} == {2}
    assert torch.equal(smaller.modules[QUERIES]["A"], adapter.modules[QUERIES]["A"])  # it has rank 2 already


def test_a_rank_that_is_enough_changes_nothing(plain: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(plain)
    tensors = load_file(plain / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            tensor[2] = tensor[0] - tensor[1]  # the true rank is 2
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text((plain / "adapter_config.json").read_text())
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    adapter = Adapter.load(tmp_path / "adapter")
    smaller, overall, shares = reduced(adapter, 2)
    assert all(close(smaller.delta(module), adapter.delta(module)) for module in adapter.modules)
    assert overall == pytest.approx(1)
    assert min(shares.values()) == pytest.approx(1)
    same = uniform(reduced(adapter, 3)[0])
    assert all(torch.equal(same.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_the_command_reports_in_one_object(patterned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", str(patterned), str(tmp_path / "out"), "--to", "mlx", "--max-rank", "2"]
    assert cli._main([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"path", "to", "result", "rank", "kept", "command"}
    assert report["rank"] == 2
    assert 0 < report["kept"]["least"] <= report["kept"]["overall"] < 1
    line[2] = str(tmp_path / "again")
    assert cli._main(line) == 0
    text = capsys.readouterr().out
    assert "adapter for mlx-lm written, rank 2\nThis rank keeps " in text
    assert f"Use it: mlx_lm.generate --model {report['command'].split()[2]}" in text


def test_every_form_has_a_row() -> None:
    assert set(get_args(ExportOptions.model_fields["to"].annotation)) == FORMS.keys()
    names = ExportOptions.model_fields.keys()
    assert all(set(form.options) <= names for form in FORMS.values())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("to", FORMS)
def test_what_a_form_has_no_place_for_is_refused(to: str, tiny_llama: Path, tmp_path: Path) -> None:
    head = adapter_for(tiny_llama, tmp_path / "head", target_modules=["q_proj", "lm_head"])  # tied to the embedding
    with pytest.raises(loram.UserError, match=r"adapts lm_head, which is tied .*`loram merge"):
        loram.export_adapter(head, tmp_path / "out", to=to)
    dora = adapter_for(tiny_llama, tmp_path / "dora", use_dora=True)
    if to == "gguf":
        with pytest.raises(loram.UserError, match=r"max_rank is for plain LoRA, and .* is a DoRA adapter"):
            loram.export_adapter(dora, tmp_path / "out", to=to, max_rank=2)
    else:
        with pytest.raises(loram.UserError, match=rf"a DoRA adapter, which --to {to} has no place for; `loram merge"):
            loram.export_adapter(dora, tmp_path / "out", to=to)
    with pytest.raises(loram.UserError, match=rf"a model, and export takes adapters; .*{tiny_llama}"):
        loram.export_adapter(tiny_llama, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_other_refusals(
    tiny_models: dict[str, Path], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base = tmp_path / "out", tiny_models["llama"]
    with pytest.raises(loram.UserError, match="outtype says nothing with --to mlx"):
        loram.export_adapter(plain, out, to="mlx", outtype="f16")
    with pytest.raises(loram.UserError, match=r"needs the base as a GGUF file.*python convert_hf_to_gguf\.py MERGED"):
        loram.export_adapter(plain, out, to="gguf")
    with pytest.raises(loram.UserError, match="not a GGUF file"):
        loram.export_adapter(plain, out, to="gguf", base_gguf=base / "config.json")
    loram.prune(base, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    narrow = random_adapter(loram.load_pruned(tmp_path / "pruned"), tmp_path / "narrow")
    with pytest.raises(loram.UserError, match="run `loram recover` on it first"):
        loram.export_adapter(narrow, out, to="mlx")
    wide = adapter_for(base, tmp_path / "wide", r=600)
    with pytest.raises(loram.UserError, match="rank 600, and vLLM takes 512 at most; --max-rank reduces it"):
        loram.export_adapter(wide, out, to="vllm")
    other = adapter_for(tiny_models["qwen3_next"], tmp_path / "other", target_modules=["q_proj"])
    with pytest.raises(loram.UserError, match="its base is a qwen3_next, which LoRAM does not export to GGUF"):
        loram.export_adapter(other, out, to="gguf-lora")
    experts = adapter_for(
        tiny_models["mixtral"], tmp_path / "experts", target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    )
    with pytest.raises(loram.UserError, match=r"adapts experts, which no export has a place for; `loram merge"):
        loram.export_adapter(experts, out, to="vllm")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(loram.UserError, match=r"install gguf: pip install 'loram\[gguf\]'"):
        loram.export_adapter(plain, out, to="gguf-lora")
    assert not out.exists()


def test_a_recovered_adapter_is_exported(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Its plan has the base's sizes, and a layer that was dropped has no factors."""
    base = tiny_models["qwen3"]
    loram.prune(base, tmp_path / "pruned", drop_layers=1, ratio=0.5, keep_first=1, keep_last=1, calibration_samples=2)
    plan = loram.PruningPlan.load(tmp_path / "pruned")
    options = own_names("qwen3", {"target_modules": targets_of("qwen3")})
    narrow = random_adapter(loram.load_pruned(tmp_path / "pruned"), tmp_path / "narrow", **options)
    loram.recover(narrow, tmp_path / "recovered")
    loram.export_adapter(tmp_path / "recovered", tmp_path / "out", to="gguf-lora")
    tensors, metadata = read(tmp_path / "out" / "adapter.gguf")
    assert metadata["general.architecture"] == "qwen3"
    assert not [name for name in tensors if name.startswith(f"blk.{plan.dropped[0]}.")]
    assert len(tensors) == 4 * 7 * 2
    assert loram.disk.artifacts.find_manifest(tmp_path / "out").made_from["base"] == plan.base.fingerprint
