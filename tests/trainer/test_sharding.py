"""Under FSDP2 each process holds a share of the model; what would not be sharded is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers import contents, launch
from sharded import OPTIONS, trainer

import loram
from loram.base.errors import UserError
from loram.cli import _main as command
from loram.disk.adapter import Adapter
from loram.trainer.sharding import DEEPSPEED, FSDP, check_sharded, check_sharding

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def made(pruned_models: dict[str, Path], rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of what two processes and one made, from a model of unlike layers with a tied head."""
    out = tmp_path_factory.mktemp("sharded")
    launch(Path(__file__).with_name("sharded.py"), pruned_models["llama"], rows_file, out)
    loram.train(pruned_models["llama"], out / "one", data=rows_file, trainer=trainer(), **OPTIONS)
    return out


def test_a_sharded_training_is_that_of_one_process(made: Path) -> None:
    sharded, one = (Adapter.load(made / name).tensors for name in ("plain", "one"))
    assert sharded.keys() == one.keys()
    for key, tensor in one.items():
        assert (sharded[key] - tensor).norm() <= 1e-4 * tensor.norm(), key
    logs = [
        [json.loads(line)["loss"] for line in (made / name / "training_log.jsonl").read_text().splitlines()]
        for name in ("plain", "one")
    ]
    assert len(logs[0]) == 6
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_each_process_holds_its_share(made: Path) -> None:
    for local, whole in json.loads((made / "bytes.json").read_text()):
        assert local <= 0.52 * whole  # a half, and what does not divide


def test_an_interrupted_sharded_training_goes_on_exactly(made: Path) -> None:
    name = "adapter_model.safetensors"
    assert contents(made / "resumed")[name] == contents(made / "plain")[name]
    assert not list(made.glob("*-checkpoints"))


@pytest.mark.parametrize(("variable", "kind"), [("ACCELERATE_USE_FSDP", FSDP), ("ACCELERATE_USE_DEEPSPEED", DEEPSPEED)])
def test_what_would_silently_be_whole_is_refused(
    variable: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pruned_models: dict[str, Path],
    rows_file: Path,
) -> None:
    monkeypatch.setenv(variable, "true")
    line = ["train", str(pruned_models["llama"]), str(tmp_path / "out"), "--dataset", str(rows_file), "--device", "cpu"]
    assert command(line) == 2
    assert f"{kind}: shards the model over several processes, and this is the only one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"{kind}: accelerate shards nothing on a CPU"):
        check_sharding({}, CPU)
    with pytest.raises(UserError, match=f"{kind}: .*whole in each process"):
        check_sharded(torch.nn.Linear(2, 2), kind)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=f"{kind}: align trains whole models"):
        loram.align(pruned_models["llama"], tmp_path / "aligned", data=rows_file)


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_sharding({"fsdp": True}, CUDA)
    with pytest.raises(UserError, match="its first version is not supported"):
        check_sharding({"fsdp": True, "fsdp_config": {"version": 1}}, CUDA)
    with pytest.raises(UserError, match="fsdp_config is read only with fsdp"):
        check_sharding({"fsdp_config": {"version": 2}}, CUDA)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="add --fsdp_version 2"):
        check_sharding({}, CUDA)
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding({}, CUDA)


@pytest.mark.parametrize("option", [{"load_in_4bit": True}, {"engine": "streamed"}, {"anchor_steps": 2}])
def test_what_sharding_does_not_go_with_is_refused(
    option: dict[str, object], pruned_models: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"FSDP: .*drop {'one' if 'engine' in option else next(iter(option))}"):
        loram.train(pruned_models["llama"], tmp_path / "out", data=rows_file, trainer={"fsdp": True}, **option)
    assert not list(tmp_path.iterdir())
