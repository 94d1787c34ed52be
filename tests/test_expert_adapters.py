"""LoRA on experts: from training over recovery to merging, against PEFT's own code; and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, make_model, random_adapter, relative
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import loram
from loram.compute.loading import config_of, write_config
from loram.compute.streaming import Stream
from loram.data.batches import make_batches
from loram.disk.adapter import Adapter, save_adapter
from loram.disk.artifacts import library_versions
from loram.disk.checkpoint import Checkpoint
from loram.disk.expert_factors import by_expert, own_name, peft_name, together
from loram.model.experts import EXPERT_CHANNELS, EXPERT_UNITS
from loram.model.families import ARCHITECTURES, EXPERT_MATRICES
from loram.model.geometry import Geometry
from loram.model.plan import BaseReference, PruningPlan

on_every_family = pytest.mark.parametrize("family", EXPERTS)
TOKENS = torch.tensor([[5, 17, 40, 8, 77, 30, 12, 9, 61, 3, 22, 50], [9, 9, 31, 70, 2, 44, 6, 18, 25, 81, 90, 7]])
KEPT = (0, 2, 3, 5)
TRAINER = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


def kept(geometry: Geometry) -> dict[int, dict[str, tuple[int, ...]]]:
    """Layer 2 keeps some groups, experts and channels of these, layer 3 channels of all experts, layer 4 experts."""
    width, experts = geometry.per_unit(EXPERT_CHANNELS), geometry.units(EXPERT_UNITS)
    some = [expert * width + (3 * expert + i) % width for expert in KEPT for i in range(4)]
    others = [expert * width + (5 * expert + i) % width for expert in range(experts) for i in range(8)]
    return {
        2: {"kv_groups": (0, 2, 3), "experts": KEPT, "expert_channels": tuple(sorted(some))},
        3: {"expert_channels": tuple(sorted(others))},
        4: {"experts": (1, 2, 4)},
    }


@pytest.fixture(scope="module")
def pruned(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (base folder, pruned folder, plan); made once."""
    made: dict[str, tuple[Path, Path, PruningPlan]] = {}

    def get(family: str) -> tuple[Path, Path, PruningPlan]:
        if family not in made:
            checkpoint, out = Checkpoint(tiny_models[family]), tmp_path_factory.mktemp("pruned") / family
            out.mkdir()
            plan = PruningPlan(
                model_type=family,
                base=BaseReference(name=checkpoint.name, fingerprint=checkpoint.fingerprint),
                geometry=checkpoint.geometry,
                criterion="random",
                ratio=0.5,
                seed=0,
                keep_first=2,
                keep_last=0,
                versions=library_versions(),
                layers=kept(checkpoint.geometry),
            )
            weights = {name: loram.narrow(name, checkpoint.tensor(name), plan) for name in checkpoint.names()}
            save_file(weights, out / "model.safetensors", {"format": "pt"})
            write_config(config_of(checkpoint), plan, out)
            checkpoint.copy_side_files(out)
            plan.save(out)
            made[family] = tiny_models[family], out, plan
        return made[family]

    return get


def experts_of(family: str) -> list[str]:
    return [tensor.name for tensor in ARCHITECTURES[family].expert_matrices]


def adapter_on(folder: Path, out: Path, family: str, **options: Any) -> Path:
    """An adapter without zeros on attention and on all experts of a model."""
    pruned = (folder / "loram_plan.json").exists()
    model = loram.load_pruned(folder) if pruned else AutoModelForCausalLM.from_pretrained(folder)
    targets = {"target_modules": ["q_proj", "o_proj"], "target_parameters": experts_of(family)}
    random_adapter(model, out, **{**targets, **options})
    if pruned:
        PruningPlan.load(folder).save(out)
    return out


def zeroed(base: Path, plan: PruningPlan) -> Any:
    """The full model with what was pruned set to zero, and with no token sent to experts that are gone."""
    model = AutoModelForCausalLM.from_pretrained(base)
    router = plan.architecture.experts.router
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(router):
                parameter.copy_(loram.widen(name, loram.narrow(name, parameter, plan), plan))
    for layer in plan.layers:
        kept = torch.tensor(plan.layers[layer].get("experts", range(plan.geometry.num_experts)))
        gate = model.get_submodule(f"model.layers.{layer}.{router.removesuffix('.weight')}")
        gate.weight = nn.Parameter(gate.weight[kept], requires_grad=False)
        gate.register_forward_hook(lambda _, args, output, kept=kept: (*output[:-1], kept[output[-1]]))
    return model.eval()


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return model.eval()(tokens).logits


@on_every_family
def test_narrow_undoes_widen(family: str, pruned: Any) -> None:
    _, _, plan = pruned(family)
    torch.manual_seed(0)
    narrowed = 0
    for layer in plan.layers:
        shapes = plan.geometry.expert_shapes(plan.architecture, plan.units)
        for tensor in experts_of(family):
            experts, outputs, inputs = shapes[f"model.layers.{layer}.{tensor}"]
            for part, shape in {"A": (experts * 3, inputs), "B": (outputs, 3 * experts)}.items():
                name = f"base_model.model.model.layers.{layer}.{tensor}.lora_{part}.weight"
                small = torch.randn(shape)
                wide = loram.widen(name, small, plan)
                assert torch.equal(loram.narrow(name, wide, plan), small)
                assert wide.count_nonzero() == small.numel()
                narrowed += wide.shape != small.shape
    assert narrowed == 4 + 2 + 4  # all factors where experts go, and else gate_up_proj's lora_B and down_proj's lora_A


