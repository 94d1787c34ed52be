"""Mixtures of experts: the laws, what decides which experts stay, and both forms of their checkpoints."""

import filecmp
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, HYBRID_EXPERTS, elsewhere, make_model, random_adapter, relative
from helpers import WithoutExperts, zeroed
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
from loram.base.errors import UserError
from loram.compute.loading import load_model
from loram.compute.streaming import Stream
from loram.data.batches import make_batches
from loram.disk.checkpoint import Checkpoint
from loram.model.plan import PruningPlan
from loram.pruning.criteria import EXPERT_CRITERIA, ExpertRules
from loram.pruning.score import score_layers

TOKENS = torch.tensor([[5, 17, 40, 8, 77, 30, 12, 9, 61, 3, 22, 50], [9, 9, 31, 70, 2, 44, 6, 18, 25, 81, 90, 7]])
SAMPLES = [row.tolist() for row in TOKENS]
CUT = {"ratio": 0.5, "expert_channels_ratio": 0.5, "keep_first": 1, "keep_last": 1}
STEP = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-1, "logging_steps": 1}
MIXTURES = [*EXPERTS, *HYBRID_EXPERTS]
on_every_mixture = pytest.mark.parametrize("family", MIXTURES)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model.eval()(TOKENS).logits
    return result


