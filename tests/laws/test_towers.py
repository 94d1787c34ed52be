"""Pruned folders of wrapped models that keep their towers: the laws on text and images, and every stage on them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WRAPPED, elsewhere, make_wrapped, relative
from helpers import contents
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import loram
from loram.base.errors import UserError
from loram.compute.loading import load_model
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan

TOKENS = torch.tensor([[5, 17, 40, 8, 77, 30, 12, 9, 61, 3, 22, 50]])
IMAGE, SIDE = 300, 28  # the token that stands for a piece of an image, and the size of images
LAWFUL = ("gemma3", "mistral3", "qwen3_5")
SHORT = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
OPTIONS: dict[str, Any] = {"criterion": "random", "keep_first": 1, "keep_last": 1}
TILES = {"image_grid_pinpoints": [[SIDE, SIDE]]}
CHANGES: dict[str, dict[str, Any]] = {"llava_next": TILES, "llava_onevision": TILES}
# Zeroing shows what pruned channels do, but a router would still send tokens to zeroed experts.
RATIOS: dict[str, dict[str, Any]] = {"qwen3_5_moe": {"experts_ratio": 0, "expert_channels_ratio": 0.5}}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """Wrapper -> (a tiny wrapped model, the same pruned with its towers, the plan); made once."""
    root, made = tmp_path_factory.mktemp("towers"), dict[str, tuple[Path, Path, PruningPlan]]()

    def get(model_type: str) -> tuple[Path, Path, PruningPlan]:
        if model_type not in made:
            base, out = root / model_type, root / f"{model_type}-pruned"
            make_wrapped(base, model_type, tokenizer, today=False, **CHANGES.get(model_type, {}))
            plan = loram.prune(base, out, ratio=0.6, keep_towers=True, **OPTIONS, **RATIOS.get(model_type, {}))
            made[model_type] = base, out, plan
        return made[model_type]

    return get


def whole(folder: Path) -> Any:
    """The wrapped model as transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def zeroed(base: Path, plan: PruningPlan) -> Any:
    """The full wrapped model whose pruned heads, channels and layers are zero."""
    model = whole(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.language_model."):
                own = name.replace("model.language_model.", "model.")
                gone = plan.drops(own)
                parameter.copy_(0 * parameter if gone else loram.widen(own, loram.narrow(own, parameter, plan), plan))
    return model


def seen(model: Any) -> dict[str, torch.Tensor]:
    """Inputs with an image, as the processor of a wrapped model would make them."""
    torch.manual_seed(1)
    model_type, vision = model.config.model_type.removeprefix("loram_"), model.config.vision_config
    pixels, count, more = torch.randn(1, 3, SIDE, SIDE), 4, dict[str, torch.Tensor]()  # count: of pieces
    if model_type.startswith("qwen3_5"):
        pixels = torch.randn(16, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
        more = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    elif model_type == "gemma4":
        pixels = torch.randn(1, 36, 3 * vision.patch_size**2)
        more = {"image_position_ids": torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]}
    elif model_type == "mistral3":
        pixels, count, more = torch.randn(2, 3, SIDE, SIDE), 2, {"image_sizes": torch.tensor([[SIDE, SIDE]] * 2)}
    elif model_type in CHANGES:
        pixels, count, more = torch.randn(1, 2, 3, SIDE, SIDE), 10, {"image_sizes": torch.tensor([[SIDE, SIDE]])}
    elif model_type == "internvl":
        count = 1
    tokens = torch.tensor([[5, 17, *[IMAGE] * count, 40, 8, 77, 30]])
    kinds = (tokens == IMAGE).int()
    return {
        "input_ids": tokens,
        "pixel_values": pixels,
        **({"mm_token_type_ids": kinds} if model_type.startswith("qwen3_5") else {}),
        **({"token_type_ids": kinds} if model_type == "gemma3" else {}),
        **more,
    }


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(**(inputs or {"input_ids": TOKENS})).logits
    return result


@pytest.mark.parametrize("model_type", WRAPPED)
def test_law_2_holds_on_text_and_images(model_type: str, towers: Any) -> None:
    base, folder, plan = towers(model_type)
    model, full = whole(folder), zeroed(base, plan)
    inputs = seen(full)
    assert relative(logits(model), logits(full)) <= 1e-5
    assert relative(logits(model, **inputs), logits(full, **inputs)) <= 1e-5
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert relative(logits(model, **other), logits(full, **inputs)) > 1e-2
    generated = [each.generate(**inputs, max_new_tokens=4, do_sample=False) for each in (model, full)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("model_type", LAWFUL)
def test_towers_are_copied_and_the_text_model_is_that_of_a_folder_without(
    model_type: str, towers: Any, tmp_path: Path
) -> None:
    base, folder, plan = towers(model_type)
    alone = tmp_path / "alone"
    assert loram.prune(base, alone, ratio=0.6, **OPTIONS, **RATIOS.get(model_type, {})) == plan
    with_towers, without = Checkpoint(folder), Checkpoint(alone)
    assert with_towers.fingerprint == without.fingerprint
    left_out = {"auto_map", "transformers_version"}
    assert {**without.config, **with_towers.config} == {
        **with_towers.config,
        **{key: without.config[key] for key in left_out},
    }
    assert torch.equal(logits(load_model(with_towers)), logits(load_model(without)))
    assert (folder / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    model, full = (whole(path).state_dict() for path in (folder, base))
    assert model.keys() == full.keys()
    outside = [name for name in model if not name.startswith(("model.language_model.", "lm_head."))]
    assert outside
    assert all(torch.equal(model[name], full[name]) for name in outside)


@pytest.mark.parametrize("model_type", LAWFUL)
def test_what_transformers_saves_again_is_the_same(model_type: str, towers: Any, tmp_path: Path) -> None:
    _, folder, _ = towers(model_type)
    for source, out in ((folder, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        whole(source).save_pretrained(out)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    for name in ("config.json", "modeling_loram.py"):
        assert (tmp_path / "once" / name).read_bytes() == (folder / name).read_bytes()


PLAIN_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForImageTextToText
for folder, inputs in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    given = torch.load(inputs)
    with torch.inference_mode():
        torch.save(model(**given).logits, inputs)
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
"""


def test_folders_load_in_plain_transformers(towers: Any, tmp_path: Path) -> None:
    pairs: list[str] = []
    for model_type in LAWFUL:
        _, folder, _ = towers(model_type)
        torch.save(seen(whole(folder)), tmp_path / f"{model_type}.pt")
        pairs += [str(folder), str(tmp_path / f"{model_type}.pt")]
    done = elsewhere(PLAIN_TRANSFORMERS, *pairs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for model_type in LAWFUL:
        model = whole(towers(model_type)[1])
        assert torch.equal(torch.load(tmp_path / f"{model_type}.pt"), logits(model, **seen(model)))


@pytest.mark.parametrize("model_type", LAWFUL)
def test_an_adapter_that_peft_trained_on_images_is_recovered(model_type: str, towers: Any, tmp_path: Path) -> None:
    base, folder, plan = towers(model_type)
    targets = r".*language_model.*\.(q_proj|o_proj|up_proj|down_proj)"
    model = get_peft_model(whole(folder), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    inputs, losses = seen(model), list[float]()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-2)
    for _ in range(4):
        loss = model.train()(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    wide = loram.recover(tmp_path / "adapter", tmp_path / "recovered")  # the plan is in the folder that it names
    assert (wide / "loram_plan.json").read_bytes() == (folder / "loram_plan.json").read_bytes()
    assert load_file(wide / "adapter_model.safetensors").keys() == names.keys()
    full = PeftModel.from_pretrained(zeroed(base, plan), wide).eval()
    assert relative(logits(full, **inputs), logits(model.eval(), **inputs)) <= 1e-5
    assert relative(logits(full, **inputs), logits(zeroed(base, plan), **inputs)) > 1e-2


def test_training_and_recovery_are_those_of_a_folder_without_towers(
    towers: Any, rows_file: Path, tmp_path: Path
) -> None:
    base, folder, _ = towers("gemma3")
    loram.prune(base, tmp_path / "alone", ratio=0.6, **OPTIONS)
    losses, wide = list[float](), list[Path]()
    for pruned in (folder, tmp_path / "alone"):
        adapter = tmp_path / f"adapter-of-{pruned.name}"
        loram.train(pruned, adapter, data=rows_file, load_in_4bit=True, trainer=SHORT)
        losses.append(loram.evaluate(pruned, adapter=adapter, data=rows_file).loss)
        wide.append(loram.recover(adapter, tmp_path / f"wide-of-{pruned.name}"))
    assert losses[0] == losses[1]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (wide[0] / name).read_bytes() == (wide[1] / name).read_bytes()
    small = PeftModel.from_pretrained(whole(folder), tmp_path / f"adapter-of-{folder.name}").eval()
    assert relative(logits(small), logits(whole(folder))) > 1e-3


def test_alignment_leaves_towers_as_they_are(towers: Any, rows_file: Path, tmp_path: Path) -> None:
    _, folder, _ = towers("gemma3")
    loram.align(folder, tmp_path / "aligned", data=rows_file, probe=False, trainer=SHORT)
    before, after = (whole(path).state_dict() for path in (folder, tmp_path / "aligned"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in changed)
    assert (tmp_path / "aligned" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_weights_that_train_become_an_adapter_with_the_wrapped_models_names(
    towers: Any, rows_file: Path, tmp_path: Path
) -> None:
    _, folder, _ = towers("mistral3")
    out = loram.train(folder, tmp_path / "adapter", data=rows_file, method="full", lora={"r": 2}, trainer=SHORT)
    model = PeftModel.from_pretrained(whole(folder), out).eval()
    assert relative(logits(model), logits(whole(folder))) > 1e-3
    loram.recover(out, tmp_path / "recovered")


def test_layers_are_dropped_beside_towers(towers: Any, tmp_path: Path) -> None:
    base, _, _ = towers("gemma3")
    plan = loram.prune(base, tmp_path / "out", ratio=0.5, drop_layers=1, keep_towers=True, **OPTIONS)
    model, full = whole(tmp_path / "out"), zeroed(base, plan)
    assert plan.dropped
    assert relative(logits(model, **seen(full)), logits(full, **seen(full))) <= 1e-5


def test_what_cannot_keep_towers_is_refused(towers: Any, tiny_llama: Path, tmp_path: Path) -> None:
    base, folder, _ = towers("gemma3")
    with pytest.raises(UserError, match="has no towers, it is a text model alone"):
        loram.prune(tiny_llama, tmp_path / "out", ratio=0.5, keep_towers=True, **OPTIONS)
    with pytest.raises(UserError, match="keep_towers: is for structured pruning; pattern 4:8"):
        loram.prune(base, tmp_path / "out", pattern="4:8", keep_towers=True)
    with pytest.raises(UserError, match="already pruned"):
        loram.prune(folder, tmp_path / "out", ratio=0.5)
    shutil.copytree(base, tmp_path / "broken")
    config = json.loads((base / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] += 1
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"vision_tower.*pruned folder would have no such tensor"):
        loram.prune(tmp_path / "broken", tmp_path / "out", ratio=0.5, keep_towers=True, **OPTIONS)
    get_peft_model(whole(folder), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"vision_tower.*let target_modules be a pattern"):
        loram.recover(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
