"""Alignment has the plain loss and keeps the best weights; probes and interruptions change nothing."""

import filecmp
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EMBEDDING, FAMILIES, HEAD, make_model, relative
from helpers import Stopped, stop
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loram
from loram import cli
from loram.alignment import judge
from loram.alignment.align import align
from loram.alignment.distill import AlignTrainer, divergence, top_k_divergence
from loram.alignment.mixture import Rows, collate, places, to_tensors
from loram.alignment.probe import Probe, ProbeLosses
from loram.alignment.teacher import TeacherCache
from loram.compute.logits import LogitRule
from loram.compute.loss import chunked_loss
from loram.disk.artifacts import find_manifest

MODULE = sys.modules["loram.alignment.align"]
OPTIONS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "warmup_steps": 0,
}


def run(pruned: Path, out: Path, **options: Any) -> Path:
    trainer = {**OPTIONS, **options.pop("trainer", {})}
    return align(pruned, out, **{"probe": False, "trainer": trainer, **options})


def entries(folder: Path, kind: str = "loss") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "align_log.jsonl").read_text().splitlines()]
    return [entry for entry in found if kind in entry]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def taught(model: Path, out: Path, rows: Path, k: int) -> TeacherCache:
    loram.teach(model, out, data=rows, top_k=k)
    return TeacherCache(out)


# The loss


