"""The refit at pruning and the bypass: the algebra, what is gathered, the laws, and who leaves the bypass alone."""

import dataclasses
import filecmp
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_adapter, relative, targets_of
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import loram
from loram import cli
from loram.compute.loading import load_tokenizer
from loram.compute.nf4 import is_4bit, load_4bit, nbytes
from loram.data.batches import make_batches
from loram.data.spec import DataSpec
from loram.data.tokens import load_rows, tokenize
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan
from loram.planner.settings import make_settings
from loram.planner.shapes import Model
from loram.planner.weights import frozen_bytes
from loram.pruning.layout import blank_plan
from loram.pruning.options import PruneOptions
from loram.pruning.refit import DAMPINGS, Products, held_every, reduced_rank, refit, rest_products, solve
from loram.pruning.score import score_layers
from loram.training.methods.weights import unfreeze_

MIDDLE = {"keep_first": 2, "keep_last": 1}  # layers 2 and 3 of 5
RANK = 3
TOKENS = torch.tensor([[5, 17, 40, 8, 77, 30, 12, 9, 61, 3, 22, 50], [9, 9, 31, 70, 2, 44, 6, 18, 25, 81, 90, 7]])
# fused linears, norms after blocks, side by side, norms over all heads, mixers that stay whole, layers of many sizes
FAMILIES = ("llama", "phi3", "gemma2", "cohere2", "olmo2", "lfm2", "gemma4_text", "qwen3_moe")
# An expert that is gone is not one with zeros: the router chooses others. So these keep their experts.
OPTIONS: dict[str, dict[str, Any]] = {"qwen3_moe": {"ratio": None, "kv_groups_ratio": 0.5}}


def refitted(base: Path, out: Path, rows: Path, criterion: str = "taylor", **options: Any) -> PruningPlan:
    chosen = {"ratio": 0.5, "refit": True, "bypass_rank": RANK, "calibration": rows, "calibration_samples": 2, **MIDDLE}
    return loram.prune(base, out, criterion=criterion, **{**chosen, **options})


