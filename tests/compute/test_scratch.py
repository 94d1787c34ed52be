"""Activations are the same in memory and in a file, and neither is held longer than it is needed."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loram.compute import scratch
from loram.compute.scratch import Activations, Scratch

SHAPES = [(2, 3, 5), (1, 7, 5), (0, 5), (1030, 5), ()]  # the last three have no element, several pages and one number


def filled(room: Activations, order: list[int], seed: int = 0) -> list[Tensor]:
    """Set all tensors to random values; returns index -> values."""
    torch.manual_seed(seed)
    values = [torch.randn(shape) for shape in room.shapes]
    for index in order:
        room[index] = values[index]
    return values


@pytest.mark.parametrize("memory_bytes", [1 << 20, 0], ids=["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_set_is_read_back_in_the_room_s_dtype(memory_bytes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    room = Scratch(memory_bytes, tmp_path).room(SHAPES, dtype)
    assert len(room) == len(SHAPES)
    values = filled(room, [3, 0, 4, 2, 1])
    for index in (1, 0, 3, 2, 4, 0):
        assert room[index].dtype == dtype
        assert torch.equal(room[index], values[index].to(dtype))
    again = filled(room, [0, 1, 2, 3, 4], seed=1)
    assert torch.equal(room[3], again[3].to(dtype))
    assert not torch.equal(again[3], values[3])
    room.close()


def test_what_was_read_from_a_file_is_not_changed_by_setting_anew(tmp_path: Path) -> None:
    room = Scratch(0, tmp_path).room([(4,), (4,)], torch.float32)
    room[0] = torch.ones(4)
    first = room[0]
    room[0] = torch.zeros(4)
    room[1] = torch.full((4,), 2.0)
    assert first.tolist() == [1, 1, 1, 1]
    assert room[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("memory_bytes", [1 << 20, 0], ids=["memory", "file"])
def test_nothing_of_the_graph_is_kept(memory_bytes: int, tmp_path: Path) -> None:
    room = Scratch(memory_bytes, tmp_path).room([(3,)], torch.float32)
    room[0] = torch.ones(3, requires_grad=True) * 2
    assert room[0].tolist() == [2, 2, 2]
    assert not room[0].requires_grad


def test_the_budget_is_taken_and_given_back(tmp_path: Path) -> None:
    scratch = Scratch(100, tmp_path)
    first = scratch.room([(5,), (5,)], torch.float32)
    assert scratch.free_bytes == 60
    second = scratch.room([(5, 5)], torch.bfloat16)
    assert scratch.free_bytes == 10
    beyond = scratch.room([(3,)], torch.float32)  # these 12 bytes go to a file
    assert scratch.free_bytes == 10
    filled(beyond, [0])
    beyond.close()
    assert scratch.free_bytes == 10
    first.close()
    assert scratch.free_bytes == 50
    second.close()
    assert scratch.free_bytes == 100


def test_closing_frees_the_tensors() -> None:
    room = Scratch(1 << 20).room([(3,)], torch.float32)
    room[0] = torch.ones(3)
    held = weakref.ref(room[0])
    assert held() is not None
    room.close()
    assert held() is None


def test_no_file_is_ever_seen_in_the_folder(tmp_path: Path) -> None:
    room = Scratch(0, tmp_path).room(SHAPES, torch.float32)
    filled(room, [0, 1, 2, 3, 4])
    assert list(tmp_path.iterdir()) == []
    room.close()
    assert list(tmp_path.iterdir()) == []


def test_files_go_to_the_folder_that_was_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Scratch(0, tmp_path / "none").room([(3,)], torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_what_lies_in_a_file_is_not_in_memory(tmp_path: Path) -> None:
    size, count = 1 << 20, 24

    def resident() -> int:
        """Return how many bytes of the mapped scratch file count as memory of this process."""
        maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
        [ours] = [entry for entry in maps if str(tmp_path) in entry]
        return int(next(line.split()[1] for line in ours.splitlines() if line.startswith("Rss:"))) * 1024

    room = Scratch(0, tmp_path).room([(size,)] * count, torch.float32)
    value = torch.ones(size)
    for index in range(count):
        room[index] = value
    assert resident() <= 4 * size
    total = sum(room[index].sum().item() for index in range(count))
    assert total == size * count
    assert resident() <= 4 * size
    room.close()


@pytest.mark.skipif(sys.platform != "linux", reason="counts maps in /proc/self/maps")
def test_closing_frees_the_file(tmp_path: Path) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    room = Scratch(0, tmp_path).room([(10,)], torch.float32)
    filled(room, [0])
    assert maps() == 1
    room.close()
    assert maps() == 0


def test_files_go_where_a_disk_is_unless_the_user_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(scratch, "_LARGE", tmp_path)
    assert Scratch(0).folder == tmp_path
    assert Scratch(0, tmp_path / "beside").folder == tmp_path / "beside"
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert Scratch(0).folder is None
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(scratch, "_LARGE", tmp_path / "missing")
    assert Scratch(0).folder is None
