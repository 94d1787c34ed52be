"""Training on sparse models: recovery copies the adapter, masked updates are merged, the planner's bytes are right."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import FAMILIES, make_model, random_adapter, relative, targets_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

import loram
from loram import cli
from loram.compute.masked import mask_updates_
from loram.compute.nf4 import count_parameters, load_4bit, nbytes, quantize
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.model.modeling_loram import dense, unpack
from loram.model.plan import MASKS_NAME
from loram.planner import estimate
from loram.planner.settings import make_settings
from loram.planner.shapes import Model
from loram.planner.weights import frozen_bytes
from loram.pruning.options import PruneOptions
from loram.run.dry_run import dry_run
from loram.run.pipeline import run
from loram.run.recipe import Recipe, load_recipe

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
IDS = torch.arange(33).view(3, 11)
STEPS = {"max_steps": 4, "learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def sparse(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "pruned"
    loram.prune(tiny_llama, out, pattern="4:8")
    return out


@pytest.fixture(scope="module")
def masked(sparse: Path, rows_file: Path) -> Path:
    """An adapter trained with masked updates."""
    return loram.train(sparse, sparse.parent / "masked", data=rows_file, trainer=STEPS, mask_update=True)


def masks_of(folder: Path) -> dict[str, Tensor]:
    """Return the path of each module -> a mask that is True where the module has weights."""
    return {name.removesuffix(".mask"): unpack(mask) for name, mask in load_file(folder / MASKS_NAME).items()}


def dense_model(folder: Path, base: Path) -> Any:
    model, checkpoint = AutoModelForCausalLM.from_pretrained(base), Checkpoint(folder)
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names()}, strict=False)
    return model.eval()


STOCK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
before = base(torch.arange(3, 15)[None]).logits
after = PeftModel.from_pretrained(base, sys.argv[2])(torch.arange(3, 15)[None]).logits
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
print((before - after).abs().max().item())
"""


def test_a_recovered_adapter_is_the_trained_one_for_the_full_model(
    sparse: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    adapter = loram.train(sparse, tmp_path / "adapter", data=rows_file, trainer=STEPS)
    assert not (adapter / MASKS_NAME).exists()
    with pytest.raises(loram.UserError, match="run `loram recover` on it first"):
        loram.evaluate(tiny_llama, adapter=adapter, data=rows_file)
    recovered = loram.recover(adapter, tmp_path / "recovered")
    trained, found = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, recovered))
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tiny_llama), str(recovered)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_dense_model(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    loram.prune(tiny_models[family], tmp_path / "out", pattern="unstructured", ratio=0.4, criterion="wanda")
    found = []
    for model in (loram.load_pruned(tmp_path / "out").eval(), dense_model(tmp_path / "out", tiny_models[family])):
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=targets_of(family), init_lora_weights=False)
        adapted = get_peft_model(model, config)
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append((loss, {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}))
    (loss, gradients), (expected_loss, expected) = found
    assert relative(loss, expected_loss) < 1e-6
    assert gradients.keys() == expected.keys()
    assert all(relative(gradients[name], expected[name]) < 1e-4 for name in expected)


def test_training_is_that_on_the_dense_weights(sparse: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "dense")
    dense_model(sparse, tiny_llama).save_pretrained(tmp_path / "dense")
    options = {"data": rows_file, "trainer": STEPS, "lora": {"lora_dropout": 0.0}}
    found = [
        load_file(loram.train(model, tmp_path / f"{model.name}-adapter", **options) / "adapter_model.safetensors")
        for model in (sparse, tmp_path / "dense")
    ]
    assert all(relative(found[0][name], found[1][name]) < 1e-3 for name in found[1])


def masked_dense_model(folder: Path, base: Path, adapter: Adapter) -> tuple[Any, dict[str, Tensor]]:
    """Return a model with the weights W + s · M ∘ (B A), where the factors are leaves, and the factors."""
    model, masks = dense_model(folder, base), masks_of(folder)
    leaves: dict[str, Tensor] = {}
    for module, factors in adapter.modules.items():
        a, b = (factors[name].clone().requires_grad_() for name in "AB")
        leaves |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        linear = model.get_submodule(module)
        weight, scaling = linear.weight.detach(), adapter.scaling(module)

        def forward(
            x: Tensor,
            w: Any = weight,
            a: Any = a,
            b: Any = b,
            m: Any = masks[module],
            s: Any = scaling,
            bias: Any = linear.bias,
        ) -> Tensor:
            return torch.nn.functional.linear(x, w + s * m * (b @ a), bias)

        linear.forward = forward
    return model, leaves


