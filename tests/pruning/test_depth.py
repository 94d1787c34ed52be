"""Whole layers that are dropped, alone and beside narrowed ones: which they are, the laws, and every stage after it."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_FAMILY, EXPERTS, HYBRID_EXPERTS, HYBRIDS, elsewhere, random_adapter, relative, targets_of
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

import loram
from loram import cli
from loram.base.errors import UserError
from loram.compute.loading import load_model
from loram.compute.nf4 import load_4bit, nbytes
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.model.families import ARCHITECTURES
from loram.model.plan import PruningPlan
from loram.planner.settings import PRUNING, make_settings
from loram.planner.shapes import Model
from loram.planner.weights import frozen_bytes
from loram.pruning.criteria import CRITERIA
from loram.pruning.depth import Influence
from loram.pruning.options import PruneOptions
from loram.pruning.score import calibration_stream
from loram.run.dry_run import dry_run
from loram.run.recipe import Recipe

TOKENS = torch.tensor([[5, 17, 40, 8, 77, 30, 12, 9, 61, 3, 22, 50], [9, 9, 31, 70, 2, 44, 6, 18, 25, 81, 90, 7]])
EDGES = {"keep_first": 1, "keep_last": 1}
ALONE, MIXED = {"drop_layers": 2, **EDGES}, {"drop_layers": 1, "ratio": 0.6, **EDGES}
STEP = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def pruned(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, options) -> (base folder, pruned folder, plan), with random layers dropped; made once."""
    made: dict[str, tuple[Path, Path, PruningPlan]] = {}

    def get(family: str, options: dict[str, Any]) -> tuple[Path, Path, PruningPlan]:
        if (key := f"{family} {options}") not in made:
            out = tmp_path_factory.mktemp("pruned") / family
            made[key] = tiny_models[family], out, loram.prune(tiny_models[family], out, criterion="random", **options)
        return made[key]

    return get


