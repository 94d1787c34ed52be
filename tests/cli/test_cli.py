"""The command line, as a user types it: results on stdout, one clear line and exit code 2 for a user's mistake."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model

from loram import cli
from loram.model.plan import PruningPlan

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def loram_cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli._main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def stages(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prune, train and recover through the command line."""
    root = tmp_path_factory.mktemp("stages")
    layers = ["--keep-first", "1", "--keep-last", "1"]
    for arguments in (
        ["prune", tiny_llama, root / "pruned", "--ratio", "0.5", "--criterion", "magnitude", *layers],
        ["train", root / "pruned", root / "adapter", "--dataset", rows_file, "--max_steps", "2", "--lora-r", "4"],
        ["recover", root / "adapter", root / "recovered"],
        ["merge", tiny_llama, root / "recovered", root / "merged"],
    ):
        assert cli._main([str(argument) for argument in arguments]) == 0
    return root


def test_the_stages_make_what_they_should(stages: Path) -> None:
    assert PruningPlan.load(stages / "recovered").ratio == 0.5
    config = json.loads((stages / "recovered" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert (stages / "merged" / "model.safetensors").is_file()


def test_eval_json_is_one_object_on_stdout(stages: Path, tiny_llama: Path, rows_file: Path, loram_cli: Cli) -> None:
    code, out, _ = loram_cli(
        "eval", tiny_llama, "--adapter", stages / "recovered", "--dataset", rows_file, "--max-samples", 5, "--json"
    )
    report = json.loads(out)
    assert code == 0
    assert report.keys() >= {"perplexity", "tokens", "loss"}
    assert report["rows"] == 5


def test_eval_text_is_one_line(tiny_llama: Path, rows_file: Path, loram_cli: Cli) -> None:
    code, out, _ = loram_cli("eval", tiny_llama, "--dataset", rows_file)
    assert (code, out.count("\n")) == (0, 1)
    assert out.startswith("perplexity ")


def test_estimate_json(tiny_llama: Path, loram_cli: Cli) -> None:
    code, out, err = loram_cli(
        "estimate", tiny_llama / "config.json", "--ratio", 0.5, "--keep-first", 1, "--keep-last", 1, "--json"
    )
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["parameters"] > found["pruned_parameters"]
    assert found["parameter_reduction"] == found["parameters"] / found["pruned_parameters"]


def test_columns_can_be_named(tiny_llama: Path, jsonl: Callable[..., Path], loram_cli: Cli) -> None:
    path = jsonl({"q": "one plus one", "a": " two"})
    code, _, err = loram_cli("eval", tiny_llama, "--dataset", path)
    assert code == 2
    assert "q, a" in err
    code, out, _ = loram_cli("eval", tiny_llama, "--dataset", path, "--column", "prompt=q", "--column", "completion=a")
    assert (code, out[:10]) == (0, "perplexity")


def test_run_json_is_one_object(tiny_llama: Path, rows_file: Path, tmp_path: Path, loram_cli: Cli) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {tiny_llama}\noutput_dir: {tmp_path / 'out'}\ndataset: {rows_file}\n"
        f"eval_dataset: {rows_file}\nprune: {{ratio: 0.5, criterion: random, keep_first: 1, keep_last: 1}}\n"
    )
    code, out, _ = loram_cli("run", path, "train.trainer.max_steps=1", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)["rows"]] == ["base", "pruned", "pruned + adapter", "recovered"]
    code, out, _ = loram_cli("run", path, "train.trainer.max_steps=1")
    assert code == 0
    assert "recovered" in out
    assert "report.json" in out.replace("\n", "")


