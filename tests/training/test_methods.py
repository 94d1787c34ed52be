"""Every method trains, recovers and resumes, and it trains and keeps the tensors that it promises."""

import importlib
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, relative, targets_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import loram
from loram import cli
from loram.base.size import show_size
from loram.disk.adapter import ROW_LENGTHS_NAME, Adapter
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import BaseReference, PruningPlan
from loram.planner.settings import PLANNED
from loram.run.dry_run import dry_run
from loram.run.pipeline import run
from loram.run.recipe import Recipe, load_recipe
from loram.training.methods.dora import row_lengths
from loram.training.methods.layer_draws import LayerDraws
from loram.training.methods.lora_sp import LoraSpOptions, frozen_ranks
from loram.training.methods.table import METHODS as EVERY

METHODS = {name: method for name, method in EVERY.items() if method.learns == "text"}  # others: test_preference.py
TOKENS = torch.tensor([[5, 17, 40, 8, 77, 30, 12, 9, 61, 3, 22, 50]])
STEPS: dict[str, Any] = {"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2}
OWN: dict[str, dict[str, Any]] = {"lisa": {"lisa": {"active_layers": 2, "interval_steps": 3}}}
WEIGHTS = [name for name, method in METHODS.items() if method.weights]
ADAPTERS = [name for name, method in METHODS.items() if not method.weights]


def train(model: Path, out: Path, rows: Path, method: str, **options: Any) -> Path:
    trainer = {**STEPS, **options.pop("trainer", {})}
    return loram.train(model, out, data=rows, method=method, trainer=trainer, **{**OWN.get(method, {}), **options})


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(TOKENS).logits
    return found


def test_the_table_imports_nothing_heavy() -> None:
    """The command line and the planner read it."""
    code = "import sys, loram.training.methods.table; assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", METHODS)
