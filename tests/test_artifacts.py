"""Folders appear whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loram.artifacts import MANIFEST_NAME, find_manifest, publish
from loram.errors import UserError


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
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "link")


def test_an_empty_folder_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert find_manifest(write(tmp_path / "out")) is not None


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with publish(tmp_path / "out", kind="test", made_from={}) as staging:
        (staging / "a").touch()
        with pytest.raises(UserError, match="another process is writing"):
            write(tmp_path / "out")
        assert (staging / "a").exists()


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


def test_no_manifest_is_none(tmp_path: Path) -> None:
    assert find_manifest(tmp_path) is None


def test_same_content_same_manifest(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert (first / MANIFEST_NAME).read_bytes() == (second / MANIFEST_NAME).read_bytes()
    assert json.loads((first / MANIFEST_NAME).read_text())["format_version"] == 1