def test_masked_updates_are_those_written_out(sparse: Path, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(random_adapter(loram.load_pruned(sparse), tmp_path / "adapter"))
    expected, leaves = masked_dense_model(sparse, tiny_llama, adapter)
    expected_loss = expected(input_ids=IDS, labels=IDS).loss
    expected_loss.backward()
    adapted = PeftModel.from_pretrained(loram.load_pruned(sparse), tmp_path / "adapter", is_trainable=True)
    plain = adapted(input_ids=IDS, labels=IDS).loss
    mask_updates_(adapted)
    shapes: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = adapted(input_ids=IDS, labels=IDS).loss
    assert not {(32, 32), (64, 32), (32, 64), (40, 32), (32, 40)} & set(shapes)  # these are shapes of weights
    loss.backward()
    assert relative(loss, expected_loss) < 1e-6
    assert relative(plain, expected_loss) > 1e-4  # the mask made a difference
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            assert relative(parameter.grad, leaves[key].grad) < 1e-4, name


def test_a_masked_adapter_has_its_masks_and_cannot_be_recovered(masked: Path, sparse: Path, tmp_path: Path) -> None:
    assert (masked / MASKS_NAME).read_bytes() == (sparse / MASKS_NAME).read_bytes()
    with pytest.raises(loram.UserError, match=r"not of rank r.*loram merge"):
        loram.recover(masked, tmp_path / "out")
    assert json.loads((masked / "adapter_config.json").read_text())["lora_dropout"] == 0


def test_merging_adds_the_masked_update_exactly(
    masked: Path, sparse: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    loram.merge(tiny_llama, masked, tmp_path / "merged")
    adapter, masks = Adapter.load(masked), masks_of(sparse)
    full, merged = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "merged"))
    changed = set()
    for name, tensor in full.items():
        module = name.removesuffix(".weight")
        if module not in adapter.modules:
            assert torch.equal(merged[name], tensor)
            continue
        a, b = (adapter.modules[module][factor] for factor in "AB")
        update = adapter.scaling(module) * (b @ a) * masks[module]
        assert relative(merged[name] - tensor, update) < 1e-3  # it is a difference of two float32 sums
        assert torch.equal(merged[name][~masks[module]], tensor[~masks[module]])
        changed.add(module)
    assert len(changed) == 35
    found = loram.evaluate(tmp_path / "merged", data=rows_file)
    for stream in (False, True):
        assert loram.evaluate(tiny_llama, adapter=masked, data=rows_file, stream=stream).loss == pytest.approx(
            found.loss, rel=1e-5
        )


def test_a_masked_adapter_on_its_sparse_model_in_memory_and_streamed(
    masked: Path, sparse: Path, rows_file: Path
) -> None:
    losses = [loram.evaluate(sparse, adapter=masked, data=rows_file, stream=stream).loss for stream in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    log = [json.loads(line) for line in (masked / "training_log.jsonl").read_text().splitlines()]
    assert losses[0] < loram.evaluate(sparse, data=rows_file).loss  # the adapter was trained on these rows
    assert all(entry.get("loss", 1) > 0 for entry in log)


class Stop(TrainerCallback):
    """The exception that ends a training in the middle."""

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_resuming_is_exact(masked: Path, sparse: Path, rows_file: Path, tmp_path: Path) -> None:
    options = {"data": rows_file, "trainer": STEPS, "mask_update": True}
    with pytest.raises(KeyboardInterrupt):
        loram.train(sparse, tmp_path / "out", callbacks=[Stop()], **options)
    loram.train(sparse, tmp_path / "out", **options)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        masked / "adapter_model.safetensors"
    ).read_bytes()


