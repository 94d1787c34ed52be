"""The chunked loss equals the plain loss, and so do the gradients of adapters on lm_head and below it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_FAMILY, make_model, relative
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from loram.compute.loss import Balance, chunked_cross_entropy, parts_of, use_chunked_loss_


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_gradients_equal_those_of_the_plain_loss(family: str, tiny_models: dict[str, Path]) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    options = LoraConfig(
        r=3, target_modules=["lm_head", "q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(plain, options)
    ids = torch.randint(0, 320, (3, 11))
    labels = ids.clone()
    labels[0, :5], labels[2, 8:] = -100, -100

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
    expected = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    reference = gradients(expected)
    causal = model.get_base_model()
    _, _, rule = parts_of(causal)
    assert (rule.softcap is not None) == (family in ("gemma2", "gemma4_text"))
    for chunk_tokens in (1, 4, 1000):
        hidden = causal.model(input_ids=ids).last_hidden_state
        found = chunked_cross_entropy(hidden, labels, causal.lm_head, rule=rule, chunk_tokens=chunk_tokens)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        for name, gradient in gradients(found).items():
            assert relative(gradient, reference[name]) < 1e-5, name
    assert any("lm_head.lora_A" in name for name in reference)
    assert reference.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_loss_of_routers_is_transformers_own(family: str, tokenizer: Any, tmp_path: Path) -> None:
    make_model(tmp_path, family, tokenizer, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 320, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    model.router_aux_loss_coef, chosen = 0.5, model.config.num_experts_per_tok
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = model(**batch, output_router_logits=True)
    reference = gradients(expected.loss)
    assert expected.aux_loss > 0
    use_chunked_loss_(model, balance=Balance(coefficient=0.5, chosen=chosen))
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        loss = model(**batch).loss
        assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        for name, gradient in gradients(loss).items():
            assert relative(gradient, reference[name]) < 1e-5, name
    half = model(**batch, num_items_in_batch=2 * int((labels[:, 1:] >= 0).sum())).loss  # one of two micro-batches
    assert half.item() == pytest.approx(expected.loss.item() / 2, rel=1e-6)
