"""The sitting at a GPU: steps that fail or hang cost only themselves, and what is done is not done again."""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="steps run in forked processes")


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
    module = importlib.import_module("session")
    setting = module.Setting(device="cpu", small=False, work=tmp_path / "work")
    yield lambda seconds: module.Session(setting, tmp_path / "out", seconds, least=1)
    del sys.modules["session"]


def measures(setting: Any, value: int) -> Iterator[tuple[str, Any]]:
    yield "value", value


def fails(setting: Any) -> Iterator[tuple[str, Any]]:
    yield "before", 1
    raise ValueError("no such card")


def hangs(setting: Any) -> Iterator[tuple[str, Any]]:
    yield "before", 2
    time.sleep(60)


def test_each_step_has_a_result(session: Any, tmp_path: Path) -> None:
    sitting = session(60)
    sitting.run("good", measures, limit=20, value=3)
    sitting.run("bad", fails, limit=20)
    sitting.run("slow", hangs, limit=6)
    sitting._end = time.monotonic()
    sitting.run("late", measures, limit=20, value=4)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert rows["good"]["value"] == 3
    assert rows["bad"]["before"] == 1
    assert rows["bad"]["error"] == "ValueError: no such card"
    assert rows["slow"]["before"] == 2
    assert rows["slow"]["error"] == "took more than 6 s"
    assert "skipped" in rows["late"]
    again = session(60)
    for name in ("good", "late"):
        again.run(name, measures, limit=20, value=5)
    assert [again.results[name]["value"] for name in ("good", "late")] == [3, 5]
