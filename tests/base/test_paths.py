"""Paths as users write them, through every door: command line, recipe and Python functions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROWS
from peft import AutoPeftModelForCausalLM

import loram
from loram.base.errors import UserError
from loram.base.paths import cache_folder, is_hub_id, local, named
from loram.cli import _main as cli
from loram.disk.artifacts import verify
from loram.disk.opening import open_model
from loram.model.plan import PruningPlan
from loram.run.pipeline import run
from loram.run.recipe import load_recipe

PRUNE = {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1}
ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture
def home(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a model and rows, and a working directory in it with a blank in its name."""
    root = tmp_path / "home"
    shutil.copytree(tiny_llama, root / "my models" / "base")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (root / "link").symlink_to(root / "my models" / "base")
    (root / "a b").mkdir()
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.chdir(root / "a b")
    return root


def test_local_paths(home: Path) -> None:
    assert local("~/x y/") == home / "x y"
    assert local("x") == local("./x") == local(Path("x")) == home / "a b" / "x"
    assert local("../link") == home / "my models" / "base"  # `..` needs to know what is behind links
    assert local("/tmp/x") == Path("/tmp/x")
    with pytest.raises(UserError, match="~nobody-here/x: there is no home folder of that name"):
        local("~nobody-here/x")


def test_names_of_models_are_paths_or_hub_ids(home: Path) -> None:
    assert named("owner/name") == named(Path("owner/name")) == "owner/name"
    (home / "a b" / "owner" / "name").mkdir(parents=True)
    assert named("owner/name") == str(home / "a b" / "owner" / "name")
    assert named("./none/") == str(home / "a b" / "none")
    assert named("") == ""
    assert is_hub_id("Qwen/Qwen2.5-0.5B")
    assert not any(map(is_hub_id, ("./name", "../name", "~/name", "/a/b", "a/b/c", "name", "owner/", "")))


@pytest.mark.parametrize("name", ["./none", "../none", "~/none", "/none/x", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_hub_id(name: str, home: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder, and not a hub id"):
        open_model(name)
    with pytest.raises(UserError, match="no such file or folder, and not a hub id"):
        loram.estimate(name)


def test_a_hub_id_is_asked_of_the_hub(home: Path) -> None:
    with pytest.raises(UserError, match="owner/none: no such file or folder, and the hub did not give a model"):
        open_model("owner/none")


@pytest.mark.parametrize("name", ["~/my models/base", "../my models/base/", "~/link", "../link/"])
def test_stages_take_paths_as_they_are_written(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loram.prune(name, "~/pruned", **PRUNE)
    base = Path(PruningPlan.load(home / "pruned").base.name)
    assert base.is_absolute()
    assert base.samefile(home / "link")
    loram.train("../pruned/", "./adapter", data="~/rows.jsonl", trainer=ONE_STEP)
    loram.recover("adapter", "../recovered", base=name)
    loram.merge(name, "~/recovered", "~/merged")
    loram.quantize("~/pruned", "packed")
    for folder in ("pruned", "a b/adapter", "recovered", "merged", "a b/packed"):
        assert (home / folder / "loram_manifest.json").is_file()
    assert {path.name for path in (home / "a b").iterdir()} == {"adapter", "packed"}  # no folder `~`
    monkeypatch.chdir(tmp_path)  # what was written works from any place
    trained_on = json.loads((home / "a b" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(trained_on) == home / "pruned"
    loram.recover(home / "a b" / "adapter", tmp_path / "corrected", correct=True)
    AutoPeftModelForCausalLM.from_pretrained(home / "recovered")
    expected = loram.evaluate(home / "my models" / "base", adapter=home / "recovered", data="~/rows.jsonl")
    assert loram.evaluate("~/link", adapter="~/recovered", data="~/rows.jsonl").loss == expected.loss
    assert verify("~/pruned").keys() == {str(home / "pruned")}
    loram.load_pruned("~/pruned")
    with pytest.raises(UserError, match="lies inside"):
        loram.prune("~/pruned", "~/pruned/again", **PRUNE)


def test_the_command_line_takes_paths_as_they_are_written(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--ratio", "0.5", "--criterion", "magnitude", "--keep-first", "1", "--keep-last", "1"]
    assert cli(["prune", "~/link", "~/pruned", *line]) == 0
    assert cli(["train", "~/pruned", "~/adapter", "--dataset=~/rows.jsonl", "--max-steps=1"]) == 0
    assert "adapter: adapter written" in capsys.readouterr().out
    assert cli(["eval", "../pruned", "--adapter=~/adapter", "--dataset", "../rows.jsonl", "--max-samples=2"]) == 0
    assert cli(["recover", "../adapter/", "~/recovered", "--base=~/link"]) == 0
    assert cli(["verify", "~/recovered"]) == 0
    assert cli(["estimate", "~/link", "--ratio=0.5", "--keep-first=1", "--keep-last=1"]) == 0
    assert list((home / "a b").iterdir()) == []


def test_a_recipe_takes_paths_as_they_are_written(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        "model_name_or_path": "../my models/base",
        "output_dir": "~/runs/mine",
        "dataset": "../rows.jsonl",
        "eval_dataset": "~/rows.jsonl",
        "prune": PRUNE,
        "train": {"trainer": ONE_STEP},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    loaded = load_recipe("~/recipe.yaml")
    assert loaded.output_dir == home / "runs" / "mine"
    report = run(loaded)
    assert report.recipe["model_name_or_path"] == str(home / "my models" / "base")
    monkeypatch.chdir(tmp_path)
    assert (
        loram.evaluate(home / "link", adapter=home / "runs" / "mine" / "recovered", data=home / "rows.jsonl").rows == 20
    )
    plan = PruningPlan.load(home / "runs" / "mine" / "pruned")
    assert Path(plan.base.name) == home / "my models" / "base"


def test_caches_and_teachers_take_paths_as_they_are_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAM_CACHE", "~/cache")
    assert cache_folder() == home / "cache"
    loram.prune("~/link", "~/pruned", **PRUNE)
    loram.teach("../link", "~/teacher", data="~/rows.jsonl", top_k=4)
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2}
    loram.align("~/pruned", "aligned", teacher="~/teacher", probe=False, trainer=trainer)
    assert (home / "a b" / "aligned" / "loram_manifest.json").is_file()