@on_every_family
def test_widened_update_is_the_update_widened(family: str, pruned: Any) -> None:
    """The update of the widened factors is the widened update, as that of a weight: zero off the plan."""
    _, _, plan = pruned(family)
    torch.manual_seed(0)
    full, small = (plan.geometry.expert_shapes(plan.architecture, *units) for units in ((), (plan.units,)))
    for layer in plan.layers:
        for tensor in experts_of(family):
            name = f"model.layers.{layer}.{tensor}"
            experts, outputs, inputs = small[name]
            a, b = torch.randn(experts * 3, inputs), torch.randn(outputs, 3 * experts)
            assert all(map(torch.equal, together(*by_expert(a, b, experts)), (a, b)))
            wide = [loram.widen(f"{name}.lora_{part}.weight", f, plan) for part, f in (("A", a), ("B", b))]
            (a, b), (wide_a, wide_b) = by_expert(a, b, experts), by_expert(*wide, full[name][0])
            update, wide_update = b @ a, wide_b @ wide_a
            if plan.architecture.experts_transposed:
                update, wide_update = update.mT, wide_update.mT
            assert relative(wide_update, loram.widen(name, update, plan)) <= 1e-6


@on_every_family
def test_law_3_pruned_adapter_equals_recovered_adapter(family: str, pruned: Any, tmp_path: Path) -> None:
    base, folder, plan = pruned(family)
    adapter = adapter_on(folder, tmp_path / "adapter", family, use_rslora=True)
    loram.recover(adapter, tmp_path / "recovered")
    small = PeftModel.from_pretrained(loram.load_pruned(folder), adapter)
    full = PeftModel.from_pretrained(zeroed(base, plan), tmp_path / "recovered")
    assert relative(logits(small), logits(full)) <= 1e-5
    assert relative(logits(full), logits(zeroed(base, plan))) > 1e-2  # the adapter does something
    only = adapter_on(folder, tmp_path / "only", family, target_modules=[], target_parameters=experts_of(family)[1:])
    loram.recover(only, tmp_path / "recovered-only")
    small = PeftModel.from_pretrained(loram.load_pruned(folder), only)
    full = PeftModel.from_pretrained(zeroed(base, plan), tmp_path / "recovered-only")
    assert relative(logits(small), logits(full)) <= 1e-5
    assert relative(logits(full), logits(zeroed(base, plan))) > 1e-3


PLAIN_PEFT = """
import sys, torch, warnings
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
warnings.filterwarnings("error", ".*missing.*")
tokens = torch.tensor(eval(sys.argv[2]))
for folder in sys.argv[3:]:
    base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(folder).base_model_name_or_path).eval()
    with torch.inference_mode():
        plain = base(tokens).logits
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.inference_mode():
        adapted = model(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
    save_file({"plain": plain, "adapted": adapted, "merged": merged}, f"{folder}/logits.safetensors")
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
"""


def test_from_training_to_merging(
    pruned: Any, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train on experts, recover, load in plain PEFT without loram, merge, and evaluate; all families in one process."""
    recovered = {}
    for family in EXPERTS:
        _, folder, _ = pruned(family)
        lora = {"target_parameters": "experts"}
        out = tmp_path / f"{family}-adapter"
        loram.train(folder, out, data=rows_file, lora=lora, trainer=TRAINER)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["target_parameters"] == sorted(experts_of(family))
        assert config["target_modules"] == sorted(ARCHITECTURES[family].default_targets)
        assert config["lora_dropout"] == 0
        adapter = Adapter.load(out)
        assert set(adapter.of_experts) == set(adapter.modules) & {
            f"model.layers.{layer}.{tensor}" for layer in range(5) for tensor in experts_of(family)
        }
        assert all(factors["B"].any() for factors in adapter.modules.values())  # all of them have trained
        recovered[family] = loram.recover(out, tmp_path / f"{family}-recovered")
    command = [sys.executable, "-c", PLAIN_PEFT, "", str(TOKENS.tolist()), *map(str, recovered.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower() and "unexpected" not in done.stderr.lower()
    for family, adapter in recovered.items():
        theirs = load_file(adapter / "logits.safetensors")
        assert relative(theirs["adapted"], theirs["plain"]) > 1e-2
        merged = loram.merge(tiny_models[family], adapter, tmp_path / f"{family}-merged")
        assert Checkpoint(merged).whole.names() == Checkpoint(tiny_models[family]).whole.names()
        assert relative(logits(AutoModelForCausalLM.from_pretrained(merged)), theirs["merged"]) <= 1e-5
        stacked = tmp_path / f"{family}-stacked"  # the same model in files with 3-D tensors
        stacked.mkdir()
        base = Checkpoint(tiny_models[family])
        save_file({name: base.tensor(name) for name in base.names()}, stacked / "model.safetensors", {"format": "pt"})
        base.copy_side_files(stacked)
        print(base.whole.names()[:20])
