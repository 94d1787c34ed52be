"""The prune stage: how often the base is read, what is written, and biases that make up for what is gone."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EMBEDDING, FAMILIES, HEAD, elsewhere, relative
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
from loram.compute.loading import load_tokenizer
from loram.data.spec import DataSpec
from loram.data.tokens import load_rows, tokenize
from loram.disk import artifacts
from loram.disk.checkpoint import Checkpoint
from loram.planner.fit import recipe_lines
from loram.pruning.criteria import CRITERIA

MIDDLE = {"keep_first": 2, "keep_last": 1}  # layers 2 and 3 of 5


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`read_bytes(folder)`: tensor name -> bytes of it that were read from the folder's one file so far."""
    reads: list[tuple[str, int, int]] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        reads.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, count))
        return count

    def by_tensor(folder: Path) -> dict[str, int]:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        found = {}
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                first, last = (8 + length + place for place in entry["data_offsets"])
                found[name] = sum(
                    count for file, offset, count in reads if file == str(path) and first <= offset < last
                )
        assert sum(found.values()) == sum(count for file, _, count in reads if file == str(path))
        return found

    monkeypatch.setattr(os, "preadv", counted)
    return by_tensor


def fingerprint_bytes(tensor: Tensor) -> int:
    """The first and the last row."""
    return 2 * tensor[:1].nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="tells files apart by /proc/self/fd")