def zeroed(base: Path, plan: PruningPlan) -> Any:
    """The full model with every tensor of its dropped layers, and what the others lost, set to zero."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if plan.drops(name):
                parameter.zero_()
            else:
                parameter.copy_(loram.widen(name, loram.narrow(name, parameter, plan), plan))
    return model.eval()


def check_law_2(base: Path, folder: Path, plan: PruningPlan) -> None:
    small, full = loram.load_pruned(folder).eval(), zeroed(base, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters()[1] < plan.parameters()[0]
    with torch.inference_mode():
        assert relative(small(TOKENS).logits, full(TOKENS).logits) <= 1e-5
        untouched = AutoModelForCausalLM.from_pretrained(base).eval()
        assert relative(untouched(TOKENS).logits, full(TOKENS).logits) > 1e-2
        options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
        mask = torch.ones_like(TOKENS)
        mask[1, :3] = 0  # padded on the left
        assert torch.equal(*(model.generate(TOKENS, attention_mask=mask, **options) for model in (small, full)))


@pytest.mark.parametrize("family", [name for name in EVERY_FAMILY if ARCHITECTURES[name].adds_only])
def test_law_2_pruned_equals_zeroed(family: str, pruned: Any) -> None:
    base, folder, plan = pruned(family, MIXED)
    assert (len(plan.dropped), len(plan.layers)) == (1, 2)
    check_law_2(base, folder, plan)


@pytest.mark.parametrize("family", ["llama", "gemma2", *EXPERTS, *HYBRIDS, *HYBRID_EXPERTS])
def test_law_2_where_nothing_is_narrowed(family: str, pruned: Any) -> None:
    base, folder, plan = pruned(family, ALONE)
    assert (len(plan.dropped), plan.layers, plan.ratio) == (2, {}, None)
    check_law_2(base, folder, plan)
    before, after = Checkpoint(base), Checkpoint(folder)
    assert set(before.names()) - set(after.names()) == {name for name in before.names() if plan.drops(name)}
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in after.names())


@pytest.mark.parametrize("family", ["gemma2", "phi3", "olmo2"])
def test_laws_1_and_3(family: str, pruned: Any, tmp_path: Path) -> None:
    base, folder, plan = pruned(family, MIXED)
    for name in (checkpoint := Checkpoint(base)).names():
        full = checkpoint.tensor(name)
        if plan.drops(name):
            with pytest.raises(UserError, match=f"{name}: the plan drops layer {plan.dropped[0]}"):
                loram.narrow(name, full, plan)
            continue
        small = loram.narrow(name, full, plan)
        assert torch.equal(loram.narrow(name, loram.widen(name, small, plan), plan), small)
    adapter = random_adapter(loram.load_pruned(folder), tmp_path / "adapter", target_modules=targets_of(family))
    plan.save(adapter)
    loram.recover(adapter, tmp_path / "recovered")
    small_model = PeftModel.from_pretrained(loram.load_pruned(folder), adapter).eval()
    full_model = PeftModel.from_pretrained(zeroed(base, plan), tmp_path / "recovered").eval()
    with torch.inference_mode():
        assert relative(small_model(TOKENS).logits, full_model(TOKENS).logits) <= 1e-5
        assert relative(full_model(TOKENS).logits, zeroed(base, plan)(TOKENS).logits) > 1e-2


@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_on_experts_recover(family: str, pruned: Any, tmp_path: Path) -> None:
    base, folder, plan = pruned(family, ALONE)
    experts = [tensor.name for tensor in plan.architecture.expert_matrices]
    options = {"target_modules": ["q_proj"], "target_parameters": experts}
    adapter = random_adapter(loram.load_pruned(folder), tmp_path / "adapter", **options)
    plan.save(adapter)
    loram.recover(adapter, tmp_path / "recovered")
    small = PeftModel.from_pretrained(loram.load_pruned(folder), adapter).eval()
    full = PeftModel.from_pretrained(zeroed(base, plan), tmp_path / "recovered").eval()
    with torch.inference_mode():
        assert relative(small(TOKENS).logits, full(TOKENS).logits) <= 1e-5
        assert relative(full(TOKENS).logits, zeroed(base, plan)(TOKENS).logits) > 1e-2


ELSEWHERE = """
import sys, torch, warnings
warnings.simplefilter("error", UserWarning)
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
tokens = torch.arange(3, 15)[None]
pruned = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(pruned(tokens).logits.double().sum().item())
for folder in sys.argv[2:]:
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    with torch.inference_mode():
        a, b = model(tokens).logits, base(tokens).logits
    print(((a - b).abs().max() / b.abs().max()).item())
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
"""


def test_law_4_recovered_adapters_are_plain_peft(pruned: Any, tmp_path: Path) -> None:
    """By whatever words the adapter's config names its modules, nothing is missing in the layers that were dropped.

    The pruned folder, too, loads where loram is not imported.
    """
    targets = {"names": targets_of("qwen3"), "regex": r".*\.(q_proj|down_proj)", "head": ["up_proj", "lm_head"]}
    folders = []
    for number, (name, modules) in enumerate(targets.items()):
        _, folder, plan = pruned("qwen3", ALONE if number else MIXED)
        adapter = random_adapter(loram.load_pruned(folder), tmp_path / name, target_modules=modules)
        plan.save(adapter)
        loram.recover(adapter, tmp_path / f"recovered-{name}")
        folders.append(str(tmp_path / f"recovered-{name}"))
        recovered = Adapter.load(tmp_path / f"recovered-{name}")
        assert recovered.config["target_modules"] == sorted(recovered.modules)
        assert not any(plan.drops(module) for module in recovered.modules)
    done = elsewhere(ELSEWHERE, str(folder), *folders, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower()
    total, *changes = map(float, done.stdout.split())
    with torch.inference_mode():
        expected = loram.load_pruned(folder).eval()(torch.arange(3, 15)[None]).logits.double().sum().item()
    assert total == pytest.approx(expected, rel=1e-5)
    assert len(changes) == len(folders)
    assert min(changes) > 1e-2


def test_law_5_a_loaded_folder_is_saved_as_it_was(pruned: Any, tmp_path: Path) -> None:
    _, folder, plan = pruned("llama", MIXED)
    plan.save(tmp_path)
    loram.load_pruned(folder).save_pretrained(tmp_path)
    for name in ("loram_plan.json", "config.json", "modeling_loram.py"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((folder / "config.json").read_text())["dropped_layers"] == list(plan.dropped)
    assert PruningPlan.load(tmp_path) == plan


def test_folders_without_dropped_layers_do_not_mention_them(pruned: Any) -> None:
    _, folder, _ = pruned("llama", {"ratio": 0.6, **EDGES})
    assert "dropped" not in (folder / "loram_plan.json").read_text()
    assert "dropped" not in (folder / "config.json").read_text()


def weak_layer(base: Path, out: Path, layer: int) -> Path:
    """A copy of a model whose layer hardly changes its input."""
    out.mkdir()
    for path in base.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    weights = load_file(out / "model.safetensors")
    for name, tensor in weights.items():
        if name.startswith(f"model.layers.{layer}.") and ("o_proj" in name or "down_proj" in name):
            tensor *= 1e-3
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("criterion", [None, *(name for name in CRITERIA if name != "random")])
def test_the_layer_that_changes_its_input_least_is_dropped(
    criterion: str | None, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the base's layers are read at most twice."""
    base = weak_layer(tiny_models["llama"], tmp_path / "base", 2)
    reads: Counter[str] = Counter()
    read, blocks = Checkpoint.tensor, Checkpoint.blocks

    def counted(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        reads[name] += start == 0 and (stop is None or stop > 1)  # no single row, as for fingerprints
        return read(self, name, start, stop)

    def counted_blocks(self: Checkpoint, name: str) -> Any:
        reads[name] += 1
        return blocks(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    monkeypatch.setattr(Checkpoint, "blocks", counted_blocks)
    options = {"ratio": 0.5, "criterion": criterion} if criterion else {}
    plan = loram.prune(base, tmp_path / "out", drop_layers=1, **EDGES, **options)
    assert plan.dropped == (2,)
    assert set(plan.layers) == ({1, 3} if criterion else set())
    assert plan.criterion == (criterion or "block_influence")
    assert max(count for name, count in reads.items() if ".layers." in name) <= 2


def test_influence_is_that_of_the_whole_model(tiny_llama: Path) -> None:
    checkpoint, samples = open_model(tiny_llama), [[5, 9, 40, 7, 77, 30, 8], [6, 3, 12]]
    influence = Influence()
    for _ in calibration_stream(checkpoint, samples).forward(observe_layer=influence.observe):
        pass
    model, changes = load_model(checkpoint).eval(), dict[int, list[torch.Tensor]]()
    for index, layer in enumerate(model.model.layers):

        def note(_: Any, args: Any, output: torch.Tensor, index: int = index) -> None:
            changes.setdefault(index, []).append(1 - cosine_similarity(args[0][0], output[0], dim=-1))

        layer.register_forward_hook(note)
    with torch.inference_mode():
        for sample in samples:
            model(torch.tensor([sample]))
    expected = {index: torch.cat(parts).mean().item() for index, parts in changes.items()}
    assert influence.scores() == pytest.approx(expected, rel=1e-4)


def test_the_same_seed_drops_the_same_layers(tiny_llama: Path, tmp_path: Path) -> None:
    plans = {
        name: loram.prune(tiny_llama, tmp_path / name, criterion="random", seed=seed, **ALONE)
        for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2), ("e", 3))
    }
    assert plans["a"] == plans["b"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert len({plan.dropped for plan in plans.values()}) > 1


def test_the_first_layer_of_each_kind_of_attention_stays(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Layers 0, 2 and 4 of the tiny Gemma have a sliding window, and 1 and 3 none."""
    options = {"criterion": "random", "keep_first": 0, "keep_last": 0}
    plan = loram.prune(tiny_models["gemma2"], tmp_path / "out", drop_layers=3, **options)
    assert plan.dropped == (2, 3, 4)
    check_law_2(tiny_models["gemma2"], tmp_path / "out", plan)
    with pytest.raises(
        UserError,
        match="4 layers cannot be dropped: only 3 of 5 can, since keep_first",
    ):
        loram.prune(tiny_models["gemma2"], tmp_path / "more", drop_layers=4, **options)


def test_the_last_layer_with_a_state_stays(tiny_models: dict[str, Path]) -> None:
    """Of the tiny Qwen 3.5's layers, 3 alone has attention. transformers asks 4 whether there is a state."""
    edges = {"keep_first": 0, "keep_last": 0}
    assert loram.estimate(tiny_models["qwen3_5_text"], drop_layers=2, **edges).dropped_layers == 2
    with pytest.raises(UserError, match="3 layers cannot be dropped: only 2 of 5 can"):
        loram.estimate(tiny_models["qwen3_5_text"], drop_layers=3, **edges)


def test_all_stages(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    """Align, train in 4 bits with anchors, recover with correction, polish, merge and evaluate."""
    small, aligned, adapter, recovered, polished, merged = (tmp_path / name for name in "abcdef")
    plan = loram.prune(tiny_llama, small, calibration=rows_file, calibration_samples=4, refit=False, **MIXED)
    align = {"max_steps": 2, "per_device_train_batch_size": 2}
    loram.align(small, aligned, data=rows_file, trainer=align, probe_steps=2)
    train = {"trainer": {**STEP, "gradient_checkpointing": True}, "load_in_4bit": True, "anchor_steps": 2}
    loram.train(aligned, adapter, data=rows_file, **train)
    loram.recover(adapter, recovered, correct=True, dev_dataset=rows_file)
    loram.polish(tiny_llama, recovered, polished, data=rows_file, max_steps=1)
    loram.merge(tiny_llama, polished, merged)
    for model, chosen in ((small, None), (aligned, adapter), (tiny_llama, recovered), (tiny_llama, polished)):
        losses = [loram.evaluate(model, adapter=chosen, data=rows_file, stream=stream).loss for stream in (False, True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(loram.evaluate(merged, data=rows_file).loss, rel=1e-4)
    assert not any(plan.drops(name) for name in Adapter.load(polished).modules)
    before, after = (load_file(path / "model.safetensors") for path in (tiny_llama, merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(plan.drops(name) for name in changed)


@pytest.mark.parametrize("method", ["lisa", "full", "dora"])
def test_methods(method: str, pruned: Any, rows_file: Path, tmp_path: Path) -> None:
    base, folder, plan = pruned("llama", MIXED)
    own = {"lisa": {"active_layers": 4, "interval_steps": 1}} if method == "lisa" else {}
    options = {"trainer": {**STEP, "learning_rate": 1e-3}, "lora": {"r": 2}, **own}
    loram.train(folder, tmp_path / "adapter", data=rows_file, method=method, **options)
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    recovered = Adapter.load(tmp_path / "recovered")
    assert {plan.architecture.split(name)[0] for name in recovered.modules} == set(range(5)) - set(plan.dropped)
    assert math.isfinite(loram.evaluate(base, adapter=tmp_path / "recovered", data=rows_file).loss)
    if method == "lisa":
        with pytest.raises(UserError, match=r"lisa.active_layers: 5, but the model has 4 layers"):
            loram.train(
                folder, tmp_path / "x", data=rows_file, method=method, **{**options, "lisa": {"active_layers": 5}}
            )


@pytest.mark.parametrize("options", [ALONE, MIXED], ids=["alone", "mixed"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "olmo2"])
def test_the_planner_counts_what_is_built(family: str, options: dict[str, Any], pruned: Any) -> None:
    base, folder, plan = pruned(family, options)
    found = loram.estimate(base, **options)
    assert (found.parameters, found.pruned_parameters) == plan.parameters()
    assert (found.dropped_layers, found.pruned_layers) == (len(plan.dropped), len(plan.layers))
    config = json.loads((base / "config.json").read_text())
    sizes = Model.of(config, "config", PruneOptions(**options).resolved())
    model: Any = load_4bit(open_model(folder), device=torch.device("cpu"), dtype=torch.float32)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert frozen_bytes(sizes, make_settings(device="cpu", load_in_4bit=True)).total == nbytes(model) - buffers
    whole = loram.estimate(base)
    assert found.training.activations < whole.training.activations
    assert found.arithmetic.flops_per_token < whole.arithmetic.flops_per_token
    assert [stage.name for stage in found.stages if "prune" in stage.name]


def test_the_dry_run_counts_what_is_built(tiny_llama: Path, rows_file: Path, tmp_path: Path, pruned: Any) -> None:
    _, folder, plan = pruned("llama", ALONE)
    values = {"output_dir": tmp_path / "out", "dataset": str(rows_file), "train": {"trainer": {"max_steps": 1}}}
    before = dry_run(Recipe.model_validate({"model_name_or_path": str(tiny_llama), "prune": ALONE, **values}))
    after = dry_run(Recipe.model_validate({"model_name_or_path": str(folder), **values}))
    for found in (before, after):
        assert (found.parameters, found.pruned_parameters) == plan.parameters()
        assert found.training["pruned"].parameters == plan.parameters()[1]
        assert found.training["pruned"].memory is not None
    assert before.calibration is not None
    (counts,) = before.dataset.values()
    planned = loram.estimate(tiny_llama, device="cpu", max_length=counts.longest, **ALONE)
    assert before.training["pruned"].memory == planned.training


def test_the_commands(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--drop-layers", "2", "--keep-first", "1", "--keep-last", "1"]
    assert cli._main(["prune", str(tiny_llama), str(tmp_path / "out"), *flags]) == 0
    assert cli._main(["estimate", str(tiny_llama), *flags]) == 0
    printed = capfd.readouterr().out
    before, after = PruningPlan.load(tmp_path / "out").parameters()
    assert f"{before:,} -> {after:,} parameters" in printed
    assert "2 layers are dropped" in printed
    assert cli._main(["estimate", str(tiny_llama), "--memory", "1GiB", *flags]) == 2
    assert "leave --pattern and --drop-layers out" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_layers": 4}, "4 layers cannot be dropped: only 3 of 5 can"),
        ({"drop_layers": 3, "ratio": 0.5}, "drop_layers 3: leaves no layer to narrow; leave the ratio out"),
        ({"drop_layers": 1, "pattern": "2:4"}, "drop_layers: is for structured pruning; pattern 2:4 keeps every layer"),
        ({"drop_layers": 1, "criterion": "taylor"}, "'taylor' is not for dropping layers without a ratio; known are"),
        ({"ratio": 0.5, "criterion": "block_influence"}, "'block_influence' is not for pattern structured"),
        ({"drop_layers": 1, "bias_compensation": True}, "bias_compensation: is for narrowed layers"),
        ({"drop_layers": -1}, "drop_layers"),
        ({}, "ratio: missing"),
    ],
    ids=str,
)
def test_options_that_are_refused(options: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        loram.prune(tiny_llama, tmp_path / "out", **EDGES, **options)
    assert "\n" not in str(raised.value)
    if options and options.keys() <= PRUNING.keys():
        with pytest.raises(UserError, match=message):
            loram.estimate(tiny_llama, **EDGES, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropped": (0,)}, "dropped: layers must lie in 1..3"),
        ({"dropped": (4,)}, "dropped: layers must lie in 1..3"),
        ({"dropped": (3, 2)}, "dropped: layers must be sorted and distinct"),
        ({"dropped": ()}, "ratio: missing"),
        ({"layers": {2: {"channels": (1,)}}, "ratio": 0.5}, "layer 2 is dropped, and keeps units"),
        ({"layers": {1: {"channels": (1,)}}}, "ratio: missing"),
        ({"pattern": "2:4", "masks": "", "ratio": 0.5}, "a sparse plan drops no layers"),
    ],
    ids=str,
)
def test_plans_that_are_refused(changes: dict[str, Any], message: str, pruned: Any) -> None:
    _, _, plan = pruned("llama", ALONE)
    values = {**plan.model_dump(), "dropped": (2, 3), **changes}
    with pytest.raises(ValidationError, match=message):
        PruningPlan.model_validate(values)


def test_liger_is_refused(pruned: Any, rows_file: Path, tmp_path: Path) -> None:
    _, folder, _ = pruned("llama", ALONE)
    with pytest.raises(UserError, match="use_liger_kernel"):
        loram.train(folder, tmp_path / "out", data=rows_file, trainer={**STEP, "use_liger_kernel": True})
