"""LoRA on experts: from training over recovery to merging, against PEFT's own code; and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, random_adapter, relative
from helpers import WithoutExperts, zeroed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
from loram.disk.adapter import Adapter, save_adapter
from loram.disk.checkpoint import Checkpoint
from loram.disk.expert_factors import by_expert, together
from loram.model.experts import EXPERT_CHANNELS, EXPERT_UNITS
from loram.model.families import ARCHITECTURES
from loram.model.plan import PruningPlan
from loram.training.methods.lora_fa import LORA_FA
from loram.training.options import TrainOptions, resolve

# with a layer without experts, with names of their own in files, and with transposed tensors
TRAINED = ("qwen3_moe", "mixtral", "gpt_oss")
on_every_mixture = pytest.mark.parametrize("family", EXPERTS)
on_trained = pytest.mark.parametrize("family", TRAINED)
TOKENS = torch.tensor([[5, 17, 40, 8, 77, 30, 12, 9, 61, 3, 22, 50], [9, 9, 31, 70, 2, 44, 6, 18, 25, 81, 90, 7]])
TRAINER = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def pruned(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (base folder, pruned folder, plan); made once."""
    made: dict[str, tuple[Path, Path, PruningPlan]] = {}
    ratios = {"ratio": 0.5, "expert_channels_ratio": 0.5}

    def get(family: str) -> tuple[Path, Path, PruningPlan]:
        if family not in made:
            base, out = tiny_models[family], tmp_path_factory.mktemp("pruned") / family
            plan = loram.prune(base, out, criterion="random", keep_first=1, keep_last=1, **ratios)
            made[family] = base, out, plan
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


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS).logits


def by_hand(plan: PruningPlan) -> PruningPlan:
    """Layer 2 keeps some experts and channels of these, layer 3 channels of all experts, and layer 4 experts."""
    experts, width = plan.geometry.units(EXPERT_UNITS), plan.geometry.per_unit(EXPERT_CHANNELS)
    channels = {
        layer: tuple(sorted(e * width + (3 * e + i) % width for e in kept for i in range(layer)))
        for layer, kept in {2: (0, 2, 5), 3: range(experts)}.items()
    }
    layers = {
        2: {"experts": (0, 2, 5), "expert_channels": channels[2]},
        3: {"expert_channels": channels[3]},
        4: {"experts": (1, 2)},
    }
    return plan.model_copy(update={"layers": layers})


@on_every_mixture
def test_factors_are_widened_as_the_weight_is(family: str, pruned: Any) -> None:
    """`narrow` undoes `widen`, and the update of the widened factors is the widened update."""
    plan = by_hand(pruned(family)[2])
    torch.manual_seed(0)
    full, small = (plan.geometry.expert_shapes(plan.architecture, *units) for units in ((), (plan.units,)))
    cut = 0
    for layer in plan.layers:
        for tensor in experts_of(family):
            name = f"model.layers.{layer}.{tensor}"
            experts, outputs, inputs = small[name]
            factors, wide = (torch.randn(experts * 3, inputs), torch.randn(outputs, 3 * experts)), []
            for part, factor in zip("AB", factors, strict=True):
                key = f"base_model.model.{name}.lora_{part}.weight"
                wide.append(loram.widen(key, factor, plan))
                assert torch.equal(loram.narrow(key, wide[-1], plan), factor)
                assert wide[-1].count_nonzero() == factor.numel()
                cut += wide[-1].shape != factor.shape
            each, wide_each = by_expert(*factors, experts), by_expert(*wide, full[name][0])
            assert all(map(torch.equal, together(*each), factors))
            update, wide_update = each[1] @ each[0], wide_each[1] @ wide_each[0]
            if plan.architecture.experts_transposed:
                update, wide_update = update.mT, wide_update.mT
            assert relative(wide_update, loram.widen(name, update, plan)) <= 1e-6
    assert cut == 4 + 2 + 4  # where experts go, all factors; else gate_up_proj's lora_B and down_proj's lora_A


