"""An adapter must have exactly the modules that its config targets, with the config's ranks, or it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEARS, VOCABULARY, random_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
from loram.compute.belonging import load_for
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint

Tensors = dict[str, Tensor]
LAYER = "base_model.model.model.layers.2"


@pytest.fixture
def on_base(tiny_models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Make an adapter of the full model with PEFT: `on_base(target_modules=...)`."""

    def make(family: str = "llama", **options: Any) -> Path:
        return random_adapter(
            AutoModelForCausalLM.from_pretrained(tiny_models[family]), tmp_path / "adapter", **options
        )

    return make


@pytest.fixture
def on_pruned(pruned_models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Make an adapter of the pruned model with PEFT, and copy the plan beside it."""

    def make(family: str = "llama", **options: Any) -> Path:
        folder = random_adapter(loram.load_pruned(pruned_models[family]), tmp_path / "pruned_adapter", **options)
        loram.PruningPlan.load(pruned_models[family]).save(folder)
        return folder

    return make


def damage(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(weights)).items()}, weights)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def extra(module: str, rows: int, columns: int) -> Callable[[Tensors], Tensors]:
    prefix = f"base_model.model.{module}"
    factors = {f"{prefix}.lora_A.weight": torch.ones(3, columns), f"{prefix}.lora_B.weight": torch.ones(rows, 3)}
    return lambda tensors: tensors | factors


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


FAULTS = {
    "missing module": (without("layers.2.mlp.up_proj"), rf"{LAYER}\.mlp\.up_proj\.lora_A\.weight is missing"),
    "missing layer": (without("layers.2."), rf"{LAYER}\.\S+ is missing"),
    "missing lora_A": (without("layers.2.mlp.up_proj.lora_A"), "up_proj lacks lora_A"),
    "layer beyond the model": (
        extra("model.layers.9.mlp.up_proj", 20, 32),
        r"layers\.9\.mlp\.up_proj, which .* not have",
    ),
    "module of no model": (extra("model.layers.2.mlp.experts", 20, 32), r"experts, which .* does not have"),
    "module not targeted": (extra("lm_head", VOCABULARY, 32), r"lm_head, which adapter_config\.json does not target"),
    "no prefix": (renamed("base_model.model.", ""), r"model\.layers\.0\.\S+ is not a LoRA factor"),
    "half a prefix": (
        renamed("base_model.model.model.", "base_model.model."),
        r"base_model\.model\.layers\.0\.\S+ adapts",
    ),
    "doubled prefix": (renamed("base_", "base_model.model.base_"), r"base_model\.model\.base_model\.model\.\S+ adapts"),
    "doubled model": (
        renamed("model.layers", "model.model.layers"),
        r"base_model\.model\.model\.model\.layers\S+ adapts",
    ),
    "name of the adapter": (renamed(".weight", ".default.weight"), r"lora_A\.default\.weight is not a LoRA factor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_modules_that_do_not_match_the_config_name_the_file_and_the_key(
    fault: str, on_base: Any, on_pruned: Any, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    change, message = FAULTS[fault]
    full, small = on_base(), on_pruned()
    damage(full, change)
    damage(small, change)
    with pytest.raises(loram.UserError, match=rf"adapter_model\.safetensors: .*{message}"):
        load_for(Checkpoint(tiny_models["llama"]), full)
    with pytest.raises(loram.UserError, match=rf"adapter_model\.safetensors: .*{message}"):
        loram.recover(small, tmp_path / "out")  # needs no checkpoint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*\.layers\.[13]\..*(q|up)_proj"},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["up_proj", "model.layers.1.self_attn.q_proj"]},
        {"exclude_modules": r".*layers\.[02]\..*"},
        {"layers_to_transform": [1, 3]},
        {"layers_to_transform": 2, "layers_pattern": "layers"},
        {"target_modules": ["model.layers.2.mlp.down_proj", "lm_head"]},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral"], ids=["tied", "untied"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_whatever_peft_targets_is_accepted(
    family: str, options: dict[str, Any], on_base: Any, on_pruned: Any, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_models[family])
    assert load_for(checkpoint, on_base(family, **options)).modules
    loram.recover(on_pruned(family, **options), tmp_path / "recovered")
    assert load_for(checkpoint, tmp_path / "recovered").modules


def test_all_linear_as_a_word_leaves_lm_head_out(on_base: Any, tiny_llama: Path) -> None:
    folder = on_base()
    configure(folder, target_modules="all-linear")
    found = load_for(Checkpoint(tiny_llama), folder).modules
    assert len(found) == 5 * len(LINEARS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, r"lora_A has shape \(3, .*but adapter_config\.json says rank 4"),
        ({"rank_pattern": {"up_proj": 2}}, r"up_proj\.lora_A has shape \(3, 32\), but .* says rank 2"),
        ({"r": "many"}, r"adapter_config\.json: r: "),
        ({"r": 0}, r"adapter_config\.json: r: "),
        ({"lora_alpha": None}, r"adapter_config\.json: lora_alpha: "),
        ({"rank_pattern": ["q_proj"]}, r"adapter_config\.json: rank_pattern: "),
        ({"rank_pattern": {"(": 2}}, r"adapter_config\.json: '\(' is not a valid regex"),
        ({"target_modules": None}, r"adapter_config\.json: target_modules"),
        ({"target_modules": "("}, r"adapter_config\.json: "),
        ({"target_modules": ".*", "layers_to_transform": [1]}, r"adapter_config\.json: .*layers_to_transform"),
        ({"layers_to_transform": [1]}, r"which adapter_config\.json does not target"),
        ({"use_dora": True}, "lacks lora_magnitude_vector"),
        ({"peft_type": "IA3"}, "a IA3 adapter"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_weights_or_itself(
    changes: dict[str, Any], message: str, on_base: Any, tiny_llama: Path
) -> None:
    folder = on_base()
    configure(folder, **changes)
    with pytest.raises(loram.UserError, match=message):
        load_for(Checkpoint(tiny_llama), folder)


def test_a_lora_b_of_another_rank_is_named(on_base: Any) -> None:
    folder = on_base()
    damage(folder, lambda t: {name: v[:, :2] if f"{LAYER}.mlp.up_proj.lora_B" in name else v for name, v in t.items()})
    with pytest.raises(loram.UserError, match=r"up_proj\.lora_B has shape \(40, 2\), but .* says rank 3"):
        Adapter.load(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]),
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 3000),
)
def test_a_mutilated_file_is_a_clear_error_or_an_adapter(
    file: str, changes: list[tuple[int, int]], cut: int | None, on_base: Any, tiny_llama: Path
) -> None:
    folder = tiny_llama.parent / "mutilated"
    if not folder.exists():
        on_base(target_modules=["q_proj"]).rename(folder)
    whole = (folder / file).read_bytes()
    content = bytearray(whole[:cut])
    for position, value in changes:
        if content:
            content[position % len(content)] = value
    try:
        (folder / file).write_bytes(bytes(content))
        load_for(Checkpoint(tiny_llama), folder)
    except loram.UserError as error:
        assert str(folder) in str(error)  # noqa: PT017  either outcome is right
    finally:
        (folder / file).write_bytes(whole)
