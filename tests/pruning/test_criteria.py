"""Criteria: against plain sums over a whole model with hooks, and on models with a plainly unimportant part."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_model, relative, unfused, weakened
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
from loram.base.errors import UserError
from loram.disk.checkpoint import Checkpoint
from loram.pruning.criteria import CRITERIA, NEEDS_TEXT
from loram.pruning.evidence import InputStatistics
from loram.pruning.score import score

# Of unlike lengths, so that a batch of them is padded; one is longer than the sliding windows of 8, one says nothing.
SAMPLES = [[5, 17, 40, 8, 77, 30], [9, 31, 70, 2, 44, 6, 18, 25, 81, 5, 6, 11], [250, 3], [4]]
LAYER = 2
HEADS, GROUPS, WIDTH, CHANNELS = 8, 4, 8, 40
UP = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
DOWN = ("o_proj", "down_proj")
FUSED = {"qkv_proj": UP[:3], "gate_up_proj": UP[3:]}


def inputs_of(model: Any) -> dict[str, list[Tensor]]:
    """Linear of layer 2 -> its inputs (tokens, features), float64, for every sample alone."""
    inputs: dict[str, list[Tensor]] = {}
    layer = model.model.layers[LAYER]
    for block in (layer.self_attn, layer.mlp):
        for name, part in block.named_children():
            for plain in FUSED.get(name, (name,) if isinstance(part, torch.nn.Linear) else ()):
                part.register_forward_hook(
                    lambda _, args, output, name=plain: inputs.setdefault(name, []).append(args[0][0].double())
                )
    with torch.inference_mode():
        for sample in SAMPLES:
            model.eval()(torch.tensor([sample]))
    return inputs


def weights_of(model: Any) -> dict[str, Tensor]:
    weights = unfused(model.model.layers[LAYER], lambda linear: linear.weight.detach().double())
    return {name: weights[name] for name in (*UP, *DOWN)}


def summed(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    """Importance of every weight -> the sum over what each unit owns, written out unit by unit."""
    queries = WIDTH * HEADS // GROUPS
    groups, channels = torch.zeros(GROUPS, dtype=torch.float64), torch.zeros(CHANNELS, dtype=torch.float64)
    for group in range(GROUPS):
        owned = slice(queries * group, queries * (group + 1))
        if "q_proj" in importance:
            groups[group] += importance["q_proj"][owned].sum()
            for name in ("k_proj", "v_proj"):
                groups[group] += importance[name][WIDTH * group : WIDTH * (group + 1)].sum()
        groups[group] += importance["o_proj"][:, owned].sum()
    for channel in range(CHANNELS):
        for name in ("gate_proj", "up_proj"):
            if name in importance:
                channels[channel] += importance[name][channel].sum()
        channels[channel] += importance["down_proj"][:, channel].sum()
    return {"kv_groups": groups, "channels": channels}


def reference(criterion: str, model: Any) -> dict[str, Tensor]:
    weights = weights_of(model)
    if criterion == "magnitude":
        return summed({name: weight.abs() for name, weight in weights.items()})
    if criterion == "magnitude_l2":
        return summed({name: weight**2 for name, weight in weights.items()})
    inputs = inputs_of(model)
    if criterion == "wanda":
        norms = {name: torch.cat(rows).norm(dim=0) for name, rows in inputs.items()}
        return summed({name: weight.abs() * norms[name] for name, weight in weights.items()})
    if criterion == "flap":
        variances = {name: torch.cat(inputs[name]).var(dim=0, correction=1) for name in DOWN}
        return summed({name: weights[name] ** 2 * variances[name] for name in DOWN})
    assert criterion == "activation"
    heads, channels = torch.zeros(HEADS, dtype=torch.float64), torch.zeros(CHANNELS, dtype=torch.float64)
    for attention, mlp in zip(inputs["o_proj"], inputs["down_proj"], strict=True):
        heads += attention.view(-1, HEADS, WIDTH).norm(dim=2).mean(dim=0) ** 2
        channels += mlp.abs().mean(dim=0) ** 2
    return {"kv_groups": heads.sqrt().view(GROUPS, -1).sum(dim=1), "channels": channels.sqrt()}


@pytest.mark.parametrize("criterion", ["activation", "wanda", "flap", "magnitude", "magnitude_l2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_plain_sums_over_the_whole_model(
    family: str, criterion: str, tiny_models: dict[str, Path]
) -> None:
    """taylor has the like in test_score.py."""
    expected = reference(criterion, AutoModelForCausalLM.from_pretrained(tiny_models[family]))
    found = score(Checkpoint(tiny_models[family]), [criterion], [LAYER], calibration=SAMPLES)[criterion][LAYER]
    assert found.keys() == expected.keys()
    for space, scores in found.items():
        assert scores.dtype == torch.float64
        assert torch.allclose(scores, expected[space], rtol=1e-4), space


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
@pytest.mark.parametrize("group", range(4))
def test_a_plainly_unimportant_unit_is_the_one_that_goes(
    criterion: str, group: int, tokenizer: Any, tmp_path: Path
) -> None:
    """Scoring heads over the wrong axis under grouped-query attention would blame another group."""
    folder = weakened(make_model(tmp_path / "model", "llama", tokenizer), group, channel=7)
    plan = loram.prune(folder, tmp_path / "out", ratio=0.25, criterion=criterion, keep_first=2, keep_last=2)
    assert plan.layers[2]["kv_groups"] == tuple(index for index in range(4) if index != group)
    assert 7 not in plan.layers[2]["channels"]
    assert len(plan.layers[2]["channels"]) == 30


def test_several_criteria_in_one_pass_equal_each_alone(tiny_llama: Path) -> None:
    checkpoint, layers = Checkpoint(tiny_llama), [1, 3]
    together = score(checkpoint, list(CRITERIA), layers, calibration=SAMPLES, seed=5)
    assert list(together) == list(CRITERIA)
    for criterion, found in together.items():
        alone = score(checkpoint, [criterion], layers, calibration=SAMPLES, seed=5)[criterion]
        assert list(found) == list(alone) == layers
        for layer in layers:
            assert all(torch.equal(found[layer][space], alone[layer][space]) for space in ("kv_groups", "channels"))


def test_no_two_criteria_are_the_same(tiny_llama: Path) -> None:
    found = score(Checkpoint(tiny_llama), list(CRITERIA), [2], calibration=SAMPLES)
    shares = [scores[2]["channels"] / scores[2]["channels"].sum() for scores in found.values()]
    assert len({tuple(share.round(decimals=6).tolist()) for share in shares}) == len(CRITERIA)


@pytest.mark.parametrize("criterion", sorted(NEEDS_TEXT))
def test_how_samples_are_padded_changes_nothing(
    criterion: str, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny_models["gemma2"])
    padded = score(checkpoint, [criterion], [2], calibration=SAMPLES)[criterion][2]
    monkeypatch.setattr(sys.modules["loram.pruning.score"], "BATCH_TOKENS", 1)
    alone = score(checkpoint, [criterion], [2], calibration=SAMPLES)[criterion][2]
    assert all(torch.allclose(padded[space], alone[space], rtol=1e-5) for space in padded)


@pytest.mark.parametrize("elements", [1, 100])
def test_importance_worked_out_some_rows_at_a_time_is_the_same(
    elements: int, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(Checkpoint(tiny_llama), list(CRITERIA), [2], calibration=SAMPLES)
    monkeypatch.setattr(sys.modules["loram.pruning.score"], "_BLOCK_ELEMENTS", elements)
    by_rows = score(Checkpoint(tiny_llama), list(CRITERIA), [2], calibration=SAMPLES)
    for criterion, found in by_rows.items():
        assert all(torch.allclose(found[2][space], whole[criterion][2][space], rtol=1e-5) for space in found[2])


@pytest.mark.parametrize("criterion", sorted(NEEDS_TEXT))
def test_text_that_predicts_nothing_is_refused(criterion: str, tiny_llama: Path) -> None:
    for samples in ([], [[5], [6]]):
        with pytest.raises(UserError, match="no text of at least two tokens"):
            score(Checkpoint(tiny_llama), [criterion], [2], calibration=samples)


def test_statistics_gathered_in_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    inputs, real = torch.randn(6, 5, 8) + 100, torch.rand(6, 5) > 0.3  # a mean far from zero: squares would cancel
    real[:, 0] = True
    statistics = InputStatistics(8, 4, torch.device("cpu"))
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        statistics.add_(inputs[rows], real[rows])
    tokens = inputs[real].double()
    assert statistics.count == len(tokens)
    assert relative(statistics.mean, tokens.mean(0)) <= 1e-6
    assert relative(statistics.variance, tokens.var(0)) <= 1e-4
    assert relative(statistics.norm, tokens.norm(dim=0)) <= 1e-6
    means = [row[kept].double().view(-1, 2, 4).norm(dim=2).mean(0) for row, kept in zip(inputs, real, strict=True)]
    assert relative(statistics.head_norm, torch.stack(means).norm(dim=0)) <= 1e-6


def test_one_token_has_no_variance() -> None:
    statistics = InputStatistics(3, 1, torch.device("cpu"))
    statistics.add_(torch.ones(1, 2, 3), torch.tensor([[True, False]]))
    assert statistics.variance.tolist() == [0, 0, 0]