def test_factors_of_other_models_are_refused(pruned: Any) -> None:
    name, plan = "model.layers.2.mlp.experts.down_proj.lora_A.weight", pruned("mixtral")[2]
    with pytest.raises(
        loram.UserError, match=r"dimension 0 of shape .* should be a multiple of 3, the number of experts"
    ):
        loram.widen(name, torch.ones(7, 8), plan)
    with pytest.raises(loram.UserError, match=r"dimension 2 of shape .* should be 8"):
        loram.widen(name, torch.ones(6, 7), plan)


@pytest.mark.parametrize(
    ("family", "only_last"), [*((family, False) for family in EXPERTS), ("mixtral", True), ("gpt_oss", True)]
)
def test_law_3_pruned_adapter_equals_recovered_adapter(
    family: str, only_last: bool, pruned: Any, tmp_path: Path
) -> None:
    base, folder, plan = pruned(family)
    options = {"target_modules": [], "target_parameters": experts_of(family)[-1:]} if only_last else {}
    adapter = adapter_on(folder, tmp_path / "adapter", family, use_rslora=True, **options)
    loram.recover(adapter, tmp_path / "recovered")
    small = PeftModel.from_pretrained(loram.load_pruned(folder), adapter)
    model = zeroed(base, plan)
    with WithoutExperts(model, plan):
        before = logits(model)
        after = logits(PeftModel.from_pretrained(model, tmp_path / "recovered"))
    assert relative(logits(small), after) <= 1e-5
    assert relative(after, before) > 1e-3  # the adapter does something


def test_layers_that_were_dropped_get_no_factors(
    tiny_models: dict[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base, folder = tiny_models["mixtral"], tmp_path / "pruned"
    plan = loram.prune(base, folder, drop_layers=2, experts_ratio=0.5, criterion="random", keep_first=1, keep_last=0)
    adapter = adapter_on(folder, tmp_path / "adapter", "mixtral")
    recovered = loram.recover(adapter, tmp_path / "recovered")
    assert not any(plan.drops(module) for module in Adapter.load(recovered).modules)
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), recovered)
    assert not any("missing" in str(warning.message) for warning in recwarn)
    merged = AutoModelForCausalLM.from_pretrained(loram.merge(base, recovered, tmp_path / "merged"))
    assert relative(logits(merged), logits(full)) <= 1e-5


