"""Scores: against autograd on the whole model, and on models with a plainly unimportant part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, unfused
from transformers import AutoModelForCausalLM

import loram
from loram.disk.checkpoint import Checkpoint
from loram.model.parts import CHANNELS, KV_GROUPS
from loram.pruning.score import Scores, score

SAMPLES = [[5, 17, 40, 8, 77, 30], [9, 31, 70, 2, 44, 6, 18, 25, 81]]


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_equals_plain_autograd_summed_by_hand(family: str, tiny_models: dict[str, Path]) -> None:
    checkpoint = Checkpoint(tiny_models[family])
    scores = score(checkpoint, ["taylor"], [2], calibration=SAMPLES)["taylor"]

    model = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    logits = [model(torch.tensor([sample])).logits[0, :-1] for sample in SAMPLES]
    targets = torch.tensor([token for sample in SAMPLES for token in sample[1:]])
    torch.nn.functional.cross_entropy(torch.cat(logits), targets).backward()
    width = 8

    def salience(linear: Any) -> torch.Tensor:
        return (linear.weight * linear.weight.grad).abs().detach().double()

    saliences = unfused(model.model.layers[2], salience)
    for group in range(4):
        queries, head = slice(2 * width * group, 2 * width * (group + 1)), slice(width * group, width * (group + 1))
        expected = (
            saliences["q_proj"][queries].sum()
            + saliences["k_proj"][head].sum()
            + saliences["v_proj"][head].sum()
            + saliences["o_proj"][:, queries].sum()
        )
        assert scores[2]["kv_groups"][group].item() == pytest.approx(expected.item(), rel=1e-4)
    expected = saliences["gate_proj"].sum(1) + saliences["up_proj"].sum(1) + saliences["down_proj"].sum(0)
    assert torch.allclose(scores[2]["channels"], expected, rtol=1e-4)


def test_magnitude_sums_absolute_weights(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    up, gate, down = (checkpoint.tensor(f"model.layers.1.mlp.{n}_proj.weight").double() for n in ("up", "gate", "down"))
    expected = up.abs().sum(1) + gate.abs().sum(1) + down.abs().sum(0)
    assert torch.allclose(score(checkpoint, ["magnitude"], [1])["magnitude"][1]["channels"], expected, rtol=1e-6)


def randomly(checkpoint: Checkpoint, layers: list[int], seed: int) -> Scores:
    return score(checkpoint, ["random"], layers, seed=seed)["random"]


def test_random_is_seeded_and_independent_of_the_other_layers(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    several, alone = randomly(checkpoint, [1, 2, 3], 5), randomly(checkpoint, [2], 5)
    assert torch.equal(several[2]["channels"], alone[2]["channels"])
    assert not torch.equal(several[1]["channels"], several[2]["channels"])
    assert not torch.equal(alone[2]["channels"], randomly(checkpoint, [2], 6)[2]["channels"])


def test_every_space_gets_a_score_for_each_unit(tiny_llama: Path) -> None:
    found = randomly(Checkpoint(tiny_llama), [0, 1, 2, 3, 4], 0)
    assert list(found) == [0, 1, 2, 3, 4]
    assert all(
        scores[KV_GROUPS.name].shape == (4,) and scores[CHANNELS.name].shape == (40,) for scores in found.values()
    )


def test_without_calibration_text_taylor_uses_the_builtin_passages(tiny_llama: Path, tmp_path: Path) -> None:
    plan = loram.prune(tiny_llama, tmp_path / "out", ratio=0.5, keep_first=1, keep_last=1)
    assert (plan.criterion, sorted(plan.layers)) == ("taylor", [1, 2, 3])
