"""DPO, ORPO and KTO: their losses and gradients are those of TRL's own trainers, and they train, resume and recover."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, relative
from datasets import Dataset
from helpers import Stopped, contents, stop
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import loram
from loram import cli
from loram.compute.loss import use_log_probs_
from loram.run.dry_run import dry_run
from loram.run.pipeline import run
from loram.run.recipe import Recipe
from loram.run.report import summary
from loram.training.methods.pair_losses import PAIR_LOSSES, SMOOTHED
from loram.training.methods.preference import Preference, PreferenceOptions
from loram.training.methods.table import METHODS
from loram.training.options import TrainOptions, resolve

PREFERENCES = [name for name, method in METHODS.items() if isinstance(method, Preference)]
PAIRS = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "I do not know."} for row in ROWS[:8]]
LABELLED = [
    {"prompt": row[0]["prompt"], "completion": row[0][answer], "label": answer == "chosen"}
    for row in zip(PAIRS, strict=True)
    for answer in ("chosen", "rejected")
]
STEPS: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 2, "save_steps": 1}


def rows_of(method: str) -> list[dict[str, Any]]:
    return LABELLED if method == "kto" else PAIRS


def moved(model: Any) -> Any:
    """Give an adapter values with which the model is not the reference."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def masked(inputs: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """What TRL's collators give, with labels in place of their mask."""
    ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
    name = prefix.lower()
    labels = ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, -100)
    return {f"{name}input_ids": ids, f"{name}attention_mask": mask, f"{name}labels": labels}


def compare(
    method: str, trainer: Any, inputs: dict[str, Tensor], batch: dict[str, Tensor], **options: Any
) -> dict[str, float]:
    """Compare our loss and its gradients with those of TRL's trainer; return what is logged beside it."""
    model = moved(trainer.model.train())
    expected = trainer.compute_loss(model, inputs)
    reference_gradients = gradients(model, expected)
    logged = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    use_log_probs_(model.get_base_model())

    def policy(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        measured: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).log_probs
        return measured

    def reference(*rows: Tensor) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            return policy(*rows)

    row = METHODS[method]
    assert isinstance(row, Preference)
    loss, figures = row.loss(batch, policy, reference, PreferenceOptions(**options))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    measured = gradients(model, loss)
    assert measured.keys() == reference_gradients.keys()
    for name, gradient in measured.items():
        assert relative(gradient, reference_gradients[name]) < 1e-4, name
    assert max(gradient.abs().max() for gradient in measured.values()) > 0
    for name, figure in figures.items():
        assert figure.item() == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    return logged


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("loss_type", [*([name] for name in PAIR_LOSSES), ["sigmoid", "bco_pair", "sft"]], ids=str)
def test_the_losses_of_dpo_are_trls_own(loss_type: list[str], tiny_llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss_type": loss_type, "beta": 0.3}
    if set(loss_type) & set(SMOOTHED):
        options["label_smoothing"] = 0.1
    if len(loss_type) > 1:
        options["loss_weights"] = [0.8, 0.2, 1.0]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], **options),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
    logged = compare("dpo", trainer, inputs, masked(inputs), **options)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= logged.keys()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 5], [0, 2, 4]], ids=["mixed", "all good"])
