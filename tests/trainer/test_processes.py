"""Two processes, started by torchrun or accelerate, do the same as one process with batches of twice the size."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import launch
from together import Stop, work

import loram
from loram.base.errors import UserError
from loram.cli import _main as command
from loram.compute.device import pick_device
from loram.disk.adapter import Adapter
from loram.disk.artifacts import MANIFEST_NAME
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model

Made = tuple[Path, Path, subprocess.CompletedProcess[str]]
FOLDERS = ["plain", "anchored", "streamed", "resumed", "aligned", "commanded"]


@pytest.fixture(scope="module")
def made(pruned_models: dict[str, Path], rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return (the folder that two processes made, the folder of one process, how the two processes ended)."""
    out = tmp_path_factory.mktemp("processes")
    arguments = [str(pruned_models["llama"]), str(rows_file)]
    ended = launch(Path(__file__).with_name("together.py"), *arguments, out / "two")
    work(*map(Path, arguments), out / "one")
    return out / "two", out / "one", ended


def test_every_folder_is_made_once_and_nothing_else_is_left(made: Made) -> None:
    two, one, ended = made
    assert sorted(path.name for path in two.iterdir()) == sorted(FOLDERS) == sorted(p.name for p in one.iterdir())
    assert ended.stdout.count("adapter written") == 1
    assert ended.stderr.count("step 6 of 6") == 4  # plain, anchored, streamed, resumed: only the first process prints
    for name in FOLDERS:
        manifest = loram.disk.artifacts.verify(two / name)[str(two / name)]
        assert manifest.settings["processes"] == 2


@pytest.mark.parametrize("name", ["plain", "anchored", "streamed", "resumed", "commanded"])
def test_adapters_are_those_of_one_process(name: str, made: Made) -> None:
    two, one = (Adapter.load(folder / name).tensors for folder in made[:2])
    assert two.keys() == one.keys()
    for key, tensor in one.items():
        assert (two[key] - tensor).norm() <= 1e-3 * tensor.norm(), key


def test_an_interrupted_training_of_two_goes_on_exactly(made: Made) -> None:
    plain, resumed = (Adapter.load(made[0] / name).tensors for name in ("plain", "resumed"))
    assert all(torch.equal(resumed[key], tensor) for key, tensor in plain.items())


def test_alignment_is_that_of_one_process(made: Made) -> None:
    two, one = (Checkpoint(folder / "aligned") for folder in made[:2])
    for name in one.names():
        assert (two.tensor(name).float() - one.tensor(name).float()).abs().max() <= 1e-4, name
    logs = [
        [json.loads(line) for line in (folder / "aligned" / "align_log.jsonl").read_text().splitlines()]
        for folder in made[:2]
    ]
    probes = [[entry["recovered_loss"] for entry in log if "recovered_loss" in entry] for log in logs]
    assert len(probes[0]) == 3
    assert probes[0] == pytest.approx(probes[1], rel=1e-4)


def test_other_stages_refuse_to_be_run_by_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert command(["recover", "adapter", str(tmp_path / "out")]) == 2
    assert "in process 1 of 2: recover: works in one process" in capsys.readouterr().err


def test_several_processes_refuse_one_gpu_and_a_file_to_convert(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="each of several processes takes a GPU of its own"):
        pick_device("cuda:1")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="convert it first, in one process: loram convert"):
        open_model(tmp_path / "model.gguf")


def test_lisa_refuses_several(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="method lisa: trains in one process"):
        loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, method="lisa")


def test_what_two_processes_began_one_does_not_go_on_with(
    pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """One process would train on other batches."""
    trainer = {"max_steps": 5, "save_steps": 2}
    out = tmp_path / "adapter"
    with pytest.raises(InterruptedError):
        loram.train(pruned_models["llama"], out, data=rows_file, trainer=trainer, callbacks=[Stop()])
    manifest = tmp_path / "adapter-checkpoints" / "checkpoint-2" / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(UserError, match="processes: 2 -> 1"):
        loram.train(pruned_models["llama"], out, data=rows_file, trainer=trainer)
