"""`loram doctor` reports on this machine, in words and as one JSON object."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from loram import cli
from loram.compute.doctor import Device, Diagnosis, doctor


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return doctor()


def test_versions_devices_and_room_of_this_machine(found: Diagnosis) -> None:
    assert found.versions.keys() >= {"python", "loram", "torch", "transformers", "peft", "trl", "datasets"}
    cpu = found.devices[-1]
    assert (cpu.device, cpu.computes_in) == ("cpu", "float32")
    assert cpu.cores is not None
    assert cpu.cores >= 1
    assert cpu.gflops.keys() == {"float32", "bfloat16", "float16"}
    assert all(speed > 0 for speed in cpu.gflops.values())
    assert [room.what for room in found.disk] == ["current folder", "Hugging Face cache", "loram's cache"]
    assert all(room.free > 0 for room in found.disk)


def test_a_missing_package_is_named_with_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    missing = {entry.what: entry.use for entry in doctor().missing}
    assert missing["gguf"] == "to read GGUF files (pip install gguf)"
    assert missing["a GPU that torch can use"] == "to train in bfloat16, in half the memory"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    assert [entry.what for entry in doctor().missing] == ["a GPU that torch can use"]


def test_folders_that_do_not_exist_yet_have_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAM_CACHE", str(tmp_path / "not" / "yet"))
    (room,) = [room for room in doctor().disk if room.what == "loram's cache"]
    assert room.folder == str(tmp_path / "not" / "yet")
    assert room.free > 0


@pytest.mark.parametrize(
    ("gflops", "computes_in", "says"),
    [
        (
            {"float32": 120.0, "bfloat16": 2.0, "float16": 100.0},
            "float32",
            "bfloat16 is 60x slower than float32 here: loram",
        ),
        (
            {"float32": 10.0, "bfloat16": 100.0, "float16": 9.0},
            "bfloat16",
            "bfloat16 is 10x faster than float32 here: loram",
        ),
        ({"float32": 10.0, "bfloat16": 11.0, "float16": 9.0}, "float32", "9.0 GFLOP/s; loram computes in float32"),
    ],
)
def test_the_text_draws_the_conclusion(gflops: dict[str, float], computes_in: str, says: str) -> None:
    gpu = {"device": "cuda:0", "name": "A GPU", "memory": 8_000_000_000, "free_memory": 7_000_000_000}
    device = Device(**gpu, bfloat16=False, gflops=gflops, computes_in=computes_in)
    text = Diagnosis(versions={"python": "3"}, devices=[device], disk=[], missing=[]).text()
    assert says in text
    assert "cuda:0 (A GPU): 8.0 GB of its own memory, 7.0 GB of memory free, no bfloat16" in text
    assert "Not here" not in text


def test_the_command_prints_words_or_one_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli._main(["doctor"]) == 0
    text = capfd.readouterr().out
    assert text.startswith("python 3.")
    assert all(title in text for title in ("\nDevices\n  ", "\nFree disk\n  ", "loram computes in"))
    assert cli._main(["doctor", "--json"]) == 0
    printed: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert Diagnosis.model_validate(printed).devices[-1].device == "cpu"
