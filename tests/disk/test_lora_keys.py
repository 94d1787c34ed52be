"""Keys of PEFT's LoraConfig: each is understood, harmless, or refused, in a finished adapter as in a training."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import random_adapter
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import loram
from loram.base.options import library_defaults
from loram.disk.adapter import Adapter
from loram.disk.lora_keys import HARMLESS, INITIALISATIONS, READ, TRAINED, is_all_linear
from loram.training.options import TrainOptions, resolve

DEFAULTS = library_defaults(LoraConfig)


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    return random_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), folder)


def read(adapter: Path, **changes: Any) -> Adapter:
    """Read the adapter after keys of its adapter_config.json have changed."""
    path = adapter / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **changes}))
    try:
        return Adapter.load(adapter)
    finally:
        path.write_text(before)


def train_with(**lora: Any) -> None:
    resolve(TrainOptions.of(lora=lora))


def other_values(default: Any) -> list[Any]:
    """Values that are not an option's default, of the kinds that options have; an empty dict may switch one on."""
    return [value for value in (True, 7, "x", {}, {"a": 1}, [1], [[0, 3], [2, 7]]) if value != default]


@pytest.mark.parametrize("key", sorted(DEFAULTS.keys() - READ))
def test_a_key_that_is_not_on_the_list_is_refused_in_reading(key: str, adapter: Path) -> None:
    for value in other_values(DEFAULTS[key]):
        with pytest.raises(loram.UserError, match=rf"adapter_config\.json: {key} is "):
            read(adapter, **{key: value})
    assert read(adapter, **{key: json.loads(json.dumps(DEFAULTS[key]))}).modules


@pytest.mark.parametrize("key", sorted(DEFAULTS.keys() - TRAINED - {"task_type"}))
def test_a_key_that_is_not_on_the_list_is_refused_in_training(key: str) -> None:
    for value in other_values(DEFAULTS[key]):
        with pytest.raises(loram.UserError, match=f"lora: {key} cannot be used"):
            train_with(**{key: value})
    train_with(**{key: DEFAULTS[key]})


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_a_harmless_key_is_read_with_any_value(key: str, adapter: Path) -> None:
    for value in other_values(DEFAULTS[key]):
        assert read(adapter, **{key: value}).modules.keys() == read(adapter).modules.keys()


def test_a_key_of_another_version_of_peft_is_refused_unless_it_is_off(adapter: Path) -> None:
    for off in (None, False, {}, [], ""):
        assert read(adapter, use_tomorrow=off).modules
    for value in (True, 16, "fast", {"beta": 1}, [1]):
        with pytest.raises(loram.UserError, match=r"adapter_config\.json: use_tomorrow is "):
            read(adapter, use_tomorrow=value)


def test_an_adapter_that_trains_tables_is_told_what_to_train_instead(
    adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match=r'modules_to_save is \["lm_head"\].*target lm_head with LoRA instead'):
        read(adapter, modules_to_save=["lm_head"])
    with pytest.raises(loram.UserError, match=r"trainable_token_indices is \[5\].*leave it out"):
        read(adapter, trainable_token_indices=[5])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, tie_word_embeddings=False)
    tables = random_adapter(model, tmp_path / "tables", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(loram.UserError, match=r"embed_tokens\.lora_embedding_A adapts the embedding; leave it out"):
        Adapter.load(tables)


@pytest.mark.parametrize("initial", [*INITIALISATIONS, "mica", "Gaussian", None])
def test_an_initialisation_that_leaves_the_base_alone_is_read(initial: Any, adapter: Path) -> None:
    assert read(adapter, init_lora_weights=initial).modules


@pytest.mark.parametrize("initial", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "next"])
def test_an_initialisation_that_changes_the_base_is_refused(initial: str, adapter: Path) -> None:
    with pytest.raises(loram.UserError, match=f"init_lora_weights is '{initial}'"):
        read(adapter, init_lora_weights=initial)
    with pytest.raises(loram.UserError, match=f"init_lora_weights '{initial}' changes the model"):
        train_with(init_lora_weights=initial)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "task_type should be CAUSAL_LM"),
        ({"eva_config": {"rho": 2.0}}, "eva_config is for init_lora_weights eva"),
        ({"lora_dropout": 2}, "lora_dropout: "),
        ({"lora_alpha": 0}, "lora_alpha: "),
        ({"r": -1}, "r: "),
        ({"target_modules": "q_proj"}, "target_modules should be all-linear or a list"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_trained_with_is_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(loram.UserError, match=f"^lora: {message}"):
        train_with(**lora)


@pytest.mark.parametrize("word", ["all-linear", ["all-linear"], ("All-Linear",)])
def test_all_linear_is_what_is_trained_by_default(word: Any) -> None:
    assert is_all_linear(word)
    assert resolve(TrainOptions.of(lora={"target_modules": word})) == resolve(TrainOptions())