PLAIN_PEFT = """
import sys, torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
tokens = torch.tensor(eval(sys.argv[1]))
for folder in sys.argv[2:]:
    base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(folder).base_model_name_or_path).eval()
    with torch.inference_mode():
        plain = base(tokens).logits
        model = PeftModel.from_pretrained(base, folder).eval()
        adapted = model(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
    save_file({"plain": plain, "adapted": adapted, "merged": merged}, f"{folder}/logits.safetensors")
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def recovered(pruned: Any, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> an adapter trained on attention and experts, and recovered; with the logits of plain PEFT beside it."""
    root, folders = tmp_path_factory.mktemp("recovered"), {}
    for family in TRAINED:
        trained, lora = root / f"{family}-trained", {"target_parameters": "experts"}
        loram.train(pruned(family)[1], trained, data=rows_file, lora=lora, trainer=TRAINER)
        folders[family] = loram.recover(trained, root / family)
    command = [sys.executable, "-c", PLAIN_PEFT, str(TOKENS.tolist()), *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower()
    assert "unexpected" not in done.stderr.lower()
    return folders


@on_trained
def test_trained_on_attention_and_experts(family: str, recovered: dict[str, Path]) -> None:
    folder = recovered[family].parent / f"{family}-trained"
    config, adapter = json.loads((folder / "adapter_config.json").read_text()), Adapter.load(folder)
    assert config["target_parameters"] == sorted(experts_of(family))
    assert config["target_modules"] == sorted(ARCHITECTURES[family].default_targets)
    assert config["lora_dropout"] == 0
    assert {adapter.rank(module) for module in adapter.modules} == {8}
    assert {module.split(".", 3)[3] for module in adapter.of_experts} == set(experts_of(family))
    assert all(factors["B"].any() for factors in adapter.modules.values())  # all of them have trained


@on_trained
def test_plain_peft_loads_and_merge_agrees(
    family: str, recovered: dict[str, Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    theirs, base = load_file(recovered[family] / "logits.safetensors"), Checkpoint(tiny_models[family])
    assert relative(theirs["adapted"], theirs["plain"]) > 1e-2
    merged = loram.merge(tiny_models[family], recovered[family], tmp_path / "merged")
    assert Checkpoint(merged).whole.names() == base.whole.names()
    assert relative(logits(AutoModelForCausalLM.from_pretrained(merged)), theirs["merged"]) <= 1e-5
    stacked = tmp_path / "stacked"  # the same model in files that have 3-D tensors
    stacked.mkdir()
    save_file({name: base.tensor(name) for name in base.names()}, stacked / "model.safetensors", {"format": "pt"})
    (stacked / "config.json").write_text((tiny_models[family] / "config.json").read_text())
    again = Checkpoint(loram.merge(stacked, recovered[family], tmp_path / "again"))
    assert again.whole.names() == base.names()
    assert all(torch.equal(again.tensor(name), Checkpoint(merged).tensor(name)) for name in base.names())


@on_trained
def test_streamed_equals_loaded(
    family: str, recovered: dict[str, Path], pruned: Any, rows_file: Path, tmp_path: Path
) -> None:
    """With the recovered adapter on the full model; and the multiplier, which streams."""
    base, trained = pruned(family)[0], recovered[family].parent / f"{family}-trained"
    loaded, streamed = (
        loram.evaluate(base, adapter=recovered[family], data=rows_file, max_samples=3, stream=stream)
        for stream in (False, True)
    )
    assert streamed.loss == pytest.approx(loaded.loss, rel=1e-6)
    assert streamed.parameters == loaded.parameters
    data = {"path": str(rows_file), "max_samples": 3}
    out = loram.recover(trained, tmp_path / "multiplied", dev_dataset=data, correct=True)
    losses = json.loads((out / "loram_manifest.json").read_text())["settings"]["dev_losses"]
    assert losses["1.0"] == pytest.approx(loaded.loss, rel=1e-5)  # nothing was to be corrected


def test_correction_is_per_expert(pruned: Any, tmp_path: Path) -> None:
    """A changed expert changes its own factors, and no other's."""
    _, folder, plan = pruned("mixtral")
    adapter = adapter_on(folder, tmp_path / "adapter", "mixtral", base_model_name_or_path=str(folder))
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in folder.iterdir():
        if path.name != "loram_manifest.json":
            (changed / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.gate_up_proj"
    weights[name][1] += 0.1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    plain, corrected = (
        Adapter.load(loram.recover(adapter, tmp_path / f"{model.name}-out", correct=True, pruned=model))
        for model in (folder, changed)
    )
    difference = (plain.delta(name) - corrected.delta(name)).abs().amax((1, 2))
    expert = plan.layers[2]["experts"][1]
    assert [index for index, size in enumerate(difference.tolist()) if size > 1e-5] == [expert]


@on_trained
def test_read_and_saved_again_is_byte_identical(family: str, recovered: dict[str, Path], tmp_path: Path) -> None:
    adapter = Adapter.load(recovered[family])
    save_adapter(tmp_path, adapter.config, adapter.tensors)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (recovered[family] / name).read_bytes()


def test_adapters_that_do_not_fit_are_refused(pruned: Any, rows_file: Path, tmp_path: Path) -> None:
    base, folder, _ = pruned("mixtral")
    adapter = adapter_on(folder, tmp_path / "adapter", "mixtral")
    with pytest.raises(loram.UserError, match=r"experts.gate_up_proj is for .* \(3, 16, 32\).*run `loram recover`"):
        loram.merge(base, adapter, tmp_path / "out")
    tensors = load_file(adapter / "adapter_model.safetensors")
    left_out = "base_model.model.model.layers.3.mlp.experts.base_layer.lora_"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(loram.UserError, match=f"{left_out}A.weight is missing"):
        loram.recover(adapter, tmp_path / "out")
    config = json.loads((adapter / "adapter_config.json").read_text())
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    with pytest.raises(loram.UserError, match="says rank 7"):
        loram.recover(adapter, tmp_path / "out")
    full = adapter_on(base, tmp_path / "full", "mixtral")
    with pytest.raises(loram.UserError, match="adapts experts, and only adapters on linears can be trained further"):
        loram.polish(base, full, tmp_path / "out", data=rows_file)


def test_the_loss_of_routers_is_added(pruned: Any, rows_file: Path, tmp_path: Path) -> None:
    _, folder, _ = pruned("mixtral")  # its layers have unlike numbers of experts
    losses = []
    for coefficient in (0.0, 0.5):
        out = tmp_path / str(coefficient)
        trainer = {"max_steps": 1, "router_aux_loss_coef": coefficient}
        loram.train(folder, out, data=rows_file, trainer={**TRAINER, **trainer}, anchor_steps=0)
        losses.append(json.loads((out / "training_log.jsonl").read_text().splitlines()[0])["loss"])
    assert 0.5 * 1.9 <= losses[1] - losses[0] <= 0.5 * 6  # of 6 experts, even use gives 2; more is at most 6


MOE, DENSE = ARCHITECTURES["qwen3_moe"], ARCHITECTURES["llama"]
TARGETS = {"target_parameters": ["experts"]}


def test_targets_and_their_defaults() -> None:
    assert resolve(TrainOptions(), MOE).lora["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    chosen = resolve(TrainOptions(lora=TARGETS), MOE).lora
    assert chosen["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    one = {"target_parameters": "mlp.experts.down_proj", "target_modules": []}
    assert resolve(TrainOptions(lora=one), MOE).lora["target_parameters"] == ["mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("options", "row", "message"),
    [
        ({"lora": {"target_parameters": ["mlp.experts.w1"]}}, MOE, "'mlp.experts.w1'; known are experts, mlp.experts"),
        ({"lora": {"target_parameters": 3}}, MOE, "target_parameters is 3"),
        ({"lora": TARGETS}, DENSE, "llama has none"),
        ({"trainer": {"router_aux_loss_coef": 0.1}}, DENSE, "router_aux_loss_coef: llama has no experts"),
        ({"trainer": {"router_aux_loss_coef": 0.1}}, ARCHITECTURES["glm4_moe"], "steers its router by a bias"),
        ({"lora": {**TARGETS, "lora_dropout": 0.1}}, MOE, "needs lora_dropout 0"),
        ({"lora": {**TARGETS, "init_lora_weights": "eva"}}, MOE, "'eva' is for linears"),
        ({"lora": {**TARGETS, "rank_pattern": {"down_proj": 4}}}, MOE, "rank_pattern has 'down_proj'"),
        ({"lora": TARGETS, "method": "dora"}, MOE, "is for methods lora and rslora and lora-fa"),
        ({"lora": TARGETS, "method": "lora-sp"}, MOE, "and the method is lora-sp"),
        ({"lora": TARGETS, "mask_update": True}, MOE, "mask_update: masks the updates of linears"),
        ({"lora": TARGETS, "anchor_steps": 8}, MOE, "anchor_steps: measures .* drop target_parameters"),
        ({"lora": {"target_modules": ["q_proj", "gate_proj"]}}, MOE, "'gate_proj', which PEFT takes for experts"),
        ({"lora": {"target_modules": "all-linear"}}, MOE, "take q_proj, k_proj, v_proj, o_proj, and target_parameters"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], row: Any, message: str) -> None:
    with pytest.raises(loram.UserError, match=message) as caught:
        resolve(TrainOptions(**options), row)
    assert "\n" not in str(caught.value)


def test_weights_whose_adapter_peft_would_misread_do_not_train(pruned: Any, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match=r"method full: .* takes 'gate_proj' in qwen3_moe for experts"):
        loram.train(pruned("qwen3_moe")[1], tmp_path / "out", data=rows_file, method="full")


def test_lora_fa_trains_only_lora_b(pruned: Any) -> None:
    config = LoraConfig(target_modules=["q_proj"], target_parameters=experts_of("mixtral"), task_type="CAUSAL_LM")
    model = get_peft_model(loram.load_pruned(pruned("mixtral")[1]), config)
    LORA_FA.specialise_(model, None, pruned=True)
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(trained) == 5 * 3
    assert all(".lora_B." in name for name in trained)