def test_the_losses_of_kto_are_trls_own(
    chosen: list[int], loss_type: str, tiny_llama: Path, tokenizer: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "loss_type": loss_type, "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7
    }  # fmt: skip
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=KTOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            per_device_train_batch_size=8,
            **options,
        ),
        train_dataset=Dataset.from_list(LABELLED),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in chosen])
    mismatched = masked(inputs, "KL_") if loss_type == "kto" else {}
    batch = {**masked(inputs), **mismatched, "desirable": inputs["label"].bool()}
    logged = compare("kto", trainer, inputs, batch, **options)
    assert ("rewards/rejected" in logged) == (chosen != [0, 2, 4])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_loss_of_orpo_is_trls_own(
    tiny_llama: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=ORPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], beta=0.3, max_length=64
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
    both = trainer.concatenated_inputs(inputs, padding_value=trainer.padding_value)
    batch = {name: both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")}
    trainer._metrics = {"train": trainer._stored_metrics["train"]}
    compare("orpo", trainer, inputs, batch, beta=0.3)


def train(model: Path, out: Path, data: Path, method: str, **options: Any) -> Path:
    trainer = {**STEPS, **options.pop("trainer", {})}
    return loram.train(model, out, data=data, method=method, trainer=trainer, **options)


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(("method", "in_4bit"), [("dpo", True), ("orpo", False), ("kto", True)])
def test_it_trains_and_recovers(
    method: str,
    in_4bit: bool,
    tiny_models: dict[str, Path],
    pruned_models: dict[str, Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    data = jsonl(*rows_of(method))
    targets = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}
    options: dict[str, Any] = {"lora": targets, "load_in_4bit": in_4bit, "trainer": {"max_steps": 12}}
    adapter = train(pruned_models["qwen3"], tmp_path / "adapter", data, method, **options)
    losses = log(adapter)
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert losses[-1]["rewards/margins"] > losses[0]["rewards/margins"]
    assert losses[-1]["rewards/chosen"] > losses[-1]["rewards/rejected"]
    if method != "kto":
        assert losses[-1]["rewards/accuracies"] == 1
    recovered = loram.recover(adapter, tmp_path / "recovered")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"]), recovered)
    tokens = torch.tensor([[5, 17, 40, 8, 77]])
    with torch.inference_mode():
        assert relative(plain(tokens).logits, plain.unload()(tokens).logits) > 1e-4


@pytest.mark.parametrize("method", PREFERENCES)
def test_resumed_is_the_same_as_undisturbed(
    method: str,
    pruned_models: dict[str, Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also between two log lines, whose figures are means over steps before and after."""
    data = jsonl(*rows_of(method))
    expected = contents(train(pruned_models["qwen3"], tmp_path / "a", data, method))
    with monkeypatch.context() as patch:
        stop(patch, 4, Stopped())
        with pytest.raises(Stopped):
            train(pruned_models["qwen3"], tmp_path / "b", data, method)
    with caplog.at_level(logging.INFO, "loram"):
        train(pruned_models["qwen3"], tmp_path / "b", data, method)
    assert "going on from checkpoint-3" in caplog.text
    assert contents(tmp_path / "b") == expected


def test_an_adapter_that_exists_is_the_reference(
    pruned_models: dict[str, Path], rows_file: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """So the first loss is log 2, though this adapter is far from the model without one; and it ends elsewhere."""
    model, data = pruned_models["qwen3"], jsonl(*PAIRS)
    before = train(model, tmp_path / "before", rows_file, "lora", trainer={"max_steps": 3})
    steps = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    after = train(model, tmp_path / "after", data, "dpo", adapter=before, trainer=steps)
    first, second = log(after)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert second["loss"] < first["loss"]
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old)


def test_an_evaluation_says_which_answers_a_model_prefers(
    tiny_models: dict[str, Path], jsonl: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Against the log-probabilities of both answers as transformers gives them; streamed it is the same."""
    folder, data = tiny_models["qwen3"], jsonl(*PAIRS)
    measured = loram.evaluate(folder, data=data)
    chosen = loram.evaluate(folder, data=jsonl(*(as_text(row, "chosen") for row in PAIRS), name="chosen.jsonl"))
    rejected = [
        loram.evaluate(folder, data=jsonl(as_text(row, "rejected"), name=f"{number}.jsonl"))
        for number, row in enumerate(PAIRS)
    ]
    sums = sum(report.loss * report.tokens for report in rejected)
    assert measured.loss == pytest.approx(chosen.loss, rel=1e-6)
    assert measured.tokens == chosen.tokens
    assert measured.preferences is not None
    assert chosen.preferences is None
    assert measured.preferences.margin == pytest.approx((sums - chosen.loss * chosen.tokens) / len(PAIRS), rel=1e-5)
    streamed = loram.evaluate(folder, data=data, stream=True).preferences
    assert streamed is not None
    assert streamed.model_dump() == pytest.approx(measured.preferences.model_dump(), rel=1e-5)
    turned = loram.evaluate(folder, data={"path": str(data), "columns": {"chosen": "rejected", "rejected": "chosen"}})
    assert turned.preferences is not None
    assert turned.preferences.accuracy == pytest.approx(1 - measured.preferences.accuracy)
    assert cli._main(["eval", str(folder), "--dataset", str(data)]) == 0
    assert (
        f"{100 * measured.preferences.accuracy:.1f}% of pairs, by {measured.preferences.margin:.2f} nats"
        in capfd.readouterr().out
    )


def as_text(row: dict[str, str], answer: str) -> dict[str, str]:
    return {"prompt": row["prompt"], "completion": row[answer]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora", "preference": {"beta": 0.2}}, "preference: .* of methods dpo, orpo and kto, .* is lora"),
        ({"method": "orpo", "preference": {"loss_type": "ipo"}}, "loss_type has no use with method orpo"),
        ({"method": "dpo", "preference": {"desirable_weight": 2}}, "desirable_weight has no use with method dpo"),
        (
            {"method": "dpo", "preference": {"loss_type": "kto"}},
            "'kto' is not known with method dpo; known are sigmoid",
        ),
        (
            {"method": "kto", "preference": {"loss_type": "ipo"}},
            "'ipo' is not known with method kto; .* kto, apo_zero_",
        ),
        ({"method": "dpo", "preference": {"loss_weights": [1, 2]}}, "loss_weights has 2 numbers, and loss_type 1"),
        (
            {"method": "dpo", "preference": {"label_smoothing": 0.1}},
            "label_smoothing is for loss_type exo_pair, robust",
        ),
        ({"method": "dpo", "preference": {"loss_type": "exo_pair"}}, "exo_pair needs label_smoothing above 0"),
        ({"method": "dpo", "preference": {"discopop_tau": 0.1}}, "discopop_tau is for loss_type discopop"),
        (
            {"method": "dpo", "anchor_steps": 4},
            "anchor_steps: measures gradients of the cross entropy, and method dpo has",
        ),
        ({"method": "dpo", "engine": "streamed"}, "engine streamed: cannot train by method dpo"),
        ({"method": "dpo", "trainer": {"packing": True}}, "packing puts rows together, and dpo compares them"),
        ({"method": "dpo", "trainer": {"router_aux_loss_coef": 0.1}}, "router_aux_loss_coef is not added"),
        ({"method": "dpo", "trainer": {"beta": 0.1}}, "no option 'beta'; here it is called train.preference.beta"),
        ({"method": "dpo", "trainer": {"loss_type": "dft"}}, "methods dpo and kto have preference.loss_type"),
        ({"method": "kto", "trainer": {"per_device_train_batch_size": 1}}, "kto compares each row with another"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(loram.UserError, match=message):
        resolve(TrainOptions.of(**options))


def test_a_recipe_is_checked_and_shown_with_both_answers(
    pruned_models: dict[str, Path], rows_file: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = {
        "model_name_or_path": str(pruned_models["qwen3"]),
        "output_dir": str(tmp_path / "run"),
        "dataset": str(jsonl(*PAIRS)),
        "train": {"method": "dpo", "preference": {"loss_type": "ipo"}},
    }
    shown = dry_run(Recipe.model_validate(recipe))
    (counts,) = shown.dataset.values()
    assert counts.rows == len(PAIRS)
    assert shown.training["pruned"].memory is not None
    assert ["".join(span.text for span in example if span.in_loss) for example in shown.examples][:2] == [
        f"{PAIRS[0]['chosen']}<|im_end|>\n", "I do not know.<|im_end|>\n"
    ]  # fmt: skip
    with pytest.raises(loram.UserError, match=r"has question and answer, which every method .* chosen and rejected"):
        dry_run(Recipe.model_validate({**recipe, "dataset": str(rows_file)}))
    with pytest.raises(ValueError, match=r"polish: learns from texts, and dpo from preferences; name texts"):
        Recipe.model_validate({**recipe, "polish": {}})


def test_a_run_says_which_answers_are_preferred(
    pruned_models: dict[str, Path], jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    data = str(jsonl(*PAIRS))
    recipe = {
        "model_name_or_path": str(pruned_models["qwen3"]),
        "output_dir": str(tmp_path / "run"),
        "dataset": data,
        "eval_dataset": {"task": data},
        "device": "cpu",
        "train": {"method": "dpo", "trainer": {**STEPS, "save_strategy": "no"}},
    }
    report = run(Recipe.model_validate(recipe))
    before, after = (report.row(name).preferences["task"] for name in ("base", "recovered"))
    assert after.margin > before.margin
    assert f"adapter in {100 * after.accuracy:.0f}%; the margin goes from {before.margin:.2f} to" in summary(report)
    assert "perplexity" not in summary(report)
