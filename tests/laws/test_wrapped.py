"""Wrapped models (a text model beside towers for images): the laws, and every stage from pruning to merging."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WRAPPED, elsewhere, make_wrapped, random_adapter, relative
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import loram
from loram.base.errors import UserError
from loram.compute.loading import load_model
from loram.compute.nf4 import packed_tensors
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.disk.files import copy_side_files, write_json
from loram.export.quantize import quantization_config
from loram.model.plan import PruningPlan

TOKENS = torch.tensor([[5, 17, 40, 8, 77, 30, 12, 9, 61, 3, 22, 50], [9, 9, 31, 70, 2, 44, 6, 18, 25, 81, 90, 7]])
INSIDE = "base_model.model.model.language_model.layers."
LAWFUL = ("gemma3", "mistral3", "qwen3_5")
SHORT = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """(wrapper, whether its tensors have today's names) -> the folder of a tiny wrapped model; made once."""
    root, made = tmp_path_factory.mktemp("wrapped"), dict[tuple[str, bool], Path]()

    def get(model_type: str, today: bool = False) -> Path:
        if (key := (model_type, today)) not in made:
            made[key] = make_wrapped(root / f"{model_type}-{today}", model_type, tokenizer, today=today)
        return made[key]

    return get


@pytest.fixture(scope="module")
def pruned(wrapped: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Wrapper -> (the wrapped model, its text model pruned at random, the plan); made once."""
    made: dict[str, tuple[Path, Path, PruningPlan]] = {}

    def get(model_type: str) -> tuple[Path, Path, PruningPlan]:
        if model_type not in made:
            base, out = wrapped(model_type), tmp_path_factory.mktemp("pruned") / model_type
            plan = loram.prune(base, out, ratio=0.6, criterion="random", keep_first=1, keep_last=1)
            made[model_type] = base, out, plan
        return made[model_type]

    return get


@pytest.fixture(scope="module")
def recovered(pruned: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Wrapper -> (an adapter of the pruned text model, the same recovered); made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(model_type: str) -> tuple[Path, Path]:
        if model_type not in made:
            _, folder, plan = pruned(model_type)
            root = tmp_path_factory.mktemp("adapters")
            adapter = random_adapter(loram.load_pruned(folder), root / "adapter")
            plan.save(adapter)
            made[model_type] = adapter, loram.recover(adapter, root / "recovered")
        return made[model_type]

    return get


def whole(folder: Path) -> Any:
    """The wrapped model as plain transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(TOKENS).logits
    return result


@pytest.mark.parametrize("today", [True, False], ids=["today", "written"])
@pytest.mark.parametrize("model_type", WRAPPED)
def test_text_model_is_that_of_the_wrapped_model(model_type: str, today: bool, wrapped: Any) -> None:
    folder = wrapped(model_type, today)
    checkpoint = Checkpoint(folder)
    assert checkpoint.fingerprint == Checkpoint(wrapped(model_type, not today)).fingerprint
    assert set(checkpoint.whole.names()) == load_file(folder / "model.safetensors").keys()
    text = load_model(checkpoint)
    assert set(checkpoint.names()) - {"lm_head.weight"} == text.state_dict().keys() - {"lm_head.weight"}
    assert torch.equal(logits(text.eval()), logits(whole(folder)))


@pytest.mark.parametrize("model_type", LAWFUL)
def test_pruned_folder_holds_the_text_model_alone(model_type: str, pruned: Any, tmp_path: Path) -> None:
    base, folder, plan = pruned(model_type)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == f"loram_{WRAPPED[model_type][0]}"
    assert not [name for name in Checkpoint(folder).index if not name.startswith(("model.layers", "model.", "lm_head"))]
    assert not (folder / "preprocessor_config.json").exists()
    assert json.loads((folder / "loram_plan.json").read_text())["base"]["wrapper"] == model_type
    full = sum(parameter.numel() for parameter in load_model(Checkpoint(base)).parameters())
    assert plan.parameters()[0] == full
    loram.load_pruned(folder).save_pretrained(tmp_path)
    for name in ("config.json", "modeling_loram.py"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert sum(p.numel() for p in loram.load_pruned(folder).parameters()) == plan.parameters()[1]


@pytest.mark.parametrize("model_type", LAWFUL)
def test_laws_2_and_3_hold_for_the_wrapped_model(model_type: str, pruned: Any, recovered: Any) -> None:
    base, folder, plan = pruned(model_type)
    adapter, wide = recovered(model_type)
    zeroed = whole(base)
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            if name.startswith("model.language_model."):
                own = name.replace("model.language_model.", "model.")
                parameter.copy_(loram.widen(own, loram.narrow(own, parameter, plan), plan))
    without = logits(zeroed)
    assert relative(logits(loram.load_pruned(folder).eval()), without) <= 1e-5
    small = logits(PeftModel.from_pretrained(loram.load_pruned(folder), adapter).eval())
    full = logits(PeftModel.from_pretrained(zeroed, wide).eval())
    assert relative(small, full) <= 1e-5
    assert relative(full, without) > 1e-2


PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
tokens = torch.arange(3, 15)[None]
for folder, adapter in zip(sys.argv[1::2], sys.argv[2::2]):
    base = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.inference_mode():
        before = base(tokens).logits
        model = PeftModel.from_pretrained(base, adapter).eval()
        after = model(tokens).logits
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and name]
    assert adapted and not [name for name in adapted if "language_model" not in name], adapted
    print(((after - before).abs().max() / before.abs().max()).item())
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
"""


def test_recovered_adapter_changes_the_wrapped_model_in_plain_peft(
    wrapped: Any, recovered: Any, tmp_path: Path
) -> None:
    pairs: list[str] = []
    for model_type in LAWFUL:
        _, wide = recovered(model_type)
        assert all(name.startswith(INSIDE) for name in load_file(wide / "adapter_model.safetensors"))
        pairs += [part for today in (True, False) for part in (str(wrapped(model_type, today)), str(wide))]
    done = elsewhere(PLAIN_PEFT, *pairs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower()
    changes = list(map(float, done.stdout.split()))
    assert len(changes) == 2 * len(LAWFUL)
    assert min(changes) > 1e-2


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # ours merge it rightly
@pytest.mark.parametrize("model_type", LAWFUL)
@pytest.mark.parametrize("today", [True, False], ids=["today", "written"])
def test_merged_model_is_the_wrapped_model_with_the_adapter(
    model_type: str, today: bool, pruned: Any, wrapped: Any, tmp_path: Path
) -> None:
    _, folder, plan = pruned(model_type)
    base, targets = wrapped(model_type, today), ["q_proj", "down_proj", "lm_head"]
    adapter = random_adapter(loram.load_pruned(folder), tmp_path / "adapter", target_modules=targets)
    plan.save(adapter)
    wide = loram.recover(adapter, tmp_path / "recovered")
    out = loram.merge(base, wide, tmp_path / "merged")
    assert relative(logits(whole(out)), logits(PeftModel.from_pretrained(whole(base), wide).eval())) <= 1e-5

    before, after = (load_file(path / "model.safetensors") for path in (base, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() <= after.keys() | {"lm_head.weight"}
    assert changed
    assert all("language_model" in name or name == "lm_head.weight" for name in changed)
    assert [name for name in before if "vision_tower" in name or "visual" in name]
    assert (out / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == model_type
    assert config["vision_config"]
    assert not config["tie_word_embeddings"]


def test_all_stages_run_on_a_wrapped_model(wrapped: Any, rows_file: Path, tmp_path: Path) -> None:
    base = wrapped("gemma3")
    loram.prune(base, tmp_path / "pruned", ratio=0.5, calibration=rows_file, calibration_samples=4, keep_first=2)
    loram.align(tmp_path / "pruned", tmp_path / "aligned", data=rows_file, trainer={"max_steps": 1})
    adapter = loram.train(
        tmp_path / "aligned", tmp_path / "adapter", data=rows_file, anchor_steps=2, load_in_4bit=True, trainer=SHORT
    )
    wide = loram.recover(adapter, tmp_path / "recovered")
    polished = loram.polish(base, wide, tmp_path / "polished", data=rows_file, max_steps=1)
    assert Adapter.load(polished).tensors.keys() == Adapter.load(wide).tensors.keys()
    assert Adapter.load(polished).config == Adapter.load(wide).config
    merged = loram.merge(base, polished, tmp_path / "merged")
    for stream in (True, False):
        losses = [
            loram.evaluate(model, adapter=chosen, data=rows_file, stream=stream).loss
            for model, chosen in ((base, polished), (merged, None))
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert not math.isclose(losses[0], loram.evaluate(base, data=rows_file, stream=stream).loss, rel_tol=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapter_trained_on_the_full_model_has_the_wrapped_models_names(
    method: str, wrapped: Any, rows_file: Path, tmp_path: Path
) -> None:
    base, options = wrapped("gemma3"), {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"q_proj": 4}}
    out = loram.train(base, tmp_path / "adapter", data=rows_file, method=method, lora=options, trainer=SHORT)
    assert all(name.startswith(INSIDE) for name in load_file(out / "adapter_model.safetensors"))
    plain = PeftModel.from_pretrained(whole(base), out).eval()
    merged = loram.merge(base, out, tmp_path / "merged")
    assert relative(logits(whole(merged)), logits(plain)) <= 1e-5
    assert relative(logits(plain), logits(whole(base))) > 1e-3


def test_adapter_that_peft_trained_on_the_wrapped_model_is_merged(wrapped: Any, tmp_path: Path) -> None:
    base = wrapped("gemma3")
    targets = r".*language_model.*\.(q_proj|up_proj)"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(whole(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = loram.merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert relative(logits(whole(merged)), logits(adapted.eval())) <= 1e-5


def test_adapters_outside_the_text_model_are_refused(wrapped: Any, recovered: Any, tmp_path: Path) -> None:
    base = wrapped("gemma3")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(whole(base), config).save_pretrained(tmp_path / "towers")
    with pytest.raises(UserError, match=r"vision_tower.*is not of model.language_model"):
        loram.merge(base, tmp_path / "towers", tmp_path / "out")
    adapter, _ = recovered("gemma3")
    with pytest.raises(UserError, match="loram recover"):
        loram.merge(base, adapter, tmp_path / "out")


def test_sparse_text_model_and_masked_update_are_merged(wrapped: Any, rows_file: Path, tmp_path: Path) -> None:
    base = wrapped("gemma3")
    loram.prune(base, tmp_path / "sparse", pattern="4:8", criterion="magnitude", keep_first=1, keep_last=1)
    options = {"data": rows_file, "mask_update": True, "trainer": SHORT}
    adapter = loram.train(tmp_path / "sparse", tmp_path / "adapter", **options)
    merged = loram.merge(base, adapter, tmp_path / "merged")
    assert relative(logits(whole(merged)), logits(whole(base))) > 1e-3


def test_recovery_takes_the_names_of_the_base_that_is_named(pruned: Any, recovered: Any, tmp_path: Path) -> None:
    base, _, _ = pruned("gemma3")
    adapter, _ = recovered("gemma3")
    text = load_model(Checkpoint(base))
    text.save_pretrained(tmp_path / "text")  # the text model alone has the same weights
    wide = loram.recover(adapter, tmp_path / "recovered", base=tmp_path / "text")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "text"), wide).eval()
    assert relative(logits(model), logits(text.eval())) > 1e-2


@pytest.mark.parametrize("today", [True, False], ids=["today", "written"])
def test_weights_of_the_text_model_train_and_the_rest_is_copied(
    today: bool, wrapped: Any, rows_file: Path, tmp_path: Path
) -> None:
    base = wrapped("mistral3", today)
    out = loram.train(base, tmp_path / "trained", data=rows_file, method="full", trainer=SHORT)
    before, after = (load_file(path / "model.safetensors") for path in (base, out))
    assert before.keys() == after.keys()
    text = {name for name in before if "language_model" in name or name == "lm_head.weight"}
    assert {name for name in before if not torch.equal(before[name], after[name])} == text
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (out / "preprocessor_config.json").exists()
    assert relative(logits(whole(out)), logits(whole(base))) > 1e-3


def test_a_wrapped_model_is_not_stored_in_4_bits(wrapped: Any, tmp_path: Path) -> None:
    base = wrapped("gemma3")
    with pytest.raises(UserError, match="a gemma3 holds more than a text model"):
        loram.quantize(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_spellings_of_one_tensor_are_refused(wrapped: Any, tmp_path: Path) -> None:
    base = wrapped("gemma3")
    weights = load_file(base / "model.safetensors")
    weights["model.language_model.norm.weight"] = weights["language_model.model.norm.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(UserError, match="two spellings of one tensor"):
        Checkpoint(tmp_path)


def test_adapter_trained_on_a_wrapped_model_in_4_bits_is_one_of_its_original(
    wrapped: Any, rows_file: Path, tmp_path: Path
) -> None:
    base, packed = wrapped("gemma3"), tmp_path / "packed"
    packed.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        linear = name.startswith("language_model.model.layers") and tensor.ndim == 2
        tensors |= packed_tensors(name, tensor) if linear else {name: tensor}
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    copy_side_files(base, packed)
    config = json.loads((base / "config.json").read_text())
    write_json(packed / "config.json", {**config, "quantization_config": quantization_config(["lm_head"])})

    adapter = loram.train(packed, tmp_path / "adapter", data=rows_file, trainer=SHORT)
    merged = loram.merge(base, adapter, tmp_path / "merged")
    assert relative(logits(whole(merged)), logits(PeftModel.from_pretrained(whole(base), adapter).eval())) <= 1e-5
    moved = loram.recover(adapter, tmp_path / "recovered", base=base)
    assert (
        load_file(moved / "adapter_model.safetensors").keys() == load_file(adapter / "adapter_model.safetensors").keys()
    )
    assert loram.evaluate(packed, adapter=adapter, data=rows_file).loss < loram.evaluate(packed, data=rows_file).loss