@pytest.mark.parametrize("criterion", list(CRITERIA))
@pytest.mark.parametrize("family", ["llama", "mistral"])  # tied and untied
def test_every_byte_is_read_once_and_twice_for_gradients(
    family: str, criterion: str, tiny_models: dict[str, Path], rows_file: Path, read_bytes: Any, tmp_path: Path
) -> None:
    base = tiny_models[family]
    weights = load_file(base / "model.safetensors")
    tied = HEAD not in weights
    text = tokenize(load_rows(DataSpec(path=str(rows_file))), load_tokenizer(Checkpoint(base)), 64).rows["input_ids"][:]
    options = {"calibration": rows_file, "calibration_samples": 2, "refit_samples": 2, "calibration_length": 64}
    loram.prune(base, tmp_path / "out", ratio=0.5, criterion=criterion, **MIDDLE, **options)
    found = read_bytes(base)
    assert found.keys() == weights.keys()

    passes = {"nothing": 0, "weights": 0, "inputs": 1, "gradient": 2}[CRITERIA[criterion].reads]
    longest = sorted(text, key=len, reverse=True)[:2]
    used = len({token for row in longest for token in row} | {0}) * weights[EMBEDDING][:1].nbytes
    for name, tensor in weights.items():
        most = (2 if passes == 2 else 1) * tensor.nbytes + fingerprint_bytes(tensor)
        if name == EMBEDDING and passes:
            most += used  # the rows of the calibration text, beside the copy
        if name == "model.norm.weight" and passes == 2:
            most += tensor.nbytes  # a vector, for the loss and again for its gradient
        assert found[name] <= most, name
        assert found[name] >= tensor.nbytes
    total = sum(tensor.nbytes for tensor in weights.values())
    extra = sum(map(fingerprint_bytes, weights.values())) + (used if passes else 0)
    assert sum(found.values()) <= (2 if passes == 2 else 1) * total + extra
    layers = {name: size for name, size in found.items() if ".layers." in name}
    least = 1.9 if passes == 2 else 1
    assert sum(layers.values()) >= least * sum(weights[name].nbytes for name in layers)
    assert tied == (family == "llama")


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "magnitude"},
        {"criterion": "taylor", "bypass_rank": 2},
        {"criterion": "flap", "bias_compensation": True},
        {"criterion": "flap", "drop_layers": 1},
    ],
    ids=str,
)
def test_the_output_is_not_read_for_its_checksums(
    options: dict[str, Any], tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    read, digest = [], hashlib.file_digest

    def noted(file: Any, algorithm: Any) -> Any:
        read.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    chosen = {"ratio": 0.5, "calibration": rows_file, "calibration_samples": 2, **MIDDLE, **options}
    loram.prune(tiny_models["mistral"], tmp_path / "out", shard_bytes=20_000, **chosen)
    shards = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 3
    assert "config.json" in read
    assert not shards & {*read}
    artifacts.verify(tmp_path / "out")  # every byte, against what was hashed on the way
    assert shards <= {*read}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", ["taylor", "flap", "random"])
def test_what_is_kept_is_written_bit_for_bit(
    family: str, criterion: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """Layers go through float32 on their way, and must come out in the dtype of the base as they were."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    for path in [*tiny_models[family].glob("*token*"), tiny_models[family] / "chat_template.jinja"]:
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    plan = loram.prune(
        tmp_path / "base",
        tmp_path / "out",
        ratio=0.5,
        criterion=criterion,
        calibration=rows_file,
        refit=False,
        **MIDDLE,
    )
    full, found = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert found.keys() == full.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], loram.narrow(name, full[name], plan)) for name in full)
    assert sorted(plan.layers) == [2, 3]


def test_channels_are_rounded_to_what_suits_a_gpu(tiny_llama: Path, tmp_path: Path) -> None:
    """The plan, the folder and the planner have the same numbers; without the option they are the paper's."""
    options = {"ratio": 0.5, **MIDDLE}
    plain = loram.prune(tiny_llama, tmp_path / "plain", criterion="magnitude", **options)
    plan = loram.prune(tiny_llama, tmp_path / "out", criterion="magnitude", round_to=8, **options)
    channels, before = (len(each.layers[2]["channels"]) for each in (plan, plain))
    assert before % 8
    assert channels == -(-before // 8) * 8
    assert plan.layers[2]["kv_groups"] == plain.layers[2]["kv_groups"]
    assert loram.PruningPlan.load(tmp_path / "out").round_to == 8
    assert "round_to" not in (tmp_path / "plain" / "loram_plan.json").read_text()
    small = loram.load_pruned(tmp_path / "out")
    estimate = loram.estimate(tiny_llama, round_to=8, **options)
    assert estimate.pruned_parameters == sum(parameter.numel() for parameter in small.parameters())
    assert "  round_to: 8\n" in recipe_lines(estimate, ())
    with pytest.raises(loram.UserError, match="round_to: is for numbers of channels"):
        loram.prune(tiny_llama, tmp_path / "sparse", pattern="4:8", round_to=8)


def compensated(base: Path, out: Path, rows: Path, criterion: str = "flap", **options: Any) -> Any:
    chosen = {"bias_compensation": True, "calibration_samples": 4, "calibration_length": 40, **options}
    return loram.prune(base, out, ratio=0.5, criterion=criterion, calibration=rows, **MIDDLE, **chosen)


def calibration_of(base: Path, rows: Path) -> list[list[int]]:
    """The four longest of the first four rows: what `compensated` calibrates on."""
    spec = DataSpec(path=str(rows), max_samples=4)
    found = tokenize(load_rows(spec), load_tokenizer(Checkpoint(base)), 40).rows["input_ids"][:]
    return [list(row) for row in found]


def mean_inputs(model: Any, samples: list[list[int]]) -> dict[str, Tensor]:
    """Full name of every o_proj and down_proj -> mean of its inputs over all tokens of all samples."""
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(
                lambda _, args, output, name=name: inputs.setdefault(name, []).append(args[0][0].double())
            )
    with torch.inference_mode():
        for sample in samples:
            model.eval()(torch.tensor([sample]))
    return {name: torch.cat(rows).mean(0) for name, rows in inputs.items()}


@pytest.mark.parametrize("criterion", ["flap", "taylor", "magnitude", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_is_what_removed_inputs_add_on_average(
    family: str, criterion: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    base = tiny_models[family]
    plan = compensated(base, tmp_path / "out", rows_file, criterion)
    means = mean_inputs(AutoModelForCausalLM.from_pretrained(base), calibration_of(base, rows_file))
    full, found = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    new = set()
    for layer in (2, 3):
        for linear, units, width in (("self_attn.o_proj", "kv_groups", 16), ("mlp.down_proj", "channels", 1)):
            name = f"model.layers.{layer}.{linear}"
            weight = full[f"{name}.weight"].double()
            kept = plan.layers[layer][units]
            expected = full.get(f"{name}.bias", torch.zeros(32)).double()
            for column in range(weight.shape[1]):
                if column // width not in kept:
                    expected = expected + weight[:, column] * means[name][column]
            assert relative(found[f"{name}.bias"], expected) <= 1e-4
            new.add(f"{name}.bias")
    assert found.keys() == full.keys() | new
    assert all(torch.equal(found[name], loram.narrow(name, full[name], plan)) for name in full.keys() - new)


def test_only_linears_that_lost_inputs_get_a_bias(
    tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """Layer 2 of the hybrid has no attention, and so loses nothing."""
    options = {"kv_groups_ratio": 0.5, "bias_compensation": True, "calibration": rows_file, "calibration_samples": 4}
    for family, layers, out in (("mistral", [2, 3], "o_proj"), ("lfm2", [3], "out_proj")):
        plan = loram.prune(tiny_models[family], tmp_path / family, criterion="flap", **options, **MIDDLE)
        weights = load_file(tmp_path / family / "model.safetensors")
        new = weights.keys() - load_file(tiny_models[family] / "model.safetensors").keys()
        assert sorted(plan.layers) == layers
        assert new == {f"model.layers.{layer}.self_attn.{out}.bias" for layer in layers}
        assert sum(p.numel() for p in loram.load_pruned(tmp_path / family).parameters()) == plan.parameters()[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compensated_folder_loads_whole_and_counts_right(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    plan = compensated(tiny_models[family], tmp_path / "out", rows_file)
    model = loram.load_pruned(tmp_path / "out")  # refuses what is missing or left over
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters()[1]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for layer in (1, 2, 3, 4):
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            bias = model.get_submodule(f"model.layers.{layer}.{linear}").bias
            if layer in plan.layers:
                assert torch.equal(bias, weights[f"model.layers.{layer}.{linear}.bias"])
            else:
                assert (bias is not None) == (linear in plan.geometry.biases)
    assert plan == loram.PruningPlan.load(tmp_path / "out")


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        print(model(torch.arange(3, 15)[None]).logits.double().sum().item())
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
"""


def test_a_compensated_or_refitted_folder_loads_where_loram_is_not_imported(
    tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    families = ("llama", "mistral", "gemma3_text")
    for family in families:
        refit = {"bias_compensation": False, "refit": True, "bypass_rank": 3} if family == "mistral" else {}
        compensated(tiny_models[family], tmp_path / family, rows_file, **refit)
    done = elsewhere(REMOTE, *(str(tmp_path / family) for family in families), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for family, found in zip(families, done.stdout.split(), strict=True):
        with torch.inference_mode():
            ours = loram.load_pruned(tmp_path / family).eval()(torch.arange(3, 15)[None]).logits
        assert float(found) == pytest.approx(ours.double().sum().item(), rel=1e-5)


def block_outputs(model: Any, samples: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(what attention of layer 2, the first narrowed one, gives out; the last hidden state) over all tokens."""
    attention: list[Tensor] = []
    model.model.layers[2].self_attn.o_proj.register_forward_hook(lambda _, args, output: attention.append(output[0]))
    with torch.inference_mode():
        hidden = [model.eval().model(torch.tensor([sample])).last_hidden_state[0] for sample in samples]
    return torch.cat(attention), torch.cat(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_compensation_brings_outputs_nearer_to_the_full_model_s(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    base = tiny_models[family]
    compensated(base, tmp_path / "with", rows_file)
    compensated(base, tmp_path / "without", rows_file, bias_compensation=False, refit=False)
    samples = calibration_of(base, rows_file)
    full = block_outputs(AutoModelForCausalLM.from_pretrained(base), samples)
    near, far = (block_outputs(loram.load_pruned(tmp_path / name), samples) for name in ("with", "without"))
    for part in (0, 1):
        assert (near[part] - full[part]).norm() < (far[part] - full[part]).norm()
    assert (near[0] - full[0]).mean(0).norm() < 1e-3 * (far[0] - full[0]).mean(0).norm()


def test_compensation_needs_no_criterion_that_reads_text(tiny_llama: Path, tmp_path: Path) -> None:
    """The built-in passages serve where no calibration text is given."""
    options = {"ratio": 0.5, "criterion": "magnitude", "bias_compensation": True}
    plan = loram.prune(tiny_llama, tmp_path / "out", **MIDDLE, **options)
    assert plan.bias_compensation
    biases = load_file(tmp_path / "out" / "model.safetensors")
    assert biases["model.layers.2.mlp.down_proj.bias"].abs().max() > 0


def test_an_adapter_of_a_compensated_model_recovers(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    compensated(tiny_llama, tmp_path / "pruned", rows_file)
    loram.train(tmp_path / "pruned", tmp_path / "adapter", data=rows_file, trainer={"max_steps": 1})
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    assert loram.evaluate(tiny_llama, adapter=tmp_path / "recovered", data=rows_file).tokens > 0


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_weights_that_are_not_numbers_are_refused(
    criterion: str, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Scores that are not numbers rank in no order, so what is pruned would be arbitrary."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(loram.UserError, match=rf"{base}.*not finite"):
        loram.prune(base, tmp_path / "out", ratio=0.5, criterion=criterion, calibration=rows_file, **MIDDLE)
    assert not (tmp_path / "out").exists()