def test_the_quickstart_runs_with_any_method(
    method: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the name of the method changes in the recipe. The loss falls during the training and on the rows."""
    tiny = {
        "model_name_or_path": tiny_models["qwen2"],
        "output_dir": tmp_path / "run",
        "dataset": rows_file,
        "eval_dataset": rows_file,
        "device": "cpu",
        "prune": "{ratio: 0.5, criterion: magnitude, keep_first: 1, keep_last: 1}",
        "train.trainer.learning_rate": 1e-2,
        "train.trainer.max_steps": 8,
        "train.trainer.logging_steps": 1,
        "evaluate.full_lora": str(method in WEIGHTS).lower(),
    }
    overrides = [f"{key}={value}" for key, value in {**tiny, "train.method": method}.items()]
    overrides += ["polish=null"] if method == "dora" else []
    quickstart = Path(__file__).parents[2] / "loram" / "recipes" / "quickstart.yaml"
    rows = {row.name: row for row in run(load_recipe(quickstart, overrides)).rows}
    assert ("has no use for lora.lora_alpha" in caplog.text) == (method in WEIGHTS)
    losses = [entry["loss"] for entry in log(tmp_path / "run" / "adapter") if "loss" in entry]
    assert losses[-1] < losses[0]
    assert rows["pruned + adapter"].perplexity["eval"] < rows["pruned"].perplexity["eval"]
    assert rows["recovered"].perplexity["eval"] != rows["base"].perplexity["eval"]
    if method in WEIGHTS:  # the method trains a model and no adapter
        assert rows["full LoRA"].perplexity["eval"] < rows["base"].perplexity["eval"]
    config = json.loads((tmp_path / "run" / "recovered" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]), tmp_path / "run" / "recovered"
    )
    assert relative(logits(plain), logits(plain.unload())) > 1e-4


class Stopped(BaseException):
    """The exception that a test raises in a training."""


@pytest.mark.parametrize(
    ("method", "whole", "optim"),
    [
        *((method, False, "adamw_torch_fused") for method in METHODS),
        *((method, True, "adamw_torch_fused") for method in WEIGHTS),
        ("lisa", True, "adamw_8bit"),
    ],
)
def test_resumed_is_the_same_as_undisturbed(
    method: str,
    whole: bool,
    optim: str,
    tiny_models: dict[str, Path],
    pruned_models: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"trainer": {"optim": optim}}
    model = (tiny_models if whole else pruned_models)["qwen3"]
    expected = contents(train(model, tmp_path / "a", rows_file, method, **options))
    count, step = itertools.count(1), Trainer.training_step

    def training_step(self: Trainer, *args: Any, **options: Any) -> Any:
        if next(count) == 8:  # LISA draws layers again at step 6, so by now they have changed
            raise Stopped
        return step(self, *args, **options)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(Stopped):
        train(model, tmp_path / "b", rows_file, method, **options)
    monkeypatch.undo()
    with caplog.at_level(logging.INFO, "loram"):
        train(model, tmp_path / "b", rows_file, method, **options)
    assert "going on from checkpoint-6" in caplog.text
    assert contents(tmp_path / "b") == expected


@pytest.mark.parametrize("method", ["lora-sp", "dora", "full"])
def test_a_training_that_is_over_is_only_written(
    method: str, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(train(pruned_models["qwen3"], tmp_path / "a", rows_file, method))
    stage = importlib.import_module("loram.training.train")

    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(stage, "write_adapter", stop)
    with pytest.raises(Stopped):
        train(pruned_models["qwen3"], tmp_path / "b", rows_file, method)
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "training_step", stop)
    assert contents(train(pruned_models["qwen3"], tmp_path / "b", rows_file, method)) == expected


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_fa_keeps_a_as_drawn_and_no_input(
    dropout: float, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    options = {"lora": {"r": 4, "lora_dropout": dropout}}
    seen: list[dict[str, Tensor]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            seen.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name})

        def on_step_end(self, *args: Any, model: Any = None, optimizer: Any = None, **rest: Any) -> None:
            assert all(p.grad is None for name, p in model.named_parameters() if "lora_A" in name)
            trained = [p for p in model.parameters() if p.requires_grad]
            assert {id(p) for p in optimizer.state} == {id(p) for p in trained}

    out = train(pruned_models["mistral"], tmp_path / "a", rows_file, "lora-fa", callbacks=[Watch()], **options)
    tensors = load_file(out / "adapter_model.safetensors")
    drawn = {name.replace(".default", ""): tensor for name, tensor in seen[0].items()}
    assert drawn
    assert all(torch.equal(tensors[name], tensor) for name, tensor in drawn.items())
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


class Shapes:
    """Return the shapes of the tensors that autograd saves, without weights and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
        self.found: list[tuple[int, ...]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.known:
            self.found.append(tuple(tensor.shape))
        return tensor


@pytest.mark.parametrize(
    ("method", "dropout", "keeps"),
    [("lora", 0.0, ["x", "z"]), ("lora-fa", 0.0, ["z"]), ("lora-fa", 0.1, ["x", "z"]), ("lora-sp", 0.0, ["x", "z"])],
)
def test_what_an_adapted_linear_keeps_for_backward(method: str, dropout: float, keeps: list[str]) -> None:
    """Only lora_A's gradient needs x (with dropout also its mask, of the same size); lora_B's needs z = lora_A x."""
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(24, 16)), config).train()
    METHODS[method].specialise_(model, LoraSpOptions(share=0.5), pruned=False)
    shapes = Shapes(model)
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(shapes, lambda tensor: tensor):
        model(x)
    sizes = {"x": (5, 24), "z": (5, 2 if method == "lora-sp" else 4)}
    assert sorted(shapes.found) == sorted(sizes[name] for name in keeps)


