"""The chunked loss equals the plain loss, and so do the gradients of adapters on lm_head and below it."""

from pathlib import Path

import pytest
import torch
from conftest import EVERY_FAMILY, relative
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from loram.compute.loss import chunked_cross_entropy, parts_of


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