@pytest.fixture(scope="module")
def folders(tiny_models: dict[str, Path], rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (base folder, pruned folder with a bypass, plan); made once."""
    made: dict[str, tuple[Path, Path, PruningPlan]] = {}

    def get(family: str) -> tuple[Path, Path, PruningPlan]:
        if family not in made:
            out = tmp_path_factory.mktemp("refitted") / family
            made[family] = (
                tiny_models[family],
                out,
                refitted(tiny_models[family], out, rows_file, **OPTIONS.get(family, {})),
            )
        return made[family]

    return get


def normal(*shape: int, seed: int = 0) -> Tensor:
    mixed = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mixed @ torch.randn(shape[-1], shape[-1], generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_refit_is_least_squares(damping: float) -> None:
    h, weight, kept = normal(200, 12), normal(5, 12, seed=1), torch.tensor([0, 3, 4, 8, 11])
    gram = h.T @ h
    ridge = (damping * gram[kept][:, kept].diagonal().mean()).sqrt()
    left = torch.cat([h[:, kept], ridge * torch.eye(5, dtype=h.dtype)])  # the ridge as five further tokens
    right = torch.cat([h @ weight.T, ridge * weight[:, kept].T])
    expected = torch.linalg.lstsq(left, right).solution.T
    (solution,) = solve(gram, weight, kept, damping)
    assert relative(solution, expected) <= 1e-9
    assert relative(expected, weight[:, kept]) > 0.1


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_bypass_is_the_best_of_its_rank(rank: int, damping: float) -> None:
    """By brute force: all of least squares, and then the best approximation of the outputs that it gives."""
    x, rest = normal(200, 8), normal(200, 8, seed=1) + normal(200, 8) @ normal(8, 8, seed=2)
    ridge = (damping * (x.T @ x).diagonal().mean()).sqrt()
    rows = torch.cat([x, ridge * torch.eye(8, dtype=x.dtype)])
    targets = torch.cat([rest, torch.zeros(8, 8, dtype=x.dtype)])
    given = rows @ torch.linalg.lstsq(rows, targets).solution
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    a, b = reduced_rank(x.T @ x, x.T @ rest, rank, damping)
    assert (a.shape, b.shape) == ((rank, 8), (8, rank))
    assert relative(rows @ a.T @ b.T, best) <= 1e-8


def test_a_bypass_of_nothing_is_zero() -> None:
    x = normal(50, 8)
    a, b = reduced_rank(x.T @ x, torch.zeros(8, 8, dtype=x.dtype), 2, 0.1)
    assert torch.isfinite(a).all()
    assert not (b @ a).any()


def test_a_block_that_reads_zeros_keeps_its_weights() -> None:
    products, weight, kept = Products(12, 5, 4, torch.device("cpu")), normal(5, 12).float(), torch.tensor([0, 3, 4])
    products.add_(torch.zeros(4, 6, 12), torch.zeros(4, 6, 5), torch.ones(4, 6, dtype=torch.bool))
    fit = refit(products, weight, kept, 2)
    assert relative(fit.weight, weight[:, kept].double()) <= 1e-9
    assert fit.bypass is not None
    assert not (fit.bypass[1] @ fit.bypass[0]).any()


def test_what_the_rest_is() -> None:
    h, x, weight, kept = normal(60, 12), normal(60, 5, seed=4), normal(5, 12, seed=1), torch.tensor([0, 3, 4])
    fitted = normal(5, 3, seed=2)
    expected = x.T @ (h @ weight.T - h[:, kept] @ fitted.T)
    assert relative(rest_products(x.T @ h, weight, kept, fitted), expected) <= 1e-9


def test_held_out_rows_choose_the_damping() -> None:
    """One row of four is held out; at last all tokens count."""
    h, x = torch.randn(8, 4, 30), torch.randn(8, 4, 6)
    products = Products(30, 6, 4, torch.device("cpu"))
    products.add_(h[:5], x[:5], torch.ones(5, 4, dtype=torch.bool))
    products.add_(h[5:], x[5:], torch.ones(3, 4, dtype=torch.bool))
    assert [len(held) for held, _ in products.held] == [4, 4]
    assert torch.equal(products.held[1][0], h[7])
    weight, kept = torch.randn(6, 30), torch.arange(20)
    fit = refit(products, weight, kept, 2)
    assert relative(products.inputs, h.flatten(0, 1).T @ h.flatten(0, 1)) <= 1e-5
    candidates = solve(products.inputs, weight.double(), kept, *DAMPINGS)
    assert min(relative(fit.weight, each) for each in candidates) == 0
    assert fit.errors is not None
    without = Products(30, 0, 0, torch.device("cpu"))
    without.add_(h, x[..., :0], torch.ones(8, 4, dtype=torch.bool))
    assert refit(without, weight, kept, 0).errors is None


@pytest.mark.parametrize(("noise", "expected"), [(0.0, DAMPINGS[0]), (3.0, DAMPINGS[-1])])
def test_little_text_and_noise_ask_for_more_damping(noise: float, expected: float) -> None:
    """What is removed is what the first kept inputs say, and noise; without noise the least damping does best."""
    torch.manual_seed(0)
    h, weight, kept = torch.randn(8, 4, 30), torch.randn(6, 30), torch.arange(20)
    h[..., 20:] = h[..., :10] + noise * torch.randn(8, 4, 10)
    products = Products(30, 0, 4, torch.device("cpu"))
    products.add_(h, h[..., :0], torch.ones(8, 4, dtype=torch.bool))
    fit = refit(products, weight, kept, 0)
    assert torch.equal(fit.weight, *solve(products.inputs, weight.double(), kept, expected))


def text_of(base: Path, rows: Path) -> list[list[int]]:
    return tokenize(load_rows(DataSpec(path=str(rows))), load_tokenizer(Checkpoint(base)), 40).rows["input_ids"][:]


def of_the_whole_model(base: Path, text: list[list[int]], layer: int, block: str, output: str) -> tuple[Tensor, Tensor]:
    """(what the output projection reads, what the block reads), (tokens, ...), by hooks on transformers' own model."""
    model, seen = AutoModelForCausalLM.from_pretrained(base).eval(), {"h": [], "x": []}
    part = model.model.layers[layer].get_submodule(block)
    part.register_forward_pre_hook(
        lambda _, args, kwargs: seen["x"].append((args[0] if args else kwargs["hidden_states"])[0]), with_kwargs=True
    )
    part.get_submodule(output).register_forward_pre_hook(lambda _, args: seen["h"].append(args[0][0]))
    with torch.inference_mode():
        for row in text:
            model(torch.tensor([row]))
    return torch.cat(seen["h"]), torch.cat(seen["x"])


@pytest.mark.parametrize("family", ["llama", "cohere2", "lfm2", "gemma4_text"])
def test_products_are_those_of_the_whole_model(family: str, tiny_models: dict[str, Path], rows_file: Path) -> None:
    """In the forward pass and on the way back alike, and further text changes no score."""
    base = tiny_models[family]
    checkpoint, text = Checkpoint(base), text_of(base, rows_file)
    options = PruneOptions(ratio=0.5, refit=True, bypass_rank=RANK, **MIDDLE).resolved()
    plan = blank_plan(checkpoint, options)

    def score(criterion: str, **given: Any) -> dict[int, Any]:
        scored = score_layers(checkpoint, [criterion], [2, 3], calibration=text[:2], **given)
        return {layer.index: layer for layer in scored if layer.index in (2, 3)}

    with_text = {"refit": plan, "refit_text": text[2:5]}
    forward, backward, alone = score("flap", **with_text), score("taylor", **with_text), score("taylor")
    path, output = next((linear.block, linear.name) for linear in plan.refitted(3))
    h, x = of_the_whole_model(base, text[:5], 3, path, output)
    name = f"{checkpoint.architecture.layer_path(3)}.{path}.{output}.weight"
    for layers in (forward, backward):
        products = layers[3].products[name]
        products.add_held_()
        for gathered, expected in ((products.inputs, h.T @ h), (products.across, x.T @ h), (products.block, x.T @ x)):
            assert relative(gathered, expected) <= 1e-4
    for layer in (2, 3):
        assert forward[layer].products.keys() == backward[layer].products.keys()
        assert not alone[layer].products
        for space, scores in alone[layer].scores["taylor"].items():
            assert torch.equal(scores, backward[layer].scores["taylor"][space])


def test_rows_are_held_out_where_there_are_enough() -> None:
    assert held_every(make_batches([[1, 2]] * 3, max_tokens=64)) == 0
    assert held_every(make_batches([[1, 2]] * 4, max_tokens=64)) == 4
    assert held_every(make_batches([[1] * 1000] * 8, max_tokens=2048)) == 8


def wide(base: Path, folder: Path, plan: PruningPlan) -> Any:
    """The full model with zeros for what is pruned, the refitted weights where they belong, and the bypasses."""
    model, own = AutoModelForCausalLM.from_pretrained(base), load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in own:
                parameter.copy_(loram.widen(name, own[name], plan))

    def add(_: Any, args: Any, kwargs: Any, output: Any, factors: list[Tensor]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        added = functional.linear(functional.linear(x, factors[0]), factors[1])
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    for name in own:
        if name.endswith(".bypass_in"):
            block, factors = name.removesuffix(".bypass_in"), [own[name], own[name.replace("_in", "_out")]]
            model.get_submodule(block).register_forward_hook(
                lambda *seen, factors=factors: add(*seen, factors), with_kwargs=True
            )
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_laws(family: str, folders: Any, tmp_path: Path) -> None:
    """Pruned equals wide, alone and with an adapter; sizes are as planned; saved again it is the same."""
    base, folder, plan = folders(family)
    small, full = loram.load_pruned(folder).eval(), wide(base, folder, plan)
    config = json.loads((base / "config.json").read_text())
    options = PruneOptions(
        **{"ratio": 0.5, **OPTIONS.get(family, {})}, refit=True, bypass_rank=RANK, **MIDDLE
    ).resolved()
    assert sum(p.numel() for p in small.parameters()) == plan.parameters()[1]
    assert Model.of(config, "", options).parameters == plan.parameters()[1]
    weights, plain = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    blocks = [
        f"{plan.architecture.layer_path(layer)}.{linear.block}" for layer in (2, 3) for linear in plan.refitted(layer)
    ]
    new = {f"{block}.{factor}" for block in blocks for factor in ("bypass_in", "bypass_out")}
    in_files = {name for name in weights if "expert" not in name}  # the base has each expert by itself
    assert in_files - new == {name for name in plain if "expert" not in name}
    assert len(new) >= 4
    assert all(weights[name].any() for name in new)
    small.save_pretrained(tmp_path / "again")
    for name in ("config.json", "modeling_loram.py"):
        assert filecmp.cmp(folder / name, tmp_path / "again" / name, shallow=False)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in again)
    assert plan == PruningPlan.load(folder)
    with torch.inference_mode():
        expected = full(TOKENS).logits
        assert relative(small(TOKENS).logits, expected) <= 1e-5

    targets = ["q_proj", "o_proj"] if family == "qwen3_moe" else targets_of(family)  # it has no ordinary MLP
    adapter = random_adapter(small, tmp_path / "adapter", target_modules=targets)
    assert not any("bypass" in name for name in load_file(adapter / "adapter_model.safetensors"))
    plan.save(adapter)
    loram.recover(adapter, tmp_path / "recovered")
    tuned = PeftModel.from_pretrained(loram.load_pruned(folder), adapter).eval()
    with torch.inference_mode():
        logits = tuned(TOKENS).logits
        assert relative(logits, PeftModel.from_pretrained(full, tmp_path / "recovered").eval()(TOKENS).logits) <= 1e-5
        assert relative(logits, expected) > 1e-2


def test_recovery_ignores_the_bypass(folders: Any, tmp_path: Path) -> None:
    _, folder, plan = folders("llama")
    adapter = random_adapter(loram.load_pruned(folder), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())  # which names the folder, and its plan is there
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    for name, own in (("with", plan), ("without", plan.model_copy(update={"refit": False, "bypass_rank": 0}))):
        own.save(adapter)
        loram.recover(adapter, tmp_path / name)
    plan.save(adapter)
    with pytest.raises(loram.UserError, match="correct takes out changes"):
        loram.recover(adapter, tmp_path / "corrected", correct=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "with" / name, tmp_path / "without" / name, shallow=False)


@pytest.mark.parametrize(("family", "criterion"), [("llama", "taylor"), ("gemma2", "flap"), ("llama", "magnitude")])
def test_a_refit_brings_outputs_nearer(
    family: str, criterion: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """Each step does, on the text that it reads; the units that stay are those of a plain pruning."""
    base, text = tiny_models[family], text_of(tiny_models[family], rows_file)[:6]
    plans, rests = [], []
    full = AutoModelForCausalLM.from_pretrained(base).eval()
    for number, options in enumerate(({"refit": False, "bypass_rank": 0}, {"bypass_rank": 0}, {})):
        plans.append(refitted(base, tmp_path / str(number), rows_file, criterion, **options))
        small, rest = loram.load_pruned(tmp_path / str(number)).eval(), torch.zeros(())
        with torch.inference_mode():
            for row in text:
                hidden = full.model(torch.tensor([row]), output_hidden_states=True).hidden_states
                inputs, outputs = hidden[2], hidden[3]  # of layer 2, the first that is narrowed
                states = small.model(torch.tensor([row]), output_hidden_states=True).hidden_states
                assert relative(states[2], inputs) <= 1e-5
                rest = rest + (states[3] - outputs).square().sum()
        rests.append(float(rest))
    assert rests[0] > 1.1 * rests[1] > 1.1 * rests[2]
    assert plans[0].layers == plans[1].layers == plans[2].layers


def test_in_4_bits_the_bypass_stays_whole_and_is_counted(folders: Any, tmp_path: Path) -> None:
    base, folder, _ = folders("llama")
    model = load_4bit(Checkpoint(folder), device=torch.device("cpu"), dtype=torch.float32)
    weights, names = load_file(folder / "model.safetensors"), dict(model.named_parameters())
    factors = [name for name in names if "bypass" in name]
    assert len(factors) == 8
    assert all(torch.equal(names[name], weights[name]) and not is_4bit(names[name]) for name in factors)
    options = PruneOptions(ratio=0.5, refit=True, bypass_rank=RANK, **MIDDLE).resolved()
    config, settings = json.loads((base / "config.json").read_text()), make_settings(load_in_4bit=True, device="cpu")
    sizes = Model.of(config, "", options)
    without = dataclasses.replace(sizes, bypass_rank=0)
    assert frozen_bytes(sizes, settings).total - frozen_bytes(without, settings).total == 4 * sum(
        names[name].numel() for name in factors
    )
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert frozen_bytes(sizes, settings).total == nbytes(model) - buffers
    assert sizes.layers[2].weights - without.layers[2].weights == 2 * 2 * RANK * 32

    loram.quantize(folder, tmp_path / "quantised")
    packed = Checkpoint(tmp_path / "quantised")
    assert all(torch.equal(packed.tensor(name), weights[name]) for name in factors)
    loaded = load_4bit(packed, device=torch.device("cpu"), dtype=torch.float32)
    with torch.inference_mode():
        assert relative(loaded(TOKENS).logits, model(TOKENS).logits) <= 1e-4


def test_methods_that_train_weights_leave_the_bypass_alone(folders: Any) -> None:
    model = loram.load_pruned(folders("llama")[1])
    unfreeze_(model, pruned=True, around=True)
    assert {"bypass" in name for name, parameter in model.named_parameters() if parameter.requires_grad} == {False}
    assert any("bypass" in name for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "train",
    [{"lora": {"target_modules": "all-linear"}}, {"anchor_steps": 1}, {"load_in_4bit": True}, {"method": "full"}],
    ids=["all-linear", "anchored", "nf4", "full"],
)
def test_a_run_from_a_folder_with_a_bypass(
    train: dict[str, Any], folders: Any, rows_file: Path, tmp_path: Path
) -> None:
    """The bypass never reaches the adapter, which fits the full model."""
    base, folder, _ = folders("llama")
    loram.train(folder, tmp_path / "adapter", data=rows_file, trainer={"max_steps": 1}, **train)
    assert not any("bypass" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    assert loram.evaluate(base, adapter=tmp_path / "recovered", data=rows_file).tokens > 0


def test_align_streams_merges_and_verifies(folders: Any, rows_file: Path, tmp_path: Path) -> None:
    _, folder, plan = folders("llama")
    before = loram.evaluate(folder, data=rows_file)
    assert loram.evaluate(folder, data=rows_file, stream=True).perplexity == pytest.approx(before.perplexity, rel=1e-5)
    loram.align(folder, tmp_path / "aligned", data=rows_file, probe=False, trainer={"max_steps": 1, "warmup_steps": 0})
    assert PruningPlan.load(tmp_path / "aligned") == plan
    assert loram.evaluate(tmp_path / "aligned", data=rows_file).perplexity != before.perplexity
    adapter = random_adapter(loram.load_pruned(folder), tmp_path / "adapter")
    plan.save(adapter)
    loram.merge(folder, adapter, tmp_path / "merged")
    merged, own = load_file(tmp_path / "merged" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(merged[name], own[name]) for name in own if "bypass" in name)
    for each in (folder, tmp_path / "aligned", tmp_path / "merged"):
        assert cli._main(["verify", str(each)]) == 0


def test_what_cannot_be_refitted_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    refused = {
        "refit: is for structured pruning": {"refit": True, "pattern": "4:8", "ratio": None},
        "refit: is for narrowed layers": {"refit": True, "ratio": None, "drop_layers": 1},
        "give one of the two": {"refit": True, "bias_compensation": True},
        "add refit": {"refit": False, "bypass_rank": 2},
        "refit_dataset: is read by a refit, and there is none": {"refit_dataset": "rows.jsonl", "refit": False},
        "bypass_rank: is for structured pruning": {"bypass_rank": 2, "pattern": "4:8", "ratio": None},
        "bypass_rank 33: is above the hidden size, 32": {"refit": True, "bypass_rank": 33},
    }
    for message, options in refused.items():
        with pytest.raises(loram.UserError, match=message):
            loram.prune(tiny_models["llama"], tmp_path / "out", **{"ratio": 0.5, **MIDDLE, **options})
    with pytest.raises(loram.UserError, match="no linear loses inputs"):
        loram.prune(tiny_models["qwen3_moe"], tmp_path / "out", experts_ratio=0.3, refit=True, **MIDDLE)


@pytest.mark.parametrize(
    ("options", "refit"),
    [
        ({}, True),
        ({"criterion": "flap"}, True),
        ({"criterion": "magnitude"}, False),
        ({"criterion": "magnitude", "bypass_rank": 2}, True),
        ({"refit": False}, False),
        ({"bias_compensation": True}, False),
        ({"ratio": None, "pattern": "4:8"}, False),
        ({"ratio": None, "drop_layers": 1}, False),
    ],
    ids=str,
)
def test_a_refit_is_the_default_where_the_criterion_reads_text(options: dict[str, Any], refit: bool) -> None:
    assert PruneOptions.of(**{"ratio": 0.5, **options}).resolved().refit is refit


def test_a_data_set_of_its_own_is_read_beside_the_scored_rows(
    tiny_llama: Path, rows_file: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """It is as if its rows stood behind the scored ones in one file."""
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    own, further = jsonl(*lines[:4]), jsonl(*lines[4:], name="further.jsonl")
    two = {"calibration": own, "refit_dataset": further, "calibration_samples": 4, "refit_samples": len(lines) - 4}
    refitted(tiny_llama, tmp_path / "two", rows_file, refit_length=128, **two)
    refitted(tiny_llama, tmp_path / "one", rows_file, calibration_samples=4)
    refitted(tiny_llama, tmp_path / "own", rows_file, calibration=own, calibration_samples=4)
    one, both, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "own"))
    assert all(torch.equal(one[name], both[name]) for name in one)
    assert not all(torch.equal(one[name], alone[name]) for name in one)


def test_by_default_nothing_is_refitted_where_experts_alone_go(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    chosen = {"experts_ratio": 0.3, "experts_criterion": "router", **MIDDLE}
    base = tiny_models["qwen3_moe"]
    assert not loram.prune(base, tmp_path / "out", **chosen).refit
    settings = PruneOptions.of(**chosen).resolved()
    assert not settings.reads_text(Checkpoint(base).architecture)
    small, plain = (
        next(stage.memory for stage in loram.estimate(base, ratio=0.5, keep_first=1, **more).stages)
        for more in ({}, {"refit": False})
    )
    assert small == plain  # the first row, magnitude, reads no text


def test_the_log_says_how_well_it_went_and_a_second_time_gives_the_same_bytes(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        refitted(tiny_llama, tmp_path / "out", rows_file)
    assert any("is missing after pruning" in message for message in caplog.messages)
    refitted(tiny_llama, tmp_path / "again", rows_file)
    for name in ("model.safetensors", "loram_plan.json", "config.json"):
        assert filecmp.cmp(tmp_path / "out" / name, tmp_path / "again" / name, shallow=False)