@pytest.fixture(scope="module")
def pruned(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (base folder, pruned folder, plan), pruned at random in each space; made once."""
    made: dict[str, tuple[Path, Path, PruningPlan]] = {}

    def get(family: str) -> tuple[Path, Path, PruningPlan]:
        if family not in made:
            out = tmp_path_factory.mktemp("pruned") / family
            made[family] = tiny_models[family], out, loram.prune(tiny_models[family], out, criterion="random", **CUT)
        return made[family]

    return get


@on_every_mixture
def test_laws_1_and_2_a_pruned_mixture_is_the_full_one_without_its_experts(family: str, pruned: Any) -> None:
    base, folder, plan = pruned(family)
    checkpoint = Checkpoint(base)
    for name in checkpoint.names():
        small = loram.narrow(name, checkpoint.tensor(name), plan)
        assert torch.equal(loram.narrow(name, loram.widen(name, small, plan), plan), small)
    assert {"kv_groups", "experts", "expert_channels"} <= plan.layers[2].keys()
    model, full = loram.load_pruned(folder).eval(), zeroed(base, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters()[1]
    assert relative(logits(full), logits(AutoModelForCausalLM.from_pretrained(base))) > 1e-2
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with WithoutExperts(full, plan):
        assert relative(logits(model), logits(full)) <= 1e-5
        mask = torch.ones_like(TOKENS)
        expected = full.generate(TOKENS, attention_mask=mask, **options)
    assert torch.equal(model.generate(TOKENS, attention_mask=mask, **options), expected)


@on_every_mixture
def test_law_3_an_adapter_on_attention_is_recovered(family: str, pruned: Any, tmp_path: Path) -> None:
    base, _, plan = pruned(family)
    adapter, recovered = _adapters(family, pruned, tmp_path)
    small = PeftModel.from_pretrained(loram.load_pruned(pruned(family)[1]), adapter)
    plain = zeroed(base, plan)
    with WithoutExperts(plain, plan):
        assert relative(logits(small), logits(PeftModel.from_pretrained(plain, recovered))) <= 1e-5


def _adapters(family: str, pruned: Any, folder: Path) -> tuple[Path, Path]:
    """Return a random adapter of a pruned model, on its default targets, and the recovered one."""
    _, small, plan = pruned(family)
    targets = list(plan.architecture.default_targets)
    assert targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = random_adapter(loram.load_pruned(small), folder / family, target_modules=targets)
    plan.save(adapter)
    return adapter, loram.recover(adapter, folder / f"recovered-{family}")


PLAIN_PEFT = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
tokens = torch.arange(3, 15)[None]
for adapter, base in zip(sys.argv[1::2], sys.argv[2::2]):
    model, plain = AutoPeftModelForCausalLM.from_pretrained(adapter), AutoModelForCausalLM.from_pretrained(base)
    print((model(tokens).logits - plain(tokens).logits).abs().max().item())
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
"""


def test_law_4_recovered_adapters_are_plain_peft(pruned: Any, tmp_path: Path) -> None:
    """All families in one process, which takes seconds to start."""
    folders = [str(path) for family in MIXTURES for path in (_adapters(family, pruned, tmp_path)[1], pruned(family)[0])]
    done = elsewhere(PLAIN_PEFT, *folders, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower()
    changes = [float(line) for line in done.stdout.split()]
    assert len(changes) == len(MIXTURES)
    assert min(changes) > 1e-3


@on_every_mixture
def test_law_5_a_pruned_mixture_survives_transformers_saving(family: str, pruned: Any, tmp_path: Path) -> None:
    _, folder, _ = pruned(family)
    loram.load_pruned(folder).save_pretrained(tmp_path)
    mine, theirs = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (folder / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def whole_scores(base: Path, layer: int) -> Mapping[str, Tensor]:
    """Scores of a layer's experts, worked out on the model as a whole, expert by expert."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, experts_implementation="eager").eval()
    row, prefix = Checkpoint(base).rows_by_layer[layer], f"model.layers.{layer}"
    assert row.experts is not None
    experts = model.get_submodule(f"{prefix}.{row.experts.path}")
    seen: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(TOKENS, labels=TOKENS).loss.backward()
    handle.remove()
    ((hidden, chosen, weights),) = seen
    reap, frequency = [], []
    for expert in range(experts.num_experts):
        outputs = experts(hidden, chosen, weights * (chosen == expert))  # gate value x output of this expert alone
        tokens = (chosen == expert).any(1)
        reap.append(outputs.norm(dim=-1)[tokens].mean() if tokens.any() else torch.zeros(()))
        frequency.append(tokens.sum())
    spread = {name: (tensor * tensor.grad).abs() for name, tensor in experts.named_parameters()}
    if "gate_up_proj_bias" in spread:  # gpt_oss: (experts, hidden, 2 * channels), gate and up side by side
        fused = spread["gate_up_proj"].sum(1) + spread["gate_up_proj_bias"]
        channels = fused.unflatten(1, (-1, 2)).sum(2) + spread["down_proj"].sum(2)
    else:
        gates, ups = spread["gate_up_proj"].sum(2).chunk(2, dim=1)
        channels = gates + ups + spread["down_proj"].sum(1)
    return {
        "reap": torch.stack(reap),
        "frequency": torch.stack(frequency),
        "router": model.get_parameter(f"{prefix}.{row.experts.router}").norm(dim=1),
        "taylor": torch.stack([tensor.flatten(1).sum(1) for tensor in spread.values()]).sum(0),
        "channels": channels.flatten(),
    }


@on_every_mixture
def test_law_6_streamed_scores_of_experts_are_the_whole_models(family: str, tiny_models: dict[str, Path]) -> None:
    checkpoint, expected = Checkpoint(tiny_models[family]), whole_scores(tiny_models[family], 2)
    for criterion in EXPERT_CRITERIA.keys() - {"random"}:
        rules = ExpertRules(experts=criterion, channels="taylor" if criterion == "taylor" else None)
        layers = score_layers(checkpoint, [], [2], calibration=SAMPLES, experts=rules)
        scores = next(layer.expert_scores for layer in layers if layer.index == 2)
        assert relative(scores["experts"].float(), expected[criterion].float()) < 1e-4
        if criterion == "taylor":
            assert relative(scores["expert_channels"].float(), expected["channels"]) < 1e-4


@on_every_mixture
def test_law_7_the_same_pruning_gives_the_same_bytes(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        loram.prune(tiny_models[family], tmp_path / name, calibration=rows_file, calibration_samples=4, **CUT)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    same, *others = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)
    assert (sorted(same), others) == (files, [[], []])


def test_a_stream_reads_experts_when_those_of_the_layer_before_are_gone(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny_models["qwen3_moe"])
    stream = Stream(
        checkpoint, make_batches([[1, 5, 6, 7]], max_tokens=16), device=torch.device("cpu"), dtype=torch.float32
    )
    read, read_tensor = list[tuple[str, set[int]]](), checkpoint.tensor

    def note(name: str, *rows: int) -> Tensor:
        held = {
            index
            for index, layer in enumerate(stream.model.model.layers)
            if any(".experts." in part and not tensor.is_meta for part, tensor in layer.named_parameters())
        }
        if ".experts." in name:
            read.append((name, held))
        return read_tensor(name, *rows)

    monkeypatch.setattr(Checkpoint, "tensor", lambda _, name, *rows: note(name, *rows))
    for _ in stream.forward(keep_from=0):
        pass
    for _ in stream.backward(0, lambda *_: None):
        pass
    assert {name for name, _ in read} == {name for name in checkpoint.names() if ".experts." in name}
    assert all(held <= {int(name.split(".")[2])} for name, held in read)


@on_every_mixture
def test_law_6_a_streamed_mixture_has_the_whole_models_log_probabilities(family: str, pruned: Any) -> None:
    base, folder, _ = pruned(family)
    for path in (base, folder):
        stream = Stream(
            Checkpoint(path), make_batches(SAMPLES, max_tokens=12), device=torch.device("cpu"), dtype=torch.float32
        )
        for _ in stream.forward():
            pass
        model = loram.load_pruned(folder) if path == folder else AutoModelForCausalLM.from_pretrained(base)
        whole = logits(model)[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None])[..., 0]
        streamed = torch.zeros_like(whole)
        for batch, values in zip(stream.batches, stream.log_probs(), strict=True):
            streamed[list(batch.rows)] = values.view(len(batch.rows), -1)
        assert relative(streamed, whole) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "glm4_moe"])
def test_from_pruning_by_reap_to_merging(
    family: str, tiny_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    base = tiny_models[family]
    plan = loram.prune(base, tmp_path / "pruned", experts_ratio=0.5, calibration=rows_file, keep_first=1, keep_last=1)
    assert (plan.ratio, plan.ratios) == (None, {"experts": 0.5})
    assert set(plan.layers[2]) == {"experts"}
    loram.train(tmp_path / "pruned", tmp_path / "adapter", data=rows_file, trainer=STEP)
    recovered = loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    merged = loram.merge(base, recovered, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before, after = logits(plain), logits(PeftModel.from_pretrained(plain, recovered))
    assert relative(after, before) > 1e-3
    assert relative(logits(AutoModelForCausalLM.from_pretrained(merged)), after) < 1e-5
    assert load_file(merged / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    loss = loram.evaluate(base, adapter=recovered, data=rows_file, device="cpu", stream=True).loss
    assert loss == pytest.approx(loram.evaluate(merged, data=rows_file, device="cpu").loss, rel=1e-5)


@on_every_mixture
def test_both_forms_of_a_checkpoint_are_one_model(family: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The hub has one tensor per expert; a folder with transformers' own 3-D tensors is read as well."""
    by_experts = Checkpoint(tiny_models[family])
    stacked = shutil.copytree(tiny_models[family], tmp_path / "stacked")
    tensors = {name: by_experts.tensor(name).clone() for name in by_experts.names()}
    save_file(tensors, stacked / "model.safetensors", {"format": "pt"})
    assert Checkpoint(stacked).names() == by_experts.names()
    assert Checkpoint(stacked).fingerprint == by_experts.fingerprint
    assert Checkpoint(stacked).parameters == by_experts.parameters == loram.estimate(stacked).parameters
    experts = by_experts.architecture.experts
    assert experts is not None
    name = f"model.layers.2.{experts.path}.gate_up_proj"
    assert torch.equal(by_experts.tensor(name, 2, 4), tensors[name][2:4])
    assert torch.equal(torch.cat([block for _, block in by_experts.blocks(name)]), tensors[name])


def test_an_expert_that_is_missing_or_there_twice_is_named(tokenizer: Any, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "mixtral", tokenizer)
    stacked, weights = Checkpoint(base), load_file(base / "model.safetensors")
    down = stacked.tensor("model.layers.1.mlp.experts.down_proj")
    save_file({**weights, "model.layers.1.mlp.experts.down_proj": down}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.down_proj as a whole and one tensor per"):
        Checkpoint(base)
    del weights["model.layers.2.block_sparse_moe.experts.3.w3.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="gate_up_proj lacks a part of expert 3, though there are 6 experts"):
        Checkpoint(base)


def test_a_layer_that_the_model_does_not_use_stays_in_the_files_only(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """GLM's files have a layer more, which predicts the token after the next; so do ERNIE's, under another name."""
    plain = Checkpoint(tiny_models["glm4_moe"])
    base = shutil.copytree(plain.folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    added = {name.replace("layers.4.", "layers.5."): weights[name].clone() for name in weights if "layers.4." in name}
    added["model.layers.5.eh_proj.weight"] = torch.zeros(2, 2)
    save_file({**weights, **added}, base / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(base)
    assert checkpoint.names() == plain.names()
    assert checkpoint.fingerprint == plain.fingerprint
    model = load_model(checkpoint)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(plain.folder)))
    loram.prune(base, tmp_path / "pruned", criterion="random", **CUT)
    merged = loram.merge(base, random_adapter(model, tmp_path / "adapter", target_modules=["q_proj"]), tmp_path / "out")
    found = load_file(merged / "model.safetensors")
    assert found.keys() == weights.keys() | added.keys()
    assert all(torch.equal(found[name], added[name]) for name in added)


def test_experts_in_groups_keep_their_number(tokenizer: Any, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "glm4_moe", tokenizer, n_routed_experts=8, n_group=2, topk_group=1)
    options = {"criterion": "random", "keep_first": 1, "keep_last": 1}
    with pytest.raises(UserError, match=r"experts_ratio: the config's n_group is 2, .*; set it to 0"):
        loram.prune(base, tmp_path / "out", ratio=0.5, **options)
    plan = loram.prune(base, tmp_path / "out", ratio=0.5, experts_ratio=0, expert_channels_ratio=0.5, **options)
    assert relative(logits(loram.load_pruned(tmp_path / "out")), logits(zeroed(base, plan))) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_ratio": 0.9}, "leaves 1 of 6 experts, and every token needs 2"),
        ({"channels_ratio": 0.5, "experts_ratio": 0.5}, "channels_ratio: mixtral has no channels"),
        ({"experts_ratio": 0.5, "experts_criterion": "best"}, "experts_criterion 'best' is not known"),
        ({"expert_channels_ratio": 0.5, "criterion": "wanda"}, "wanda: cannot score the channels of experts"),
        ({"pattern": "4:8"}, "prunes linears, and the experts of this model are none"),
        ({"ratio": 0.5, "kv_groups_ratio": 0, "experts_ratio": 0}, "nothing is pruned"),
    ],
    ids=str,
)
def test_what_cannot_be_done_with_experts_is_refused(
    options: dict[str, Any], message: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        loram.prune(tiny_models["mixtral"], tmp_path / "out", keep_first=1, keep_last=1, **options)
    assert list(tmp_path.iterdir()) == []