def dense(student: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the KL divergence from the logits of both whole models."""
    wanted = batch["labels"][:, 1:] != -100
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        log_p = teacher(**inputs).logits[:, :-1][wanted].double().log_softmax(-1)
    log_q = student(**inputs).logits[:, :-1][wanted].double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum() / wanted.sum()


def gradients(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Alone:
    """An accelerator with only one process."""

    num_processes = 1

    def unwrap_model(self, model: Any) -> Any:
        return model

    def autocast(self) -> Any:
        return torch.autograd.profiler.record_function("none")


def loss_of(student: Any, batch: dict[str, torch.Tensor], teacher: Any = None, clm_weight: float = 0.0) -> torch.Tensor:
    """Compute the Trainer's loss of a batch."""
    trainer = AlignTrainer.__new__(AlignTrainer)
    trainer.clm_weight, trainer.teacher, trainer.accelerator = clm_weight, teacher, Alone()
    return trainer.compute_loss(student, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_dense_loss(
    family: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """This holds for a live teacher, and within 16 bits for a cache with the whole vocabulary."""
    cache = taught(tiny_models[family], tmp_path / "cache", rows_file, 320)
    batch = collate([to_tensors(cache[row]) for row in range(5)])
    teacher = AutoModelForCausalLM.from_pretrained(tiny_models[family]).eval()
    student = loram.load_pruned(pruned_models[family])
    expected = dense(student, teacher, batch)
    reference = gradients(expected, student)
    for found, tolerance in ((loss_of(student, batch, teacher), 1e-5), (loss_of(student, batch), 2e-3)):
        assert found.item() == pytest.approx(expected.item(), rel=tolerance)
        errors = {name: relative(g, reference[name]) for name, g in gradients(found, student).items()}
        assert errors.keys() == reference.keys()
        assert max(errors.values()) < 2 * tolerance, max(errors, key=errors.__getitem__)


def test_the_error_of_top_k_falls_with_k_and_is_bounded(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    student = loram.load_pruned(pruned_models["llama"])
    errors, losses = [], []
    for k in (1, 4, 16, 64, 256):
        cache = taught(tiny_llama, tmp_path / f"cache-{k}", rows_file, k)
        batch = collate([to_tensors(cache[row]) for row in range(5)])
        reference = gradients(dense(student, teacher, batch), student)["model.norm.weight"]
        found = loss_of(student, batch)
        errors.append(relative(gradients(found, student)["model.norm.weight"], reference))
        losses.append(found.item())
        # per position the gradient of the logits differs by q_j (1 - p_rest / q_rest) - (q_j - p_j) at most
        rest = torch.cat([cache[row].log_rest for row in range(5)]).exp().mean().item()
        assert errors[-1] < 20 * rest + 1e-2
    assert errors == sorted(errors, reverse=True)
    assert losses == sorted(losses)
    assert losses[-1] <= dense(student, teacher, batch).item() * (1 + 1e-3)


def test_chunks_make_no_difference_and_nothing_of_a_full_top_k_is_lost() -> None:
    torch.manual_seed(0)
    states, head = torch.randn(11, 6), torch.nn.Linear(6, 40, bias=False)
    teacher = torch.randn(11, 40)
    log_p = teacher.log_softmax(1)
    order = log_p.topk(40)
    whole = divergence(head(states), teacher)
    for chunk in (1, 4, 100):
        found = chunked_loss(states, head, [teacher], divergence, chunk_tokens=chunk)
        assert found.item() == pytest.approx(whole.item(), rel=1e-5)
        targets = [order.indices, order.values, torch.full((11,), -16.0)]
        found = chunked_loss(states, head, targets, top_k_divergence, chunk_tokens=chunk)
        assert found.item() == pytest.approx(whole.item(), rel=1e-5)
    rule = LogitRule(softcap=2.0, scale=0.5)
    squashed = 2.0 * torch.tanh(0.5 * head(states) / 2.0)
    found = chunked_loss(states, head, [teacher], divergence, rule=rule)
    assert found.item() == pytest.approx(divergence(squashed, teacher).item(), rel=1e-5)


def test_mix_is_the_weighted_mean_of_the_two(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    cache = taught(tiny_llama, tmp_path / "cache", rows_file, 8)
    batch = collate([to_tensors(cache[row]) for row in range(5)])
    student = loram.load_pruned(pruned_models["llama"])
    distill, mix, clm = (loss_of(student, batch, clm_weight=weight).item() for weight in (0.0, 0.25, 1.0))
    assert mix == pytest.approx(0.75 * distill + 0.25 * clm)
    plain = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert clm == pytest.approx(plain.item(), rel=1e-5)


# The folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_comes_nearer_and_embedding_and_head_stay(
    family: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    pruned = pruned_models[family]
    out = run(pruned, tmp_path / "aligned", data=rows_file)
    losses = [entry["loss"] for entry in entries(out)]
    assert losses[-1] < 0.9 * losses[0]
    before, after = load_file(pruned / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == before.keys() - {EMBEDDING, HEAD}
    same = [
        path.name
        for path in pruned.iterdir()
        if path.name not in ("model.safetensors", "loram_manifest.json", "README.md")
    ]
    assert {"config.json", "loram_plan.json", "modeling_loram.py", "tokenizer.json", "chat_template.jinja"} <= {*same}
    assert filecmp.cmpfiles(pruned, out, same, shallow=False) == (same, [], [])
    manifest = find_manifest(out)
    assert manifest is not None
    assert manifest.kind == "pruned"
    assert manifest.made_from.keys() == {"base", "plan", "pruned", "rows"}
    assert manifest.settings["objective"] == "distill"
    assert [path.name for path in tmp_path.iterdir()] == ["aligned"]


def test_it_trains_recovers_and_aligns_again(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    aligned = run(pruned_models["llama"], tmp_path / "aligned", data=rows_file)
    run(aligned, tmp_path / "again", data=rows_file, trainer={"max_steps": 1})
    loram.train(aligned, tmp_path / "adapter", data=rows_file, trainer={"max_steps": 1, "learning_rate": 1e-2})
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    assert loram.evaluate(tiny_llama, adapter=tmp_path / "recovered", data=rows_file).loss > 0


@pytest.mark.parametrize("family", ["llama", "mistral"], ids=["tied", "untied"])
def test_embeddings_train_when_asked(
    family: str, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    out = run(pruned_models[family], tmp_path / "aligned", data=rows_file, train_embeddings=True)
    before, after = (load_file(f / "model.safetensors") for f in (pruned_models[family], out))
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_weights_keep_their_dtype_in_several_shards(
    tokenizer: Any, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base", "qwen3", tokenizer)
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    loram.prune(base, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=2, keep_last=1)
    out = run(tmp_path / "pruned", tmp_path / "aligned", data=rows_file)
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert loram.evaluate(out, data=rows_file).loss < loram.evaluate(tmp_path / "pruned", data=rows_file).loss


def test_a_cache_of_the_whole_vocabulary_aligns_as_the_live_teacher(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    taught(tiny_llama, tmp_path / "cache", rows_file, 320)
    live = run(pruned_models["llama"], tmp_path / "live", data=rows_file)
    cached = run(pruned_models["llama"], tmp_path / "cached", teacher=tmp_path / "cache")
    pairs = zip(entries(live), entries(cached), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-2) for a, b in pairs)
    manifest = find_manifest(cached)
    assert manifest is not None
    assert "teacher" in manifest.made_from


@pytest.mark.parametrize(
    ("options", "tolerance"), [({"bf16": True}, 0.05), ({"gradient_checkpointing": True}, 1e-6)], ids=["bf16", "memory"]
)
def test_what_a_gpu_does_by_default(
    options: dict[str, bool], tolerance: float, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """On a GPU, autocast and activation checkpointing are on by default; probes happen in between."""
    rows = {"data": rows_file, "probe_data": rows_file, "probe": True, "probe_steps": 1, "eval_steps": 3}
    plain = run(pruned_models["gemma2"], tmp_path / "plain", **rows)
    other = run(pruned_models["gemma2"], tmp_path / "other", **rows, trainer=options)
    for kind in ("loss", "recovered_loss"):
        pairs = list(zip(entries(plain, kind), entries(other, kind), strict=True))
        assert len(pairs) > 2
        assert all(a[kind] == pytest.approx(b[kind], rel=tolerance) for a, b in pairs)
    weights = load_file(other / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_clm_and_sampled_text(pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    clm = run(pruned_models["qwen2"], tmp_path / "clm", data=rows_file, objective="clm")
    assert entries(clm)[-1]["loss"] < entries(clm)[0]["loss"]
    short = {"max_length": 16, "max_steps": 4}
    one, two = (run(pruned_models["qwen2"], tmp_path / name, trainer=short) for name in "ab")
    assert contents(one) == contents(two)
    assert entries(one)[-1]["loss"] < entries(one)[0]["loss"]


# Rows


def test_several_data_sets_and_caches_with_weights(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    texts = jsonl(*({"text": f"{n} is a number."} for n in range(6)))
    data = [{"path": str(rows_file), "weight": 0.5}, {"path": str(texts), "weight": 0.5}]
    out = run(pruned_models["llama"], tmp_path / "a", data=data, trainer={"max_steps": 1})
    caches = [taught(tiny_llama, tmp_path / name, rows, 4) for name, rows in (("c", rows_file), ("d", texts))]
    assert [len(cache) for cache in caches] == [20, 6]
    teacher = [{"path": str(tmp_path / "c"), "weight": 1}, {"path": str(tmp_path / "d"), "weight": 1}]
    again = run(pruned_models["llama"], tmp_path / "b", teacher=teacher, trainer={"max_steps": 1})
    first, second = find_manifest(out), find_manifest(again)
    assert first is not None
    assert second is not None
    assert first.settings["rows"] == second.settings["rows"] == 12
    assert first.made_from["rows"] == second.made_from["rows"]


def test_a_batch_has_the_predictions_where_they_are_made(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    cache = taught(tiny_llama, tmp_path / "cache", rows_file, 4)
    batch = collate([to_tensors(cache[row]) for row in (3, 0, 7)])
    wanted = batch["labels"][:, 1:] != -100
    assert torch.equal(batch["teacher_ids"][:, :-1][wanted], torch.cat([cache[row].ids for row in (3, 0, 7)]))
    assert batch["attention_mask"].sum(1).tolist() == [len(cache[row].input_ids) for row in (3, 0, 7)]


# The probe


PROBE: dict[str, Any] = {"probe": True, "probe_steps": 2, "eval_steps": 2}


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict[str, torch.Tensor]]:
    """Make the probes return these recovered losses in turn; returns the list of the weights that each probe gets."""
    left, seen = iter(losses), []

    def measure(self: Probe, student: Any, *rest: Any) -> ProbeLosses:
        seen.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
        return ProbeLosses(recovered_loss=next(left), adapted_loss=1.0, student_loss=1.0)

    monkeypatch.setattr(judge.Probe, "measure", measure)
    return seen


def same_weights(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in load_file(folder / "model.safetensors").items())


@pytest.mark.parametrize(
    ("losses", "best"), [([4, 3, 1, 2], 2), ([4, 3, 2, 1], 3), ([1, 3, 2, 2], 0), ([3, 1, 1, 1], 1)], ids=str
)
def test_the_weights_of_the_best_probe_are_kept(
    losses: list[float],
    best: int,
    pruned_models: dict[str, Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = scripted(monkeypatch, losses)
    out = run(pruned_models["mistral"], tmp_path / "aligned", data=rows_file, **PROBE)
    assert [entry["step"] for entry in entries(out, "recovered_loss")] == [0, 2, 4, 6]
    assert [same_weights(out, weights) for weights in seen] == [number == best for number in range(4)]
    assert [path.name for path in tmp_path.iterdir()] == ["aligned"]


def test_it_stops_when_probes_no_longer_improve(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, [3, 1, 2, 2, 0])
    trainer = {"max_steps": 20}
    out = run(pruned_models["mistral"], tmp_path / "out", data=rows_file, **PROBE, patience=2, trainer=trainer)
    assert [entry["step"] for entry in entries(out, "recovered_loss")] == [0, 2, 4, 6]
    assert entries(out)[-1]["step"] == 6
    assert same_weights(out, seen[1])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_probe_leaves_no_trace(
    family: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """Alignment takes the same steps with probes as without them."""
    plain = run(pruned_models[family], tmp_path / "plain", data=rows_file)
    probed = run(pruned_models[family], tmp_path / "probed", data=rows_file, probe_data=rows_file, **PROBE)
    assert entries(plain) == entries(probed)
    found = entries(probed, "recovered_loss")
    untuned = loram.evaluate(tiny_models[family], data=rows_file).loss
    assert found[0]["untuned_loss"] == pytest.approx(untuned, rel=0.2)
    assert len({entry["recovered_loss"] for entry in found}) == len(found)
    streamed = run(
        pruned_models[family], tmp_path / "streamed", data=rows_file, probe_data=rows_file, stream=True, **PROBE
    )
    for one, other in zip(found, entries(streamed, "recovered_loss"), strict=True):
        assert one["recovered_loss"] == pytest.approx(other["recovered_loss"], rel=1e-5)


def test_a_probe_is_train_recover_evaluate(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """The probe's recovered loss is the one that the stages give for its adapter, which has learnt something."""
    from loram.compute.device import pick_device
    from loram.disk.checkpoint import Checkpoint
    from loram.model.plan import PruningPlan

    tokens = [{"input_ids": list(range(3, 20)), "labels": list(range(3, 20))}] * 8
    rows = Rows([tokens], places([range(8)]))
    probe = Probe(
        Checkpoint(tiny_llama),
        PruningPlan.load(pruned_models["llama"]),
        train=rows,
        dev=rows,
        steps=20,
        seed=0,
        device=pick_device("cpu"),
        stream=False,
    )
    student = loram.load_pruned(pruned_models["llama"])
    state, random = {n: t.clone() for n, t in student.state_dict().items()}, torch.get_rng_state()
    found = probe.measure(student)
    assert found.adapted_loss < found.student_loss
    assert found.recovered_loss < probe.untuned_loss
    assert probe.measure(student) == found
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in student.modules())


# A LoRA in place of the weights


def test_a_lora_is_added_to_the_weights(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """The aligned folder is the pruned one with weights that differ by a matrix of the LoRA's rank."""
    pruned = pruned_models["llama"]
    aligned = run(pruned, tmp_path / "aligned", data=rows_file, lora_r=2)
    before, after = load_file(pruned / "model.safetensors"), load_file(aligned / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        change = after[name].double() - weight.double()
        rank = torch.linalg.matrix_rank(change, rtol=1e-4) if change.dim() == 2 else change.count_nonzero()
        assert rank == (2 if name.endswith("_proj.weight") else 0), name
    assert entries(aligned)[-1]["loss"] < entries(aligned)[0]["loss"]
    adapter = loram.train(aligned, tmp_path / "adapter", data=rows_file, trainer={"max_steps": 1})
    loram.evaluate(tiny_llama, adapter=loram.recover(adapter, tmp_path / "recovered"), data=rows_file)


def test_a_lora_begins_with_the_gradients_of_the_weights(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """Before the first step both ways have the same loss, and later ones differ."""
    whole = run(pruned_models["gemma2"], tmp_path / "whole", data=rows_file)
    lora = run(pruned_models["gemma2"], tmp_path / "lora", data=rows_file, lora_r=4, lora_alpha=4)
    assert entries(lora)[0]["loss"] == pytest.approx(entries(whole)[0]["loss"], rel=1e-6)
    assert entries(lora)[-1]["loss"] != pytest.approx(entries(whole)[-1]["loss"], rel=1e-6)


def test_a_lora_of_the_best_probe_is_kept_and_resumes_to_the_same_bytes(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**PROBE, "data": rows_file, "lora_r": 2, "load_in_4bit": True}
    options["trainer"] = {"save_steps": 3}
    expected = contents(run(pruned_models["llama"], tmp_path / "whole", **options))
    interrupted(4, pruned_models["llama"], tmp_path / "out", **options)
    assert contents(run(pruned_models["llama"], tmp_path / "out", **options)) == expected


def test_a_lora_that_no_probe_prefers_changes_nothing(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [1, 2, 3, 4])
    pruned = pruned_models["mistral"]
    out = run(pruned, tmp_path / "aligned", data=rows_file, **PROBE, lora_r=2)
    assert same_weights(out, load_file(pruned / "model.safetensors"))


# Interruptions


def interrupted(batch: int, pruned: Path, out: Path, **options: Any) -> None:
    """Start an alignment that is stopped in the batch with this number."""
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, batch, Stopped())
        with pytest.raises(Stopped):
            run(pruned, out, **options)


def interrupted_at_the_end(losses: list[float], pruned: Path, out: Path, **options: Any) -> None:
    """Start an alignment whose probes return these losses, and stop it after its last step."""

    def fail(*_: Any, **__: Any) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, losses)
        patch.setattr(MODULE, "write_trained", fail)
        with pytest.raises(Stopped):
            run(pruned, out, **options)


@pytest.mark.parametrize("batch", [2, 4, 7, 9])
@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_resumed_is_the_same_as_undisturbed(
    cached: bool, batch: int, tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**PROBE, "data": rows_file}
    if cached:
        taught(tiny_llama, tmp_path / "cache", rows_file, 8)
        options = {**PROBE, "teacher": tmp_path / "cache"}
    options["trainer"] = {"save_steps": 3, "gradient_accumulation_steps": 2}
    expected = contents(run(pruned_models["llama"], tmp_path / "whole", **options))
    interrupted(batch, pruned_models["llama"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out-checkpoints").exists() == (batch > 4)  # the first checkpoint comes with the first probe
    assert contents(run(pruned_models["llama"], tmp_path / "out", **options)) == expected
    assert not (tmp_path / "out-checkpoints").exists()


def test_stopped_after_its_end_it_takes_no_step_more_and_has_the_best(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data": rows_file, **PROBE, "patience": 2, "trainer": {"max_steps": 20}}
    pruned = pruned_models["mistral"]
    interrupted_at_the_end([3, 1, 2, 2], pruned, tmp_path / "out", **options)
    kept = {path.name for path in (tmp_path / "out-checkpoints").iterdir()}
    assert kept == {"checkpoint-2", "checkpoint-6"}  # the best and the newest
    expected = load_file(tmp_path / "out-checkpoints" / "checkpoint-2" / "model.safetensors")
    seen = scripted(monkeypatch, [])
    assert same_weights(run(pruned, tmp_path / "out", **options), expected)
    assert seen == []


def test_best_weights_that_are_gone_are_missed(pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    options = {"data": rows_file, **PROBE, "patience": 2, "trainer": {"max_steps": 20}}
    interrupted_at_the_end([3, 1, 2, 2], pruned_models["mistral"], tmp_path / "out", **options)
    shutil.rmtree(tmp_path / "out-checkpoints" / "checkpoint-2")
    with pytest.raises(loram.UserError, match=r"checkpoint-2: has the best weights so far, but is gone"):
        run(pruned_models["mistral"], tmp_path / "out", **options)


def test_going_on_with_other_settings_is_refused_and_fresh_starts_over(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    options = {"data": rows_file, "trainer": {"save_steps": 2}}
    interrupted(4, pruned_models["mistral"], tmp_path / "out", **options)
    with pytest.raises(loram.UserError, match=r"objective: 'distill' -> 'clm'.*--fresh"):
        run(pruned_models["mistral"], tmp_path / "out", **options, objective="clm")
    run(pruned_models["mistral"], tmp_path / "out", **options, objective="clm", fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "distil"}, "align: objective: Input should be 'distill', 'clm' or 'mix'"),
        ({"clm_weight": 1.5, "objective": "mix"}, "align: clm_weight: "),
        ({"clm_weight": 0.5}, "align: clm_weight: is of the objective mix, and this is distill"),
        ({"eval_steps": 0}, "align: eval_steps: "),
        ({"probe_dataset_": 1}, "unexpected keyword"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"data": [{"path": "a.jsonl", "weight": 1}, "b.jsonl"]}, "align: dataset: give every one a weight, or none"),
        ({"data": {"path": "a.jsonl", "wieght": 1}}, "align: dataset.0.wieght: "),
        ({"probe_data": "x.jsonl"}, "there is to be no probe"),
        ({"teacher": "cache", "data": "x.jsonl"}, "the rows come from the teacher's folder"),
        ({"teacher": "cache", "data": None, "objective": "clm"}, "clm learns from the text alone"),
        ({"teacher": "nowhere", "data": None}, "nowhere: no teacher.json here"),
        ({"trainer": {"learning_rte": 1}}, "did you mean learning_rate?"),
        ({"trainer": {"lr": 1}}, "here it is called learning_rate"),
        ({"trainer": {"eval_steps": 1}}, "eval_steps cannot be set"),
        ({"trainer": {"eval_strategy": "epoch"}}, "eval_strategy cannot be set"),
        ({"trainer": {"push_to_hub": True}}, "push_to_hub cannot be set"),
        ({"trainer": {"learning_rate": -1}}, "learning_rate: "),
        ({"trainer": {"max_grad_norm": -1}}, "max_grad_norm is -1"),
        ({"trainer": {"adam_beta1": 2}}, "Invalid beta parameter"),
        ({"trainer": {"max_length": 1}}, "max_length should be a number of tokens"),
        ({"load_in_4bit": True}, "align: load_in_4bit: is for a LoRA in place of the weights; give lora_r too"),
        ({"lora_alpha": 8}, "align: lora_alpha: is for a LoRA in place of the weights; give lora_r too"),
        ({"lora_r": 4, "train_embeddings": True}, "align: train_embeddings: a LoRA trains linears only"),
        ({"base": "/nowhere/model"}, "/nowhere/model: no such file or folder"),
        ({"device": "cuda:99"}, "cannot be used"),
    ],
    ids=str,
)
def test_bad_options_are_refused_and_leave_nothing(
    options: dict[str, Any], message: str, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises((loram.UserError, TypeError), match=message.replace("?", r"\?")):
        run(pruned_models["llama"], tmp_path / "out", **{"data": rows_file, **options})
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(
    tiny_models: dict[str, Path], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match="not a pruned folder; alignment trains what `loram prune` made"):
        run(tiny_models["llama"], tmp_path / "out", data=rows_file)
    with pytest.raises(loram.UserError, match="not the full model that the plan was made from"):
        run(pruned_models["llama"], tmp_path / "out", data=rows_file, base=tiny_models["qwen2"])
    taught(tiny_models["qwen2"], tmp_path / "cache", rows_file, 4)
    with pytest.raises(loram.UserError, match=r"cache: the teacher was .*qwen2, but the pruned model was made from"):
        run(pruned_models["llama"], tmp_path / "out", teacher=tmp_path / "cache")


def test_a_full_model_that_is_gone(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    loram.prune(base, tmp_path / "pruned", ratio=0.5, criterion="magnitude", keep_first=2, keep_last=1)
    shutil.rmtree(base)
    with pytest.raises(loram.UserError, match=r"base: no such file .*: --base, or base_model_name_or_path"):
        run(tmp_path / "pruned", tmp_path / "out", data=rows_file)
    without = {"objective": "clm", "trainer": {"max_steps": 1, "save_strategy": "no"}}
    run(tmp_path / "pruned", tmp_path / "out", data=rows_file, **without)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pruned"]
    run(tmp_path / "pruned", tmp_path / "elsewhere", data=rows_file, base=tiny_llama, trainer={"max_steps": 1})


def test_too_few_rows_for_a_probe(pruned_models: dict[str, Path], jsonl: Callable[..., Path], tmp_path: Path) -> None:
    few = jsonl(*({"text": "one two three"} for _ in range(7)))
    with pytest.raises(loram.UserError, match=r"1 rows for the probe.*--probe-dataset, or --no-probe"):
        run(pruned_models["llama"], tmp_path / "out", data=few, probe=True)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_does_not_fit(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loram.compute.device.free_memory", lambda device: 1000)
    with pytest.raises(loram.UserError, match=r"do not fit in free memory as a teacher.*`loram teach` it first"):
        run(pruned_models["llama"], tmp_path / "out", data=rows_file)
    with pytest.raises(loram.UserError, match=r"do not fit in free memory to sample text from it; give .* --dataset"):
        run(pruned_models["llama"], tmp_path / "out", objective="clm")


def test_what_is_not_finite_stops_with_nothing_written(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(FloatingPointError, match=r"finite|loss is|overflows"):
        run(pruned_models["llama"], tmp_path / "out", data=rows_file, trainer={"learning_rate": 1e30})
    assert not (tmp_path / "out").exists()


def test_the_command(
    tiny_llama: Path, pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, capsys: Any
) -> None:
    out, flags = str(tmp_path / "aligned"), ["--max-steps", "2", "--eval-steps", "1", "--probe-steps", "1"]
    arguments = ["align", str(pruned_models["llama"]), out, "--dataset", f"{rows_file}=0.5", *flags]
    assert cli._main([*arguments, "--dataset", f"{rows_file}=0.5", "--warmup-steps", "0"]) == 0
    assert capsys.readouterr().out == f"{out}: aligned model written\n"
    assert [entry["step"] for entry in entries(Path(out), "recovered_loss")] == [0, 1, 2]
    assert cli._main(arguments) == 2
    assert "the output exists already" in capsys.readouterr().err
