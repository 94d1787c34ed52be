"""Training on tiny models of every family: lm_head, options of the libraries, and adapters of other trainers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, FAMILIES, elsewhere, make_model
from helpers import contents
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import loram
from loram.disk.files import TOKENIZER_FILES, side_files

STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1}


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_recovers(
    family: str, pruned_models: dict[str, Path], tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    options = {**STEPS, "max_steps": 12, "learning_rate": 2e-2}
    loram.train(pruned_models[family], tmp_path / "adapter", data=rows_file, trainer=options)
    found = losses(tmp_path / "adapter")
    assert found[-1] < found[0]
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    small = loram.evaluate(pruned_models[family], data=rows_file).perplexity
    assert loram.evaluate(pruned_models[family], adapter=tmp_path / "adapter", data=rows_file).perplexity < small
    full = loram.evaluate(tiny_models[family], data=rows_file).perplexity
    assert loram.evaluate(tiny_models[family], adapter=tmp_path / "recovered", data=rows_file).perplexity != full


def test_the_folder_has_plan_tokenizer_and_stock_peft(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    folder = loram.train(pruned_models["llama"], tmp_path / "adapter", data=rows_file, trainer=STEPS)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "loram_plan.json", "tokenizer.json"} <= names
    assert {"chat_template.jinja", "loram_manifest.json", "training_log.jsonl"} <= names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pruned_models["llama"])
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert not list(tmp_path.glob("*-checkpoints"))
    for path in side_files(pruned_models["llama"], TOKENIZER_FILES):  # other versions of transformers read them too
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_token_for_padding_beyond_the_embedding_does_no_harm(
    tokenizer: Any, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = jsonl({"question": "one?", "answer": "one"}, {"question": "one plus one plus one?", "answer": "three"})
    weights = {}
    for name, padding in (("known", None), ("unknown", "[PAD]")):
        other = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
        )
        if padding is not None:
            other.add_special_tokens({"pad_token": padding})
        model = make_model(tmp_path / f"model {name}", "llama", other, vocab_size=tokenizer.vocab_size)
        loram.train(model, tmp_path / name, data=rows, trainer=STEPS)
        weights[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert weights["known"] == weights["unknown"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3"], ids=["tied", "untied"])
def test_lm_head_is_trained_when_asked(
    family: str, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    targets = ["q_proj", "lm_head"]
    folder = loram.train(
        pruned_models[family], tmp_path / "adapter", data=rows_file, lora={"target_modules": targets}, trainer=STEPS
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.lm_head.lora_B.weight"].abs().sum() > 0  # it begins at zero
    assert not any("base_layer" in name or "embed" in name for name in tensors)
    loram.recover(folder, tmp_path / "recovered")
    wide = load_file(tmp_path / "recovered" / "adapter_model.safetensors")
    assert torch.equal(
        wide["base_model.model.lm_head.lora_B.weight"], tensors["base_model.model.lm_head.lora_B.weight"]
    )


@pytest.mark.parametrize("packed", [{"packing": True, "max_length": 200}, {"padding_free": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_packed_without_padding_train_as_padded_ones(
    family: str, packed: dict[str, Any], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """With all rows in one batch, no row attends to another, and the loss is the mean over the same tokens."""
    for name, trainer in (("padded", {}), ("packed", packed)):
        options = {**STEPS, "max_steps": 2, "per_device_train_batch_size": 20, "lr_scheduler_type": "constant"}
        loram.train(
            pruned_models[family],
            tmp_path / name,
            data=rows_file,
            lora={"lora_dropout": 0.0},
            trainer={**options, **trainer},
        )
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-5)
    assert losses(tmp_path / "packed")[1] < losses(tmp_path / "packed")[0]


def test_options_reach_peft_and_trl(pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "use_rslora": True, "target_modules": ["v_proj"]}
    trainer = {**STEPS, "num_train_epochs": 1, "max_steps": -1, "weight_decay": 0.1, "gradient_accumulation_steps": 2}
    folder = loram.train(pruned_models["qwen2"], tmp_path / "adapter", data=rows_file, lora=lora, trainer=trainer)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["target_modules"]) == (4, True, ["v_proj"])
    assert len(losses(folder)) == 3  # 20 rows in batches of 4, with 2 batches per step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"lora_r": 8}}, "'lora_r'; here it is called r"),
        ({"lora": {"rank": 8}}, "'rank'; here it is called r"),
        ({"lora": {"lr": 1e-3}}, "here it is called train.trainer.learning_rate"),
        ({"trainer": {"cutoff_len": 64}}, "here it is called max_length"),
        ({"trainer": {"warmup_ratio": 0.1}}, "here it is called warmup_steps; a value below 1 is a share"),
        ({"trainer": {"learning_rte": 1}}, "did you mean learning_rate?"),
        ({"lora": {"target_modules": ["qproj"]}}, "'qproj'"),
        ({"lora": {"target_modules": "q_proj"}}, "should be all-linear or a list"),
        ({"lora": {"r": 0}}, "r"),
        ({"method": "lisaa"}, "known are lora"),
        ({"trainer": {"loss_type": "dft"}}, "loss_type cannot be set"),
        ({"trainer": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor cannot be set"),
        ({"trainer": {"activation_offloading": True}, "device": "cpu"}, "there is no GPU"),
        ({"trainer": {"use_liger_kernel": True}, "device": "cpu"}, "needs a GPU"),
        ({"trainer": {"optim": "paged_adamw_8bit"}, "device": "cpu"}, "take adamw_8bit"),
        ({"offload_embedding": True}, "add load_in_4bit"),
        ({"lora_dtype": "float8"}, "known are float32, bfloat16"),
        ({"trainer": {"max_length": 2}}, "no token"),
        ({"trainer": {"output_dir": "x"}}, "output_dir cannot be set"),
        ({"trainer": {"assistant_only_loss": True}}, "assistant_only_loss cannot be set"),
        ({"lora": {"use_dora": True}}, "use_dora cannot be used"),
        ({"lora": {"bias": "all"}}, "bias cannot be used"),
        ({"lora": {"kasa_config": {}}}, "kasa_config cannot be used"),
        ({"lora": {"inference_mode": True}}, "inference_mode cannot be used"),
        ({"trainer": {"eval_strategy": "steps"}}, "eval_strategy cannot be set: no rows are evaluated"),
        ({"trainer": {"save_strategy": "best"}}, "save_strategy cannot be best"),
        ({"trainer": {"push_to_hub": True}}, "push_to_hub cannot be set: .* loram push OUT REPO"),
        (
            {"trainer": {"deepspeed": {"zero_optimization": {"stage": 3}}}},
            "deepspeed cannot be set: .*accelerate launch",
        ),
        (
            {"trainer": {"fsdp": "full_shard"}},
            "FSDP: shards the model over several processes, and this is the only one",
        ),
        ({"trainer": {"learning_rate": -1}}, "learning_rate: Input should be greater than 0"),
        ({"trainer": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size: "),
        ({"trainer": {"weight_decay": -0.1}}, "weight_decay is -0.1"),
        ({"trainer": {"adam_beta2": 1.5}}, "Invalid beta parameter"),
        ({"trainer": {"lr_scheduler_type": "cosine_with_min_lr"}}, "min_lr"),
        ({"trainer": {"lr_scheduler_kwargs": {"foo": 1}}}, "foo"),
        ({"trainer": {"optim_target_modules": ["q_proj"]}}, "optim_target_modules does nothing"),
        ({"trainer": {"optim_args": "foo"}}, "unpack"),
        ({"trainer": {"report_to": "nothing"}}, "nothing is not supported"),
        ({"trainer": {"log_level": "loud"}}, "log_level is 'loud'; known are"),
        ({"trainer": {"dataloader_persistent_workers": True}}, "num_workers"),
        ({"trainer": {"packing": True, "packing_strategy": "x"}}, "Invalid packing strategy"),
        ({"trainer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of should be at least 1"),
        ({"device": "cuda:99"}, "cannot be used"),
    ],
    ids=str,
)
def test_bad_options_are_refused_and_leave_nothing(
    options: dict[str, Any], message: str, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match=message.replace("?", r"\?")):
        loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, **options)
    assert not list(tmp_path.iterdir())


def test_options_that_are_off_may_be_written_down(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    off = {
        "eval_strategy": "no",
        "do_eval": False,
        "push_to_hub": False,
        "hub_token": None,
        "fsdp": "",
        "use_cpu": True,
    }
    lora = {"kasa_config": None, "inference_mode": False, "bias": "none", "modules_to_save": []}
    loram.train(
        pruned_models["llama"], tmp_path / "out", data=rows_file, device="cpu", lora=lora, trainer={**STEPS, **off}
    )


def test_all_linear_is_every_linear_of_the_layers(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    options = {"data": rows_file, "trainer": {"max_steps": 1}}
    loram.train(tiny_llama, tmp_path / "named", lora={"target_modules": "all-linear"}, **options)
    loram.train(tiny_llama, tmp_path / "left_out", **options)
    assert contents(tmp_path / "named") == contents(tmp_path / "left_out")


def test_a_loss_that_is_not_finite_stops_with_nothing_written(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises((FloatingPointError, loram.UserError), match=r"finite|loss is|overflows"):
        loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, trainer={**STEPS, "learning_rate": 1e30})
    assert not (tmp_path / "out").exists()


PLAIN_TRL = """
import sys
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
model, rows, out = sys.argv[1:]
rows = load_dataset("json", data_files=rows, split="train").map(
    lambda row: {"prompt": row["question"], "completion": " " + row["answer"]}, remove_columns=["question", "answer"]
)
arguments = SFTConfig(
    out, max_steps=2, learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none", trust_remote_code=True,
    save_strategy="no",
)
trainer = SFTTrainer(model, arguments, train_dataset=rows, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"))
trainer.train()
trainer.save_model(out)
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
"""


def test_an_adapter_that_plain_trl_trained_recovers(
    pruned_models: dict[str, Path], tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """TRL alone trains an adapter on the pruned folder, and its plan is found by the name that the adapter has."""
    done = elsewhere(PLAIN_TRL, *map(str, (pruned_models["qwen3"], rows_file, tmp_path / "adapter")), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    plain = loram.evaluate(tiny_models["qwen3"], data=rows_file).perplexity
    assert loram.evaluate(tiny_models["qwen3"], adapter=tmp_path / "recovered", data=rows_file).perplexity != plain
