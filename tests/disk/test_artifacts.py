"""Folders appear whole or not at all."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loram.base.errors import UserError
from loram.disk import artifacts
from loram.disk.artifacts import MANIFEST_NAME, find_manifest, publish


def write(out: Path, **options: Any) -> Path:
    with publish(out, kind="test", made_from={"base": "abc"}, **options) as staging:
        (staging / "a.bin").write_bytes(b"12345")
        (staging / "sub").mkdir()
        (staging / "sub" / "b.txt").write_text("b")
        (staging / "a.bin").chmod(0o600)
    return out


def test_manifest_describes_every_file(tmp_path: Path) -> None:
    out = write(tmp_path / "deep" / "out", settings={"x": 1})
    manifest = find_manifest(out)
    assert manifest is not None
    assert (manifest.kind, manifest.made_from, manifest.settings) == ("test", {"base": "abc"}, {"x": 1})
    assert manifest.files.keys() == {"a.bin", "sub/b.txt"}
    assert manifest.files["a.bin"].size == 5
    assert manifest.files["a.bin"].sha256 == hashlib.sha256(b"12345").hexdigest()
    assert "torch" in manifest.versions
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # no staging folder, no lock


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_modes_follow_the_umask(tmp_path: Path, umask: None) -> None:
    out = write(tmp_path / "out")
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o640}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_on_failure(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with publish(tmp_path / "out", kind="test", made_from={}) as staging:
            (staging / "a").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_existing_outputs_are_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    before = (out / "a.bin").stat().st_mtime_ns
    with pytest.raises(UserError, match="exists already"):
        write(out)
    assert (out / "a.bin").stat().st_mtime_ns == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "file")
    with pytest.raises(UserError, match="is a file, so no folder can be made below it"):
        write(tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    for name, target in (("link", "empty"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(UserError, match="exists already"):
            write(tmp_path / name)
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_folder_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert find_manifest(write(tmp_path / "out")) is not None


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with publish(tmp_path / "out", kind="test", made_from={}) as staging:
        (staging / "a").touch()
        with pytest.raises(UserError, match="another process is writing"):
            write(tmp_path / "out")
        assert (staging / "a").exists()


WRITER = """
import pathlib, sys, time
sys.argv[0] = "loram"  # like the command line, which does not import torch
from loram.disk.artifacts import publish
with publish(pathlib.Path(sys.argv[1]), kind="test", made_from={}) as staging:
    (staging / "old").touch()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_writer_in_another_process_keeps_others_out_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            with pytest.raises(UserError, match="another process is writing"):
                write(tmp_path / "out")
            assert (tmp_path / ".out.partial" / "old").exists()
        finally:
            writer.kill()
    assert not (tmp_path / "out").exists()
    assert find_manifest(write(tmp_path / "out")) is not None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.bin", MANIFEST_NAME, "sub"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def race() -> None:
        with publish(out, kind="test", made_from={}) as staging:
            (staging / "ours").touch()
            out.mkdir()
            (out / "theirs").touch()

    with pytest.raises(UserError, match="exists already"):
        race()
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "old").touch()
    (tmp_path / ".out.lock").touch()
    out = write(tmp_path / "out")
    assert not (out / "old").exists()
    assert not stale.exists()


def test_readers_check_sizes(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    (out / "a.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"a\.bin: 4 bytes, but the manifest says 5"):
        find_manifest(out)
    (out / "a.bin").unlink()
    with pytest.raises(UserError, match=r"a\.bin: the manifest lists this file, but it is missing"):
        find_manifest(out)


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"kind": 3}', "\x00"])
def test_a_broken_manifest_is_an_error(damage: str, tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    (out / MANIFEST_NAME).write_text(damage)
    with pytest.raises(UserError, match="not a valid manifest"):
        find_manifest(out)


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    (out / MANIFEST_NAME).write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(UserError, match="format_version"):
        find_manifest(out)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_mutilated_manifest_is_a_clear_error_or_a_manifest(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    if not out.exists():
        write(out)
        (tmp_path / "good").write_bytes((out / MANIFEST_NAME).read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    (out / MANIFEST_NAME).write_bytes(bytes(content))
    with contextlib.suppress(UserError):
        assert find_manifest(out) is not None


def test_the_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    def fingerprint(out: str, name: str, content: str, **options: Any) -> str:
        with publish(tmp_path / out, made_from={}, **options) as staging:
            (staging / name).write_text(content)
        manifest = find_manifest(tmp_path / out)
        assert manifest is not None
        return manifest.fingerprint

    first = fingerprint("a", "x", "1", kind="k")
    assert first == fingerprint("b", "x", "1", kind="other", settings={"s": 2})
    assert len({first, fingerprint("c", "y", "1", kind="k"), fingerprint("d", "x", "2", kind="k")}) == 3


def test_no_manifest_is_none(tmp_path: Path) -> None:
    assert find_manifest(tmp_path) is None


def test_same_content_same_manifest(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert (first / MANIFEST_NAME).read_bytes() == (second / MANIFEST_NAME).read_bytes()
    assert json.loads((first / MANIFEST_NAME).read_text())["format_version"] == 1


@pytest.mark.parametrize("damage", ["flip", "zeroed tail"])
def test_readers_check_hashes(damage: str, tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    find_manifest(out)
    content = (out / "a.bin").read_bytes()
    changed = bytes([content[0] ^ 1]) + content[1:] if damage == "flip" else content[:-2] + b"\0\0"
    (out / "a.bin").write_bytes(changed)
    with pytest.raises(UserError, match=r"a\.bin: not the content that the manifest says"):
        find_manifest(out)
    assert find_manifest(out, hashed_bytes=2) is not None  # a.bin is too large to be hashed now
    with pytest.raises(UserError, match=r"a\.bin: not the content"):
        artifacts.verify(tmp_path)


def test_verify_finds_every_folder_below(tmp_path: Path) -> None:
    first, second = write(tmp_path / "run" / "a"), write(tmp_path / "run" / "b")
    assert list(artifacts.verify(tmp_path / "run")) == [str(first), str(second)]
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "nothing to compare with"), (tmp_path / "no", "no such folder")):
        with pytest.raises(UserError, match=message):
            artifacts.verify(folder)


def test_an_output_inside_an_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for out in ("model", "model/pruned", "link/pruned", "link/../model/x"):
        with pytest.raises(UserError, match="inputs are never written to"):
            artifacts.check_output(tmp_path / out, "some/hub-id", tmp_path / "model")
    artifacts.check_output(tmp_path / "model-pruned", tmp_path / "model")


def test_a_lock_file_that_its_holder_removed_meanwhile_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last holder removes the file after we have opened it, so our lock on that file keeps nobody out."""
    flock, path = artifacts.fcntl.flock, tmp_path / ".out.lock"
    calls = []

    def late(handle: Any, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(operation)
        flock(handle, operation)

    monkeypatch.setattr(artifacts.fcntl, "flock", late)
    with artifacts.lock(tmp_path / "out"):
        assert len(calls) == 2
        assert path.exists()
    assert not path.exists()


def test_what_is_discarded_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out")

    def stop(path: Path, **options: Any) -> None:
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(artifacts.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        artifacts.discard(out)
    assert not out.exists()
