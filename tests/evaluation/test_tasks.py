"""Tasks of lm-evaluation-harness give the same on a model in memory and on one that is streamed from disk."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model, random_adapter
from transformers import AutoTokenizer

import loram
from loram import cli
from loram.compute.belonging import load_for
from loram.compute.loading import load_tokenizer
from loram.compute.resident import load_adapted
from loram.disk.opening import open_model

harness = pytest.importorskip("loram.evaluation.harness", reason="lm_eval is not installed")

CPU = torch.device("cpu")
QUESTIONS = [
    {"question": "one plus two is", "choices": ["three", "two and one", "four"], "gold": 0},
    {"question": "two plus two is", "choices": ["five", "one", "four plus one"], "gold": 2},
    {"question": "one plus one is", "choices": ["two", "one plus two plus three", "six"], "gold": 0},
    {"question": "two plus one is", "choices": ["seven", "three", "nine"], "gold": 1},
]
CHOICE = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "fewshot_split": "test",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
TEXT = {
    "task": "tiny_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices[gold]}}",
    "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}
WRITING = {
    "task": "tiny_writing",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"max_gen_toks": 4, "until": ["."], "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Write a task and its data, and return the path of the task."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))

    def write(described: dict[str, Any], **changes: Any) -> str:
        common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        path = folder / f"{len(list(folder.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump({**common, **described, **changes}))
        return str(path)

    return write


@pytest.fixture(scope="module")
def chain(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path | None]]:
    """Return every kind of model that can be evaluated, with its adapter."""
    root = tmp_path_factory.mktemp("chain")
    loram.prune(tiny_llama, root / "pruned", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    random_adapter(loram.load_pruned(root / "pruned"), root / "adapter")
    loram.PruningPlan.load(root / "pruned").save(root / "adapter")
    loram.recover(root / "adapter", root / "recovered")
    loram.merge(tiny_llama, root / "recovered", root / "merged")
    return {
        "base": (tiny_llama, None),
        "recovered": (tiny_llama, root / "recovered"),
        "pruned": (root / "pruned", None),
        "adapter": (root / "pruned", root / "adapter"),
        "merged": (root / "merged", None),
    }


def models_of(base: Path, adapter: Path | None) -> tuple[Any, Any]:
    """Return a model in memory and streamed, as lm-evaluation-harness sees them."""
    checkpoint = open_model(base)
    own = None if adapter is None else load_for(checkpoint, adapter)
    in_memory = harness.loaded_model(load_adapted(checkpoint, own, CPU)[0], load_tokenizer(checkpoint), 3)
    return in_memory, harness.StreamedModel(checkpoint, own, load_tokenizer(checkpoint), CPU)


def requests(*arguments: tuple[str, ...]) -> list[Any]:
    return [SimpleNamespace(args=texts, task_name="requests") for texts in arguments]


PAIRS = requests(
    ("one plus two is", " three"),
    ("one plus two is", " four and more"),
    ("", "two plus two"),
    ("two " * 300, " is two"),  # longer than the model's 256 positions
    ("a space at the end ", "two"),
)


@pytest.mark.parametrize("kind", ["base", "recovered", "pruned", "adapter"])
def test_streamed_likelihoods_are_those_of_a_model_in_memory(
    kind: str, chain: dict[str, tuple[Path, Path | None]]
) -> None:
    in_memory, streamed = models_of(*chain[kind])
    with torch.inference_mode():
        expected, texts = in_memory.loglikelihood(PAIRS), requests(("one plus two is three. " * 60,), ("four",))
        rolling = in_memory.loglikelihood_rolling(texts)
    scores = streamed.loglikelihood(PAIRS)
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert streamed.loglikelihood_rolling(texts) == pytest.approx(rolling, abs=1e-3, rel=1e-6)


def test_what_the_model_would_write_itself_is_greedy(tiny_llama: Path) -> None:
    in_memory, streamed = models_of(tiny_llama, None)
    before = [5, 6, 7]
    with torch.inference_mode():
        logits = in_memory.model(torch.tensor([before])).logits[0, -1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    answers = streamed._loglikelihood_tokens([(None, before, [best]), (None, before, [worst])])
    assert [greedy for _, greedy in answers] == [True, False]
    assert [score for score, _ in answers] == pytest.approx(
        [float(logits.log_softmax(0)[token]) for token in (best, worst)], abs=1e-4
    )


def test_several_passes_give_what_one_pass_gives(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = models_of(tiny_llama, None)[1]
    together = streamed.loglikelihood(PAIRS)
    monkeypatch.setattr(harness, "_PASS_TOKENS", 20)
    assert list(harness._parts([5, 15, 1, 300, 2])) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    apart = streamed.loglikelihood(PAIRS)
    assert [score for score, _ in apart] == pytest.approx([score for score, _ in together], abs=1e-5)


def test_every_kind_of_model_runs_tasks(chain: dict[str, tuple[Path, Path | None]], tasks: Callable[..., str]) -> None:
    names = [tasks(CHOICE), tasks(TEXT)]
    reports = {
        kind: loram.evaluate_tasks(base, adapter=adapter, tasks=names) for kind, (base, adapter) in chain.items()
    }
    perplexity = {kind: report.tasks["tiny_text"].metrics["word_perplexity,none"] for kind, report in reports.items()}
    assert perplexity["merged"] == pytest.approx(perplexity["recovered"], rel=1e-4)
    assert len({round(value, 3) for kind, value in perplexity.items() if kind != "merged"}) == 4
    streamed = loram.evaluate_tasks(chain["adapter"][0], adapter=chain["adapter"][1], tasks=names, stream=True)
    assert streamed.streamed
    assert not reports["adapter"].streamed
    assert streamed.parameters == reports["adapter"].parameters
    for name, result in streamed.tasks.items():
        expected = reports["adapter"].tasks[name]
        assert result.metrics == pytest.approx(expected.metrics, rel=1e-4)
        assert (result.examples, result.num_fewshot) == (expected.examples, expected.num_fewshot) == (4, 0)


def test_a_model_that_does_not_fit_is_streamed(
    tiny_llama: Path, tasks: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loram.evaluation.tasks.fits", lambda nbytes, device: False)
    assert loram.evaluate_tasks(tiny_llama, tasks=[tasks(CHOICE)]).streamed
    with pytest.raises(loram.UserError, match="tiny_writing: the model writes text in this task, and a streamed model"):
        loram.evaluate_tasks(tiny_llama, tasks=[tasks(WRITING)])


def test_options_reach_the_harness(
    tiny_llama: Path, tasks: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    encode = harness.HFLM._encode_pair
    monkeypatch.setattr(
        harness.HFLM, "_encode_pair", lambda self, *texts: (prompts.append(texts[0]), encode(self, *texts))[1]
    )
    report = loram.evaluate_tasks(
        tiny_llama, tasks=f"{tasks(CHOICE)},{tasks(WRITING)}", num_fewshot=1, limit=0.5, apply_chat_template=True
    )
    assert {name: (result.examples, result.num_fewshot) for name, result in report.tasks.items()} == {
        "tiny_choice": (2, 1),
        "tiny_writing": (2, 1),
    }
    shown = AutoTokenizer.from_pretrained(tiny_llama).apply_chat_template(
        [{"role": "user", "content": "one plus two is"}], tokenize=False, add_generation_prompt=True
    )
    assert any(prompt.endswith(shown.lstrip("<s>")) and prompt.count(" is") == 2 for prompt in prompts)


def test_the_command_prints_a_table_or_one_object(
    tiny_llama: Path, rows_file: Path, tasks: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    names = f"{tasks(CHOICE)},{tasks(WRITING)}"
    assert cli._main(["eval", str(tiny_llama), "--tasks", names, "--limit", "2", "--batch-size", "2"]) == 0
    out = capfd.readouterr().out
    assert all(word in out for word in ("tiny_choice", "acc_norm", "tiny_writing", "exact_match", "standard error"))
    line = ["eval", str(tiny_llama), "--tasks", names, "--dataset", str(rows_file), "--json"]
    assert cli._main(line) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["tasks"]["tiny_choice"]["metrics"].keys() >= {"acc,none", "acc_stderr,none"}
    assert printed["perplexity"] == pytest.approx(math.exp(printed["loss"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "/none.jsonl"}}}, "the data of this task cannot be read"),
        ({"dataset_path": "owner/name", "dataset_kwargs": {}}, "needs a network the first time"),
        ({"doc_to_text": "{{none.at_all}}"}, "cannot make a task of it (UndefinedError"),
        ({"output_type": "guess"}, "cannot make a task of it"),
        ({**WRITING, "generation_kwargs": {"max_gen_toks": 999}}, "cannot run these tasks so"),
        ({"unsafe_code": True}, "allow it with --confirm-run-unsafe-code"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_in_one_line(
    changes: dict[str, Any],
    message: str,
    tiny_llama: Path,
    tasks: Callable[..., str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert cli._main(["eval", str(tiny_llama), "--tasks", tasks(CHOICE, **changes)]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("loram: error: ") == 1
    line = captured.err.partition("loram: error: ")[2].splitlines()[0]  # after it, a progress bar of the harness
    assert message in line
    assert "Traceback" not in captured.err
    assert not captured.out


def test_a_file_that_is_not_there_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(loram.UserError, match=r"none\.yaml: no such file"):
        loram.evaluate_tasks(tiny_llama, tasks="none.yaml")


def test_a_name_that_the_harness_does_not_know_is_answered_with_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(task_index={"gsm8k": None}, all_tasks=["gsm8k", "mathqa"])
    monkeypatch.setattr(harness, "TaskManager", lambda **options: known)  # the real one takes seconds
    with pytest.raises(loram.UserError, match=r"gsm9k: .* no task of this name; did you mean gsm8k\?"):
        harness.load_tasks(["gsm9k"])


def test_a_chat_template_must_be_there(tmp_path: Path, tokenizer: Any, tasks: Callable[..., str]) -> None:
    model = make_model(tmp_path / "model", "llama", tokenizer)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(loram.UserError, match="its tokenizer has none"):
        loram.evaluate_tasks(model, tasks=[tasks(CHOICE)], apply_chat_template=True)


def test_without_the_harness_one_line_says_what_to_install(
    tiny_llama: Path, tasks: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tasks(CHOICE)
    monkeypatch.delitem(sys.modules, "loram.evaluation.harness")
    monkeypatch.delattr("loram.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.defaults", None)
    with pytest.raises(loram.UserError, match=r"is not installed: pip install 'loram\[tasks\]'"):
        loram.evaluate_tasks(tiny_llama, tasks=[name])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "give --dataset FILE for a perplexity, --tasks NAMES for tasks, or both"),
        (["--limit", "3"], "limit is an option of tasks"),
        (["--tasks", "x.yaml", "--max-length", "9"], "--max-length: is for --dataset"),
    ],
)
def test_the_line_says_what_is_evaluated(line: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli._main(["eval", "model", *line]) == 2
    assert message in capfd.readouterr().err
