"""What goes to the hub: a fake of its API records the calls, and huggingface_hub's own filter chooses the files."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

import loram
from loram.cli import main
from loram.disk.artifacts import publish


class FakeApi:
    """Records the calls to the hub."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]

    def __init__(self) -> None:
        type(self).calls = []

    def create_repo(self, *arguments: Any, **options: Any) -> RepoUrl:
        self.calls.append(("create_repo", arguments, options))
        return RepoUrl(f"https://huggingface.co/{arguments[0]}")

    def create_branch(self, *arguments: Any, **options: Any) -> None:
        self.calls.append(("create_branch", arguments, options))

    def upload_folder(self, *arguments: Any, **options: Any) -> None:
        self.calls.append(("upload_folder", arguments, options))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    FakeApi.calls = []
    return FakeApi


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("push")
    made = {name: root / name for name in ("pruned", "adapter", "recovered", "merged")}
    loram.prune(tiny_llama, made["pruned"], ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    trainer = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    loram.train(made["pruned"], made["adapter"], data=rows_file, trainer=trainer)
    loram.recover(made["adapter"], made["recovered"])
    loram.merge(tiny_llama, made["recovered"], made["merged"])
    return made


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("pruned", {"model.safetensors", "loram_plan.json", "modeling_loram.py"}, {"adapter_config.json"}),
        ("adapter", {"adapter_model.safetensors", "loram_plan.json", "training_log.jsonl"}, {"model.safetensors"}),
        ("recovered", {"adapter_model.safetensors", "adapter_config.json"}, {"model.safetensors"}),
        ("merged", {"model.safetensors", "config.json"}, {"loram_plan.json"}),
    ],
)
def test_a_dry_run_lists_what_would_go(
    name: str, present: set[str], absent: set[str], folders: dict[str, Path], tmp_path: Path, api: type[FakeApi]
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / name)
    for stray in ("optimizer.pt", "checkpoint-1/trainer_state.json", ".cache/huggingface/x", "runs/events.out.1"):
        (folder / stray).parent.mkdir(parents=True, exist_ok=True)
        (folder / stray).write_text("state")
    upload = loram.push(folder, "acme/tiny", dry_run=True)
    assert {"README.md", "loram_manifest.json", "tokenizer.json", *present} <= upload.files.keys()
    assert not absent & upload.files.keys()
    assert upload.files == {file: (folder / file).stat().st_size for file in upload.files}
    strays = (".cache/huggingface/x", "checkpoint-1/trainer_state.json", "optimizer.pt", "runs/events.out.1")
    assert upload.left_out == strays
    assert upload.url == ""
    assert api.calls == []


def test_a_push_makes_the_repository_and_uploads_these_files(
    folders: dict[str, Path], tmp_path: Path, api: type[FakeApi]
) -> None:
    folder = shutil.copytree(folders["recovered"], tmp_path / "recovered")
    (folder / "optimizer.pt").write_text("state")
    (folder / "chat_template.jinja").write_text("{{ messages }}")  # edited, which is allowed
    (folder / "README.md").write_text("my own words")
    upload = loram.push(folder, "acme/tiny", private=True, revision="draft")
    assert upload.url == "https://huggingface.co/acme/tiny"
    assert [name for name, _, _ in api.calls] == ["create_repo", "create_branch", "upload_folder"]
    (made, branch, sent) = api.calls
    assert made[1:] == (("acme/tiny",), {"private": True, "exist_ok": True})
    assert branch[1:] == (("acme/tiny",), {"branch": "draft", "exist_ok": True})
    options = sent[2]
    assert (options["repo_id"], options["folder_path"], options["revision"]) == ("acme/tiny", folder, "draft")
    present = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    chosen = filter_repo_objects(present, allow_patterns=options["allow_patterns"])
    assert sorted(chosen) == sorted(upload.files)
    assert "optimizer.pt" not in upload.files
    assert "chat_template.jinja" in upload.files


def test_without_a_token_one_line_says_so(
    folders: dict[str, Path], api: type[FakeApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(loram.UserError, match=r"no token for the hub; log in with `hf auth login`, or set HF_TOKEN"):
        loram.push(folders["pruned"], "acme/tiny")
    assert api.calls == []


@pytest.mark.parametrize(("status", "error"), [(403, loram.UserError), (503, HfHubHTTPError)])
def test_what_the_hub_refuses_is_said_and_what_it_fails_at_is_a_failure(
    status: int,
    error: type[Exception],
    folders: dict[str, Path],
    api: type[FakeApi],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)

    def refuse(self: FakeApi, *arguments: Any, **options: Any) -> None:
        raise HfHubHTTPError("You have no right to\nwrite here", response=response)

    monkeypatch.setattr(FakeApi, "create_repo", refuse)
    with pytest.raises(error, match="You have no right to"):
        loram.push(folders["pruned"], "acme/tiny")


def test_what_cannot_be_pushed_is_refused(folders: dict[str, Path], tmp_path: Path, api: type[FakeApi]) -> None:
    with publish(tmp_path / "cache", kind="teacher", made_from={}) as staging:
        (staging / "part-1.safetensors").touch()
    other = tmp_path / "other"
    other.mkdir()
    broken = shutil.copytree(folders["recovered"], tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{}")
    checkpoint = next(folders["adapter"].with_name("adapter-checkpoints").iterdir())
    for folder, repo, message in (
        (tmp_path / "none", "acme/tiny", "no such folder"),
        (other, "acme/tiny", "upload it with `hf upload`"),
        (folders["pruned"].parent, "acme/tiny", "push one of the folders in it: adapter, merged, pruned, recovered"),
        (tmp_path / "cache", "acme/tiny", "is the cache of a teacher"),
        (checkpoint, "acme/tiny", "is a checkpoint of a training"),
        (broken, "acme/tiny", "adapter_config.json: "),
        (folders["pruned"], "tiny", "not the name of a repository"),
    ):
        with pytest.raises(loram.UserError, match=message):
            loram.push(folder, repo)
    assert api.calls == []


def test_the_command_lists_files_on_stdout_and_warns_of_a_path(
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["loram", "push", str(folders["recovered"]), "acme/tiny", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    out = call("--dry-run")
    assert "adapter_model.safetensors " in out
    assert out.endswith("nothing was uploaded: a dry run\n")
    assert "--base OWNER/NAME` makes the same adapter for a model on the hub" in caplog.text
    assert json.loads(call("--dry-run", "--json"))["repo"] == "acme/tiny"