@pytest.mark.parametrize(("r", "share"), [(8, 0.5), (8, 0.75), (6, 0.5), (5, 0.8), (4, 1.0)])
def test_lora_sp_trains_exactly_the_share(
    r: int, share: float, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """This holds for any shape. Frozen parts have neither gradients nor state, and every rank contributes."""
    counts: dict[str, int] = {}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            for name, module in model.named_modules():
                if name.endswith("_proj"):
                    factors = [p for key, p in module.named_parameters() if "lora_" in key]
                    trained = sum(p.numel() for p in factors if p.requires_grad)
                    assert trained == share * r * (module.in_features + module.out_features)

        def on_step_end(self, *args: Any, model: Any = None, optimizer: Any = None, **rest: Any) -> None:
            trained = [p for p in model.parameters() if p.requires_grad]
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
            state = [tensor.numel() for entry in optimizer.state.values() for tensor in entry.values() if tensor.dim()]
            counts["state"], counts["trained"] = sum(state), sum(p.numel() for p in trained)

    options = {"lora": {"r": r}, "lora_sp": {"share": share}, "trainer": {"max_steps": 2}}
    out = train(pruned_models["llama"], tmp_path / "a", rows_file, "lora-sp", callbacks=[Watch()], **options)
    assert counts["state"] == 2 * counts["trained"]
    adapter = Adapter.load(out)
    total = sum(tensor.numel() for tensor in adapter.tensors.values())
    assert counts["trained"] == share * total
    for factors in adapter.modules.values():
        assert factors["A"].shape[0] == r  # it is a plain adapter of that rank
        assert (factors["A"].norm(dim=1) * factors["B"].norm(dim=0) > 0).all()


def test_the_share_that_an_error_names_can_be_had() -> None:
    with pytest.raises(loram.UserError, match=r"0\.7 of a rank 3 adapter .* the nearest is 0\.666667"):
        frozen_ranks(3, 0.7)
    assert frozen_ranks(3, 0.666667) == 1
    assert [frozen_ranks(8, share) for share in (0.5, 0.625, 1.0)] == [4, 3, 0]


def test_lora_sp_begins_as_the_model_itself() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(24, 16)), LoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(5, 24)
    before = model(x)
    METHODS["lora-sp"].specialise_(model, LoraSpOptions(share=0.5), pruned=False)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    layer = model.base_model.model[0]
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True], ids=["pruned", "full"])
@pytest.mark.parametrize("around", [True, False])
def test_lisa_keeps_state_of_the_active_layers_only(
    whole: bool,
    around: bool,
    tiny_models: dict[str, Path],
    pruned_models: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    model = (tiny_models if whole else pruned_models)["mistral"]
    drawn: list[frozenset[int]] = []
    before: dict[str, Tensor] = {}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})

        def on_step_end(self, *args: Any, model: Any = None, optimizer: Any = None, **rest: Any) -> None:
            names = {id(p): name for name, p in model.named_parameters()}
            state = {names[id(p)] for p in optimizer.state}
            layers = frozenset(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
            others = {name for name in state if not name.startswith("model.layers.")}
            assert len(layers) == 2
            expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
            assert others == (expected if whole and around else set())
            assert state == {name for name, p in model.named_parameters() if p.requires_grad}
            drawn.append(layers)
            for name, p in model.named_parameters():
                changed = not torch.equal(p, before[name])
                assert changed == (name in state), name
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})

    options = {"lisa": {"active_layers": 2, "interval_steps": 3, "train_embeddings": around}}
    train(model, tmp_path / "a", rows_file, "lisa", callbacks=[Watch()], trainer={"weight_decay": 0.1}, **options)
    assert len(drawn) == 8
    assert [len(set(drawn[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("method", ["lisa", "full", "lora-fa", "lora-sp"])
def test_checkpointed_activations_change_nothing(
    method: str, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """This holds although nothing below the first layer that trains has a gradient."""
    options = {"lora": {"lora_dropout": 0.0}} if method in ADAPTERS else {}
    for name, checkpointed in (("a", False), ("b", True)):
        trainer = {"gradient_checkpointing": checkpointed}
        train(pruned_models["llama"], tmp_path / name, rows_file, method, trainer=trainer, **options)
    found, expected = ([entry["loss"] for entry in log(tmp_path / name) if "loss" in entry] for name in "ab")
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


def test_lisas_draws_follow_from_the_seed() -> None:
    def draws(seed: int) -> list[frozenset[int]]:
        lisa = LayerDraws([[]] * 16, active_layers=2, interval_steps=5, seed=seed)
        return [lisa.draw(step) for step in range(200)]

    assert draws(1) == draws(1) != draws(2)
    assert set().union(*draws(1)) == set(range(16))  # every layer is drawn


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"], ids=["tied", "untied", "fused"])
@pytest.mark.parametrize("method", WEIGHTS)
def test_weights_of_a_full_model_make_an_ordinary_model(
    method: str, family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_models[family]).bfloat16()
    base.save_pretrained(tmp_path / "base")
    for path in tiny_models[family].glob("*token*"):
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    out = train(tmp_path / "base", tmp_path / "out", rows_file, method)
    manifest = json.loads((out / "loram_manifest.json").read_text())
    assert manifest["kind"] == "model"
    found, began = Checkpoint(out), Checkpoint(tmp_path / "base")
    assert {name: found.spec(name) for name in found.names()} == {name: began.spec(name) for name in began.names()}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert relative(logits(model).float(), logits(base).float()) > 1e-2
    before = loram.evaluate(tmp_path / "base", data=rows_file, device="cpu").perplexity
    assert loram.evaluate(out, data=rows_file, device="cpu").perplexity < before


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_of_a_pruned_model_only_linears_train_and_a_full_rank_keeps_it_all(
    family: str, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """The extracted update, at a rank no side is above, is the trained model."""
    model, trainer = pruned_models[family], {"save_strategy": "steps", "save_steps": 8}
    out = train(model, tmp_path / "a", rows_file, "full", trainer=trainer)
    trained, began = Checkpoint(tmp_path / "a-checkpoints" / "checkpoint-8"), Checkpoint(model)
    adapter = Adapter.load(out)
    for name in began.names():
        change = trained.tensor(name) - began.tensor(name)
        module = name.removesuffix(".weight")
        if module in adapter.modules:
            assert relative(adapter.delta(module), change) < 1e-5
        else:
            assert not change.any(), name
    share = json.loads((out / "loram_manifest.json").read_text())["settings"]["kept_share"]
    assert share == log(out)[-1]["kept_share"] == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_family_with_fused_linears(
    method: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    out = train(pruned_models["phi3"], tmp_path / "adapter", rows_file, method)
    modules = Adapter.load(loram.recover(out, tmp_path / "recovered")).modules
    assert {module.split(".")[-1] for module in modules} == set(targets_of("phi3"))
    before = loram.evaluate(tiny_models["phi3"], data=rows_file).loss
    assert loram.evaluate(tiny_models["phi3"], adapter=tmp_path / "recovered", data=rows_file).loss != before


def test_targets_of_another_family_are_refused(
    tiny_models: dict[str, Path], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    lora = {"target_modules": ["q_proj", "down_proj"]}
    with pytest.raises(loram.UserError, match="target_modules has 'q_proj'; known are all-linear, qkv_proj, o_proj"):
        loram.train(pruned_models["phi3"], tmp_path / "out", data=rows_file, lora=lora)
    with pytest.raises(loram.UserError, match="lora_target_modules: should be some of qkv_proj"):
        loram.estimate(tiny_models["phi3"], lora_target_modules=["q_proj"])


def test_a_small_rank_keeps_less_and_says_so(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loram"):
        out = train(pruned_models["llama"], tmp_path / "a", rows_file, "full", lora={"r": 1})
    share = log(out)[-1]["kept_share"]
    assert 0 < share < 0.9
    assert f"rank 1 keeps {100 * share:.1f}%" in caplog.text
    assert "train with a larger lora.r than 1" in caplog.text
    assert {factors["A"].shape[0] for factors in Adapter.load(out).modules.values()} == {1}


def dora(model: Any, folder: Path, plan_of: Path | None, **options: Any) -> Path:
    """Save a DoRA adapter as PEFT does, with its first magnitudes beside it."""
    torch.manual_seed(3)
    targets = targets_of(model.config.model_type)
    chosen = {"r": 3, "lora_alpha": 6, "target_modules": targets, "use_dora": True, **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **chosen))
    began = row_lengths(adapted)
    if options.get("init_lora_weights") is False:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    adapted.peft_config["default"].base_model_name_or_path = "another place"
    adapted.save_pretrained(folder, save_embedding_layers=False)
    if plan_of is not None:
        PruningPlan.load(plan_of).save(folder)
        save_file(began, folder / ROW_LENGTHS_NAME, {"format": "pt"})
    return folder


def with_adapter(base: Any, adapter: Path) -> Any:
    return PeftModel.from_pretrained(base, adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_untouched_dora_recovered_leaves_the_full_model_as_it_was(
    family: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path], tmp_path: Path
) -> None:
    """This holds although the rows of o_proj and down_proj, which lost columns, are longer in the full model."""
    adapter = dora(loram.load_pruned(pruned_models[family]), tmp_path / "adapter", pruned_models[family])
    loram.recover(adapter, tmp_path / "recovered")
    full = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    expected = logits(full)
    assert relative(logits(with_adapter(full, tmp_path / "recovered")), expected) <= 1e-5
    narrow, wide = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "recovered"))
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_magnitude_vector"
    assert (wide[name] > 1.1 * narrow[name]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_on_the_pruned_model_equals_recovered_on_the_zeroed_one(
    family: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path], tmp_path: Path
) -> None:
    """The law of recovery for DoRA. Only columns are zeroed, because DoRA cannot scale the direction of a zero row."""
    plan = PruningPlan.load(pruned_models[family])
    zeroed = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            if "o_proj.weight" in name or "down_proj.weight" in name:
                parameter.copy_(loram.widen(name, loram.narrow(name, parameter, plan), plan))
    zeroed.save_pretrained(tmp_path / "zeroed")
    reference = BaseReference(name=str(tmp_path / "zeroed"), fingerprint=Checkpoint(tmp_path / "zeroed").fingerprint)
    pruned = loram.load_pruned(pruned_models[family])
    adapter = dora(pruned, tmp_path / "adapter", pruned_models[family], init_lora_weights=False)
    plan.model_copy(update={"base": reference}).save(adapter)
    loram.recover(adapter, tmp_path / "recovered")
    found = logits(with_adapter(zeroed, tmp_path / "recovered"))
    expected = logits(with_adapter(loram.load_pruned(pruned_models[family]), adapter))
    assert relative(found, expected) <= 1e-5
    assert relative(expected, logits(loram.load_pruned(pruned_models[family]))) > 1e-2


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"], ids=["tied, biases", "gemma2", "fused"])
def test_dora_merges_and_streams_as_peft_computes(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    base, targets = tiny_models[family], targets_of(family, "lm_head")
    full = AutoModelForCausalLM.from_pretrained(base)
    adapter = dora(full, tmp_path / "adapter", None, init_lora_weights=False, target_modules=targets)
    loram.merge(base, adapter, tmp_path / "merged")
    expected = logits(with_adapter(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) <= 1e-5
    loaded, streamed = (loram.evaluate(base, adapter=adapter, data=rows_file, stream=stream) for stream in (0, 1))
    assert streamed.loss == pytest.approx(loaded.loss, rel=1e-5)
    assert loaded.loss != pytest.approx(loram.evaluate(base, data=rows_file).loss, rel=1e-3)


def test_dora_needs_the_full_model_and_where_it_began(
    tiny_models: dict[str, Path], pruned_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = dora(loram.load_pruned(pruned_models["llama"]), tmp_path / "adapter", pruned_models["llama"])
    with pytest.raises(loram.UserError, match="not the full model that the plan was made from"):
        loram.recover(adapter, tmp_path / "out", base=tiny_models["qwen2"])
    plan = PruningPlan.load(adapter)
    away = plan.base.model_copy(update={"name": str(tmp_path / "away")})
    plan.model_copy(update={"base": away}).save(adapter)
    with pytest.raises(loram.UserError, match="say where the full model is: --base"):
        loram.recover(adapter, tmp_path / "out")
    arguments = ["recover", str(adapter), str(tmp_path / "out"), "--base", str(tiny_models["llama"])]
    assert cli._main(arguments) == 0
    (adapter / ROW_LENGTHS_NAME).unlink()
    with pytest.raises(loram.UserError, match="cannot be recovered without the lengths of the rows"):
        loram.recover(adapter, tmp_path / "again", base=tiny_models["llama"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("method", [method for method in ADAPTERS if method != "rslora"])
def test_adapters_train_on_weights_in_4_bits(
    method: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    out = train(pruned_models["llama"], tmp_path / "a", rows_file, method, load_in_4bit=True)
    losses = [entry["loss"] for entry in log(out)]
    assert losses[-1] < losses[0]
    loram.recover(out, tmp_path / "recovered")
    assert loram.evaluate(tiny_models["llama"], adapter=tmp_path / "recovered", data=rows_file).loss > 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lisaa", {}, "known are lora, rslora, dora, lora-fa, lora-sp, lisa, full"),
        ("lisa", {"load_in_4bit": True}, "weights in 4 bits cannot be trained; take lora"),
        ("full", {"load_in_4bit": True}, "weights in 4 bits cannot be trained; take lora"),
        ("full", {"lora_dtype": "bfloat16"}, "in float32; leave it out"),
        ("dora", {"lora_dtype": "bfloat16"}, "magnitudes need float32"),
        ("dora", {"lora": {"use_dora": False}}, "use_dora is True with method dora"),
        ("rslora", {"lora": {"use_rslora": False}}, "use_rslora is True with method rslora"),
        ("lora", {"lora": {"use_dora": True}}, "use_dora cannot be used with method lora; take method dora"),
        ("lora", {"lisa": {"active_layers": 2}}, "options of method lisa, and the method is lora"),
        ("lisa", {"lora_sp": {"share": 0.5}}, "options of method lora-sp, and the method is lisa"),
        ("lisa", {"lisa": {"layers": 2}}, "layers: Extra inputs"),
        ("lisa", {"lisa": {"active_layers": 6}}, "6, but the model has 5 layers"),
        ("lisa", {"lisa": {"interval_steps": 0}}, "interval_steps: Input should be greater than 0"),
        ("lora-sp", {"lora_sp": {"share": 0.4}}, "share: Input should be greater than or equal to 0.5"),
        ("lora-sp", {"lora_sp": {"share": 0.6}}, "the nearest is 0.625"),
        ("lora-sp", {"lora": {"r": 5}}, "the nearest is 0.6"),
        ("lora-sp", {"lora": {"rank_pattern": {"q_proj": 2}}}, "rank_pattern cannot be used with method lora-sp"),
    ],
    ids=str,
)
def test_what_contradicts_the_method_is_refused(
    method: str, options: dict[str, Any], message: str, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match=message):
        loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, method=method, **options)
    assert not list(tmp_path.iterdir())


def test_flags_of_the_methods(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", str(pruned_models["llama"]), str(tmp_path / "a"), "--dataset", str(rows_file)]
    assert cli._main([*common, "--method", "lora-sp", "--lora-sp-share", "0.6"]) == 2
    assert "the nearest is 0.625" in capsys.readouterr().err
    chosen = ["--method", "lisa", "--lisa-layers", "3", "--lisa-interval-steps", "5", "--no-lisa-train-embeddings"]
    assert cli._main([*common, "--max-steps", "1", *chosen]) == 0
    settings = json.loads((tmp_path / "a" / "loram_manifest.json").read_text())["settings"]
    assert settings["lisa"] == {"active_layers": 3, "interval_steps": 5, "train_embeddings": False}
    assert settings["lora_sp"] is None


@pytest.mark.parametrize("method", [method for method in METHODS if method != "rslora"])
def test_a_dry_run_knows_what_trains(
    method: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """This is checked in a real training, for the pruned and for the full model."""
    trained: list[int] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))

    recipe = Recipe.model_validate(
        {
            "model_name_or_path": str(tiny_models["llama"]),
            "output_dir": tmp_path / "run",
            "dataset": str(rows_file),
            "eval_dataset": str(rows_file),
            "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 2, "keep_last": 1},
            "train": {"method": method},
            "evaluate": {"full_lora": True},
            "device": "cpu",
        }
    )
    found = dry_run(recipe).training
    loram.prune(tiny_models["llama"], tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=2, keep_last=1)
    for name, model in (("pruned", tmp_path / "pruned"), ("full", tiny_models["llama"])):
        train(model, tmp_path / f"{name}-out", rows_file, method, callbacks=[Watch()], trainer={"max_steps": 1})
        assert found[name].adapter_parameters == trained[-1]
        if method in PLANNED:
            assert found[name].memory is not None
        else:
            assert "cannot be estimated" in found[name].problem
        if method == "full" and name == "full":
            assert show_size(16 * loram.estimate(model).parameters) in found[name].problem


def test_eva_begins_with_the_directions_of_the_inputs(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    trained = {}
    for initial in (True, "eva"):
        out, lora = tmp_path / str(initial), {"r": 2, "init_lora_weights": initial}
        loram.train(pruned_models["llama"], out, data=rows_file, lora=lora, trainer={"max_steps": 1})
        trained[initial] = Adapter.load(out)
    assert sum(factors["A"].shape[0] for factors in trained["eva"].modules.values()) <= 2 * len(trained[True].modules)
    a = trained["eva"].modules["model.layers.0.mlp.up_proj"]["A"]
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=0.02)  # orthonormal except for one small step
    loram.recover(tmp_path / "eva", tmp_path / "recovered")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "recovered")
    found = stock.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight
    assert torch.equal(found, Adapter.load(tmp_path / "recovered").modules["model.layers.0.mlp.up_proj"]["A"])


@pytest.mark.parametrize("initial", ["pissa", "olora", "corda", "loftq"])
def test_initialisations_that_change_the_model_are_refused(
    initial: str, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match="changes the model's own weights"):
        loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, lora={"init_lora_weights": initial})