def test_what_does_not_go_with_masked_updates_is_refused(
    sparse: Path, tiny_llama: Path, masked: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(loram.UserError, match="lora_dropout 0"):
        loram.train(sparse, out, data=rows_file, mask_update=True, lora={"lora_dropout": 0.1})
    with pytest.raises(loram.UserError, match="is not sparse"):
        loram.train(tiny_llama, out, data=rows_file, mask_update=True)
    with pytest.raises(loram.UserError, match="'pissa' changes the model's own weights"):
        loram.train(sparse, out, data=rows_file, lora={"init_lora_weights": "pissa"})
    with pytest.raises(loram.UserError, match="an update would fill it"):
        loram.merge(sparse, masked, out)
    shutil.copytree(masked, tmp_path / "copy")
    (tmp_path / "copy" / "loram_manifest.json").unlink()
    masks = load_file(tmp_path / "copy" / MASKS_NAME)
    masks["model.layers.0.mlp.up_proj.mask"][0, 0] ^= 255
    save_file(masks, tmp_path / "copy" / MASKS_NAME)
    with pytest.raises(loram.UserError, match="not the masks of the plan"):
        loram.merge(tiny_llama, tmp_path / "copy", out)


def test_values_in_4_bits(sparse: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    """It equals the dense model whose values were rounded to NF4 in the order in which they are stored."""
    model: Any = load_4bit(Checkpoint(sparse), **CPU)
    expected, stored = dense_model(sparse, tiny_llama), Checkpoint(sparse).stored
    with torch.no_grad():
        for name, mask in load_file(sparse / MASKS_NAME).items():
            values = stored.tensor(name.replace(".mask", ".weight"))
            expected.get_submodule(name.removesuffix(".mask")).weight.copy_(
                dense(dequantize_4bit(*quantize(values)).flatten(), mask)
            )
        embedding = expected.get_input_embeddings().weight
        embedding.copy_(dequantize_4bit(*quantize(embedding.clone())))
        assert relative(model(input_ids=IDS).logits, expected(input_ids=IDS).logits) < 1e-5
        plain = dense_model(sparse, tiny_llama)
        assert relative(plain(input_ids=IDS).logits, expected(input_ids=IDS).logits) > 1e-3
    assert count_parameters(model) == loram.PruningPlan.load(sparse).parameters()[1]
    adapter = loram.train(
        sparse, tmp_path / "adapter", data=rows_file, trainer=STEPS, load_in_4bit=True, mask_update=True
    )
    loram.merge(tiny_llama, adapter, tmp_path / "merged")


@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.parametrize(("pattern", "ratio"), [("4:8", None), ("unstructured", 0.37)])
def test_estimated_bytes_are_those_of_the_model(
    pattern: str, ratio: float | None, in_4bit: bool, tokenizer: Any, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", "qwen3", tokenizer, hidden_size=64)
    plan = loram.prune(base, tmp_path / "out", pattern=pattern, ratio=ratio, criterion="magnitude", keep_first=1)
    config = json.loads((base / "config.json").read_text())
    settings = make_settings(device="cpu", load_in_4bit=in_4bit)
    sizes = Model.of(config, "config", PruneOptions(ratio=plan.ratio, pattern=pattern, keep_first=1).resolved())
    model = load_4bit(Checkpoint(tmp_path / "out"), **CPU) if in_4bit else loram.load_pruned(tmp_path / "out")
    buffers = sum(b.nbytes for name, b in model.named_buffers() if not name.endswith(".mask"))  # rotary embeddings
    assert frozen_bytes(sizes, settings).total == nbytes(model) - buffers
    estimated = loram.estimate(base, pattern=pattern, ratio=ratio, keep_first=1, device="cpu", load_in_4bit=in_4bit)
    assert estimated.pruned_parameters == plan.parameters()[1]
    assert estimated.weight_bytes == frozen_bytes(sizes, settings).total
    if not in_4bit:
        stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
        assert estimated.weight_bytes <= stored < estimated.weight_bytes + 20_000  # the rest is headers


def test_alignment_trains_the_values(sparse: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    trainer = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    probe = {"probe_steps": 1, "eval_steps": 2}
    loram.align(sparse, tmp_path / "aligned", data=[rows_file], trainer={**trainer, "max_steps": 4}, **probe)
    log = [json.loads(line) for line in (tmp_path / "aligned" / "align_log.jsonl").read_text().splitlines()]
    assert any("recovered_loss" in entry for entry in log)
    loram.align(sparse, tmp_path / "last", data=[rows_file], trainer=trainer, probe=False)
    aligned, before = Checkpoint(tmp_path / "last"), Checkpoint(sparse)
    assert aligned.sparse
    assert aligned.parameters == before.parameters
    assert (tmp_path / "last" / MASKS_NAME).read_bytes() == (sparse / MASKS_NAME).read_bytes()
    for module, kept in masks_of(sparse).items():
        tensor = aligned.tensor(f"{module}.weight")
        assert not tensor[~kept].any()
        assert not torch.equal(tensor, before.tensor(f"{module}.weight"))
    adapter = loram.train(tmp_path / "aligned", tmp_path / "adapter", data=rows_file, trainer=STEPS)
    loram.recover(adapter, tmp_path / "recovered")


def recipe(base: Path, rows: Path, out: Path, **train: Any) -> Recipe:
    values = {
        "model_name_or_path": str(base),
        "output_dir": str(out),
        "dataset": str(rows),
        "eval_dataset": str(rows),
        "prune": {"pattern": "4:8", "criterion": "sparsegpt"},
        "train": {"trainer": {"max_steps": 2}, **train},
    }
    return Recipe.model_validate(values)


@pytest.mark.parametrize("mask_update", [False, True])
def test_a_run(mask_update: bool, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    chosen = recipe(tiny_llama, rows_file, tmp_path / "run", mask_update=mask_update)
    final = "merged" if mask_update else "recovered"
    report = run(chosen)
    assert [row.name for row in report.rows] == ["base", "pruned", "pruned + adapter", final]
    assert report.row("pruned").parameters == loram.PruningPlan.load(tmp_path / "run" / "pruned").parameters()[1]
    assert (tmp_path / "run" / final).is_dir()
    assert run(chosen).rows == report.rows  # no stage runs again


@pytest.mark.parametrize("pattern", ["4:8", "unstructured"])
def test_a_dry_run_counts_what_stays(pattern: str, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    ratio = {"ratio": 0.3} if pattern == "unstructured" else {}
    plan = loram.prune(tiny_llama, tmp_path / "out", pattern=pattern, criterion="random", **ratio)
    values = recipe(tiny_llama, rows_file, tmp_path / "run").model_dump()
    values["prune"] = {"pattern": pattern, **ratio}
    found = dry_run(Recipe.model_validate(values))
    assert (found.parameters, found.pruned_parameters) == plan.parameters()
    assert found.calibration is not None
    training = found.training["pruned"]
    assert training.parameters == plan.parameters()[1]
    assert training.memory is not None
    full = estimate(tiny_llama, device="cpu").training
    assert training.memory.weights < full.weights
    values["train"]["mask_update"] = True
    assert "mask_update" in dry_run(Recipe.model_validate(values)).training["pruned"].problem


def test_a_recipe_that_masks_what_is_not_sparse_is_refused(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    values = recipe(tiny_llama, rows_file, tmp_path / "run", mask_update=True).model_dump()
    values["prune"] = {"ratio": 0.5, "keep_first": 1, "keep_last": 1}
    with pytest.raises(loram.UserError, match=r"train\.mask_update: is for sparse models"):
        run(Recipe.model_validate(values))


def test_the_command_line(tiny_llama: Path, rows_file: Path, tmp_path: Path, capsys: Any) -> None:
    out, adapter = str(tmp_path / "out"), str(tmp_path / "adapter")
    assert cli._main(["prune", str(tiny_llama), out, "--pattern", "4:8", "--criterion", "wanda"]) == 0
    assert "61,872 -> 36,912 parameters" in capsys.readouterr().out
    options = ["--dataset", str(rows_file), "--max-steps", "1", "--mask-update"]
    assert cli._main(["train", out, adapter, *options]) == 0
    assert cli._main(["merge", str(tiny_llama), adapter, str(tmp_path / "merged")]) == 0
    assert cli._main(["estimate", str(tiny_llama), "--pattern", "4:8"]) == 0
    assert "5 layers are sparse, 4:8" in capsys.readouterr().out
    assert cli._main(["prune", str(tiny_llama), out, "--pattern", "4:8", "--criterion", "flap"]) == 2
    assert "is not for pattern 4:8" in capsys.readouterr().err
    assert cli._main(["recover", adapter, str(tmp_path / "recovered")]) == 2


def test_a_pattern_in_yaml_needs_no_quotes(tmp_path: Path) -> None:
    """YAML reads 4:8 as a number in base 60."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\nprune:\n  pattern: 4:8\n")
    assert load_recipe(path).prune.pattern == "4:8"
    assert load_recipe(path, ["prune.pattern=16:32"]).prune.pattern == "16:32"