def bad(case: str, tiny: Path, rows: Path, stages: Path, tmp: Path, tokenizer: Any) -> tuple[list[Any], str]:
    """The arguments of a mistake, and what the error line must say."""
    prune = ["prune", tiny, tmp / "out", "--ratio", "0.5"]
    if case == "missing model":
        return ["prune", tmp / "none", tmp / "out", "--ratio", "0.5"], "no such file or folder"
    if case == "unknown family":
        folder = make_model(tmp / "gpt", "llama", tokenizer)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
        return ["prune", folder, tmp / "out", "--ratio", "0.5"], "supported families are llama, mistral, qwen2"
    if case == "ratio 0":
        return ["prune", tiny, tmp / "out", "--ratio", "0"], "must lie between 0 and 1"
    if case == "ratio 1.5":
        return ["prune", tiny, tmp / "out", "--ratio", "1.5"], "must lie between 0 and 1"
    if case == "ratio text":
        return ["prune", tiny, tmp / "out", "--ratio", "half"], "'--ratio'"
    if case == "output exists":
        return ["prune", tiny, stages / "pruned", "--ratio", "0.5"], "exists already"
    if case == "criterion":
        return [*prune, "--criterion", "tylor"], "known are taylor, activation, wanda, flap, magnitude"
    if case == "row":
        path = tmp / "rows.jsonl"
        path.write_text(rows.read_text() + "{not json\n")
        return ["train", tiny, tmp / "out", "--dataset", path], "rows.jsonl:21:"
    if case == "empty data":
        (tmp / "empty.jsonl").touch()
        return ["train", tiny, tmp / "out", "--dataset", tmp / "empty.jsonl"], "empty"
    if case == "unrecovered":
        return ["eval", tiny, "--adapter", stages / "adapter", "--dataset", rows], "run `loram recover`"
    if case == "pruned again":
        return ["prune", stages / "pruned", tmp / "out", "--ratio", "0.5"], "already pruned"
    if case == "adapter missing":
        return ["recover", tmp / "none", tmp / "out"], "no such folder"
    if case == "recipe missing":
        return ["run", tmp / "none.yaml"], "no such recipe"
    if case == "lora option":
        return [
            "train",
            tiny,
            tmp / "out",
            "--dataset",
            rows,
            "--lora",
            "rank=4",
        ], "no option 'rank'; here it is called r"
    assert case == "option"
    return [*prune, "--rato", "1"], "--rato"


CASES = (
    "missing model;unknown family;ratio 0;ratio 1.5;ratio text;output exists;criterion;row;empty data;unrecovered;"
    "pruned again;adapter missing;recipe missing;lora option;option"
)


@pytest.mark.parametrize("case", CASES.split(";"))
def test_a_mistake_ends_in_one_clear_line_and_code_2(
    case: str, tiny_llama: Path, rows_file: Path, stages: Path, tokenizer: Any, tmp_path: Path, loram_cli: Cli
) -> None:
    arguments, message = bad(case, tiny_llama, rows_file, stages, tmp_path, tokenizer)
    code, out, err = loram_cli(*arguments)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if "rror" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train m out --dataset d --lora-rank 8", "--lora-rank: here it is called --lora-r"),
        ("train m out --dataset d --lora_rank=8", "--lora-rank: here it is called --lora-r"),
        ("train m out --data-path d", "--data-path: here it is called --dataset"),
        ("train m out --dataset d --cutoff_len 64", "--cutoff-len: here it is called --max-length"),
        ("train m out --dataset d --optimizer sgd", "--optimizer: here it is called --trainer optim=VALUE"),
        ("train --base-model m out", "--base-model: here it is called MODEL, an argument without a flag"),
        ("prune m out --sparsity 0.5", "--sparsity: here it is called --ratio"),
        ("run r.yaml --lora-rank 8", "--lora-rank: here it is called train.lora.r=VALUE, without dashes"),
        ("run r.yaml --learning-rate 1", "--learning-rate: here it is called train.trainer.learning_rate=VALUE, with"),
    ],
)
def test_flags_of_other_tools_are_answered_with_ours(arguments: str, line: str, loram_cli: Cli) -> None:
    code, out, err = loram_cli(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"loram: error: {line}")
    assert err.count("\n") == 1


def test_what_people_look_for_is_answered_with_what_does_it(loram_cli: Cli) -> None:
    code, _, err = loram_cli("upload", "folder", "owner/name")
    assert code == 2
    assert err == "loram: error: there is no command 'upload': upload a finished folder with `loram push FOLDER REPO`\n"


def test_shells_complete_commands(loram_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_LORAM_COMPLETE", "complete_bash"), ("COMP_WORDS", "loram pr"), ("COMP_CWORD", "1")):
        monkeypatch.setenv(name, value)
    assert loram_cli()[:2] == (0, "prune\n")


def test_a_failure_of_ours_is_code_1_without_traceback(
    tiny_llama: Path, tmp_path: Path, loram_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(sys.modules["loram.pruning.prune"], "score_layers", broken)
    arguments = ["prune", tiny_llama, tmp_path / "out", "--ratio", 0.5, "--keep-first", 1, "--criterion", "random"]
    code, out, err = loram_cli(*arguments)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("loram: error: RuntimeError: boom")
    with pytest.raises(RuntimeError, match="boom"):
        loram_cli(*arguments, "--debug")


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['loram', '--help']\nfrom loram import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "estimate" in done.stdout
