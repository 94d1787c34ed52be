"""The laws of docs/architecture.md, on every supported family."""

import filecmp
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_FAMILY, random_adapter, relative, targets_of
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loram
from loram.disk.adapter import Adapter, save_adapter
from loram.disk.checkpoint import Checkpoint
from loram.disk.tensorfile import TensorFile
from loram.disk.writer import ShardedWriter
from loram.model.families import ARCHITECTURES
from loram.model.plan import PruningPlan

on_every_family = pytest.mark.parametrize("family", EVERY_FAMILY)
TOKENS = torch.tensor([[5, 17, 40, 8, 77, 30, 12, 9, 61, 3, 22, 50], [9, 9, 31, 70, 2, 44, 6, 18, 25, 81, 90, 7]])


@pytest.fixture(scope="module")
def pruned(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (base folder, pruned folder, plan), pruned at random so that no structure is favoured; made once."""
    made: dict[str, tuple[Path, Path, PruningPlan]] = {}

    def get(family: str) -> tuple[Path, Path, PruningPlan]:
        if family not in made:
            out = tmp_path_factory.mktemp("pruned") / family
            plan = loram.prune(tiny_models[family], out, ratio=0.6, criterion="random", keep_first=1, keep_last=1)
            made[family] = tiny_models[family], out, plan
        return made[family]

    return get


def zeroed(base: Path, plan: PruningPlan) -> Any:
    """The full model with the weights and biases of its pruned heads and channels set to zero."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(loram.widen(name, loram.narrow(name, parameter, plan), plan))
    return model.eval()


@on_every_family
def test_law_1_narrow_undoes_widen(family: str, pruned: Any) -> None:
    base, _, plan = pruned(family)
    checkpoint, narrowed = Checkpoint(base), 0
    for name in checkpoint.names():
        full = checkpoint.tensor(name)
        small = loram.narrow(name, full, plan)
        wide = loram.widen(name, small, plan)
        assert wide.shape == full.shape
        assert torch.equal(loram.narrow(name, wide, plan), small)
        kept = loram.widen(name, torch.ones_like(small), plan)
        assert torch.equal(wide, torch.where(kept == 1, full, torch.zeros(())))
        narrowed += small.shape != full.shape
    expected = 0
    for layer in plan.layers:
        row = plan.geometry.layer(ARCHITECTURES[family], layer)
        expected += len([linear for linear in row.linears if linear.has_units])
        expected += len([norm for norm in row.norms if norm.width.space is not None])
        biases = [linear for linear in row.linears if linear.path in plan.geometry.biases]
        expected += len([linear for linear in biases if any(segment.space is not None for segment in linear.rows)])
    assert narrowed == expected


@on_every_family
def test_law_2_pruned_equals_zeroed(family: str, pruned: Any) -> None:
    base, folder, plan = pruned(family)
    small, full = loram.load_pruned(folder).eval(), zeroed(base, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters()[1]
    with torch.inference_mode():
        assert relative(small(TOKENS).logits, full(TOKENS).logits) <= 1e-5
        untouched = AutoModelForCausalLM.from_pretrained(base).eval()
        assert relative(untouched(TOKENS).logits, full(TOKENS).logits) > 1e-2  # else nothing was pruned
        options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
        mask = torch.ones_like(TOKENS)
        assert torch.equal(
            small.generate(TOKENS, attention_mask=mask, **options),
            full.generate(TOKENS, attention_mask=mask, **options),
        )


@on_every_family
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # ours merge it rightly
@pytest.mark.parametrize("more", [(), ("lm_head",)], ids=["linears", "with-lm_head"])
def test_law_3_pruned_adapter_equals_recovered_adapter(
    family: str, more: tuple[str, ...], pruned: Any, tmp_path: Path
) -> None:
    base, folder, plan = pruned(family)
    adapter = random_adapter(loram.load_pruned(folder), tmp_path / "adapter", target_modules=targets_of(family, *more))
    plan.save(adapter)
    loram.recover(adapter, tmp_path / "recovered")
    small = PeftModel.from_pretrained(loram.load_pruned(folder), adapter).eval()
    full = PeftModel.from_pretrained(zeroed(base, plan), tmp_path / "recovered").eval()
    with torch.inference_mode():
        assert relative(small(TOKENS).logits, full(TOKENS).logits) <= 1e-5
        assert relative(full(TOKENS).logits, zeroed(base, plan)(TOKENS).logits) > 1e-2  # the adapter does something


PLAIN_PEFT = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
tokens = torch.arange(3, 15)[None]
for folder in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    with torch.inference_mode():
        a, b = model(tokens).logits, base(tokens).logits
    print(((a - b).abs().max() / b.abs().max()).item())
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
"""


def test_law_4_recovered_adapters_are_plain_peft(pruned: Any, tmp_path: Path) -> None:
    """All families in one process, which takes seconds to start."""
    folders = []
    for family in EVERY_FAMILY:
        _, folder, plan = pruned(family)
        adapter = random_adapter(loram.load_pruned(folder), tmp_path / family)
        plan.save(adapter)
        loram.recover(adapter, tmp_path / f"recovered-{family}")
        folders.append(str(tmp_path / f"recovered-{family}"))
    command = [sys.executable, "-c", PLAIN_PEFT, *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower()
    changes = [float(line) for line in done.stdout.split()]
    assert len(changes) == len(folders)
    assert min(changes) > 1e-2


@on_every_family
def test_law_5_save_load_save_is_byte_identical(family: str, pruned: Any, tmp_path: Path) -> None:
    _, folder, plan = pruned(family)
    plan.save(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    PruningPlan.load(tmp_path).save(again)
    assert filecmp.cmp(tmp_path / "loram_plan.json", again / "loram_plan.json", shallow=False)

    model = loram.load_pruned(folder)
    model.save_pretrained(again)
    assert filecmp.cmp(folder / "config.json", again / "config.json", shallow=False)
    assert filecmp.cmp(folder / "modeling_loram.py", again / "modeling_loram.py", shallow=False)
    mine, theirs = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    checkpoint = Checkpoint(folder)
    (again / "model.safetensors").unlink()
    order = TensorFile(folder / "model.safetensors").specs  # that of the layers as they were pruned
    with ShardedWriter(again, {name: checkpoint.spec(name) for name in order}) as writer:
        for name in order:
            writer.copy(name, checkpoint)
    assert filecmp.cmp(folder / "model.safetensors", again / "model.safetensors", shallow=False)

    adapter = Adapter.load(random_adapter(loram.load_pruned(folder), tmp_path / "adapter"))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_adapter(tmp_path / name, adapter.config, adapter.tensors)
        adapter = Adapter.load(tmp_path / name)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert filecmp.cmp(tmp_path / "first" / name, tmp_path / "second" / name, shallow=False)


@on_every_family
def test_law_7_same_recipe_same_bytes(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    for run in ("a", "b"):
        loram.prune(
            tiny_models[family],
            tmp_path / run / "pruned",
            ratio=0.5,
            calibration=rows_file,
            calibration_samples=4,
            keep_first=1,
            keep_last=1,
        )
    # the second training reads the same pruned folder, since its path is written into the adapter
    for run in ("a", "b"):
        options = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
        loram.train(tmp_path / "a" / "pruned", tmp_path / run / "adapter", data=rows_file, trainer=options)
        loram.recover(tmp_path / run / "adapter", tmp_path / run / "recovered")
    for stage in ("pruned", "adapter", "recovered"):
        files = sorted(path.name for path in (tmp_path / "a" / stage).iterdir())
        assert "loram_manifest.json" in files
        same, other, broken = filecmp.cmpfiles(tmp_path / "a" / stage, tmp_path / "b" / stage, files, shallow=False)
        assert (sorted(same), other, broken) == (files, [], [])
