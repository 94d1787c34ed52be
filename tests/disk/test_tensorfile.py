"""safetensors files are read by rows and written in any order like the library's own, or they are refused."""

import contextlib
import gc
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loram.base.errors import UserError
from loram.base.hashes import take_remembered_sha256
from loram.disk.tensorfile import TensorFile, TensorFileWriter, TensorSpec
from loram.disk.writer import ShardedWriter

NOT_WHOLE = r"file\.safetensors: not a whole safetensors file"


def mixed() -> dict[str, Tensor]:
    """Tensors of such sizes that, if they were not sorted by dtype, the wider ones would not be aligned."""
    torch.manual_seed(0)
    return {
        "flags": torch.rand(7) > 0.5,
        "bytes": torch.randint(-128, 128, (3, 5), dtype=torch.int8),
        "half": torch.randn(5, 3).bfloat16(),
        "single": torch.randn(3, 5, 7),
        "scalar": torch.tensor(2.5),
        "flag": torch.tensor(True),
        "nothing": torch.empty(0),
        "no_rows": torch.empty(0, 4, dtype=torch.bfloat16),
        "no_columns": torch.empty(4, 0, dtype=torch.int64),
        "long": torch.randint(-(2**62), 2**62, (9,)),
        "eighth": torch.randn(6, 3).to(torch.float8_e4m3fn),
        "unsigned": torch.tensor([0, 1, 65535], dtype=torch.uint16),
        "double": torch.randn(2, 3, dtype=torch.float64),
    }


def specs_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (torch cannot compare float8)."""
    as_bytes = [tensor.flatten().view(torch.uint8) for tensor in (found, expected)]
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*as_bytes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.safetensors"


@pytest.mark.parametrize("reverse", [False, True])
def test_safetensors_reads_what_we_write_in_any_order(reverse: bool, path: Path) -> None:
    tensors = mixed()
    with TensorFileWriter(path, specs_of(tensors)) as writer:
        for name in sorted(tensors, reverse=reverse):
            writer.write(name, tensors[name])
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_the_file_is_the_same_whatever_the_order(path: Path, tmp_path: Path) -> None:
    tensors, other = mixed(), tmp_path / "other.safetensors"
    for file, names in ((path, list(tensors)), (other, list(reversed(tensors)))):
        with TensorFileWriter(file, specs_of(tensors)) as writer:
            for name in names:
                writer.write(name, tensors[name])
    assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("order", ["as in the file", "from the third on", "from the last", "by rows"])
def test_a_file_is_hashed_on_the_way_as_far_as_tensors_come_in_order(
    order: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, read, digest = {name: torch.randn(4, 5) for name in "abcd"}, [], hashlib.file_digest

    def noted(file: Any, algorithm: Any) -> Any:
        read.append(os.fstat(file.fileno()).st_size - file.tell())
        return digest(file, algorithm)

    names = {"from the third on": "abdc", "from the last": "dcba"}.get(order, "abcd")
    with TensorFileWriter(path, specs_of(tensors)) as writer:
        monkeypatch.setattr(hashlib, "file_digest", noted)
        for name in names:
            for row in range(4) if order == "by rows" else (0,):
                writer.write(name, tensors[name][row : row + 1] if order == "by rows" else tensors[name], row)
    assert sum(read) == {"from the third on": 80, "from the last": 240}.get(order, 0)
    assert take_remembered_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert take_remembered_sha256(path) is None


def test_a_file_that_was_changed_is_hashed_again(path: Path) -> None:
    tensor = torch.ones(2)
    with TensorFileWriter(path, specs_of({"a": tensor})) as writer:
        writer.write("a", tensor)
    path.write_bytes(path.read_bytes() + b" ")
    assert take_remembered_sha256(path) is None


def test_rows_may_come_one_by_one_from_last_to_first(path: Path) -> None:
    tensors = {name: tensor for name, tensor in mixed().items() if tensor.ndim}
    with TensorFileWriter(path, specs_of(tensors)) as writer:
        for row in reversed(range(9)):
            for name, tensor in tensors.items():
                if row < len(tensor):
                    writer.write(name, tensor[row : row + 1], row)
    found = load_file(path)
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_what_is_no_contiguous_block_is_written_right(path: Path) -> None:
    square = torch.arange(12.0).view(3, 4)
    with TensorFileWriter(path, specs_of({"turned": square.T, "grown": square[:, :2]})) as writer:
        writer.write("turned", square.T.requires_grad_())
        writer.write("grown", square[:, :2])
    found = load_file(path)
    assert torch.equal(found["turned"], square.T)
    assert torch.equal(found["grown"], square[:, :2])


def test_every_tensor_lies_at_a_multiple_of_its_element_size(path: Path) -> None:
    """Otherwise torch could not view a memory map of the tensor."""
    tensors = mixed()
    with TensorFileWriter(path, specs_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_we_read_what_safetensors_wrote(path: Path) -> None:
    tensors = mixed()
    save_file(tensors, path, {"format": "pt", "note": "it holds no tensors"})
    file = TensorFile(path)
    assert file.specs == specs_of(tensors)
    assert all(same(file.read(name), tensors[name]) for name in tensors)


def test_rows_are_those_of_the_whole(path: Path) -> None:
    tensors = mixed()
    save_file(tensors, path)
    file = TensorFile(path)
    for name in ("bytes", "half", "single", "long", "eighth", "double"):
        for start in range(len(tensors[name])):
            for stop in range(start, len(tensors[name]) + 2):
                assert same(file.read(name, start, stop), tensors[name][start:stop])
            assert same(file.read(name, start), tensors[name][start:])


@pytest.mark.parametrize("block_bytes", [1, 13, 30, 100, 1 << 20])
def test_blocks_are_small_and_concatenate_to_the_whole(block_bytes: int, path: Path) -> None:
    tensors = mixed()
    save_file(tensors, path)
    file = TensorFile(path)
    for name, tensor in tensors.items():
        blocks = list(file.blocks(name, block_bytes))
        if tensor.ndim < 2:
            assert len(blocks) == 1
        whole = torch.cat([block for _, block in blocks]) if tensor.ndim else blocks[0][1]
        assert same(whole, tensor)
        position = 0
        for start, block in blocks:
            assert start == position
            assert block.ndim < 2 or len(block) <= 1 or block.nbytes <= block_bytes
            position += len(block) if block.ndim else 0


def test_only_the_rows_asked_for_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.randn(50, 8), "b": torch.randn(50, 8)}, path)
    file, sizes = TensorFile(path), []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: sizes.append(preadv(*args)) or sizes[-1])
    file.read("b", 10, 12)
    assert sum(sizes) == 2 * 8 * 4


def test_short_reads_and_writes_are_carried_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may read or write fewer bytes than requested; above 2 GB it always does."""
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: preadv(file, [views[0][:5]], offset))
    monkeypatch.setattr(os, "pwrite", lambda file, view, offset: pwrite(file, view[:7], offset))
    tensor = torch.randn(9, 3)
    with TensorFileWriter(path, specs_of({"a": tensor})) as writer:
        writer.write("a", tensor)
    assert torch.equal(load_file(path)["a"], tensor)
    assert torch.equal(TensorFile(path).read("a"), tensor)


def test_tensors_that_were_read_stay_when_the_file_is_closed_and_are_not_shared(path: Path) -> None:
    save_file({"a": torch.ones(3)}, path)
    file = TensorFile(path)
    first, second = file.read("a"), file.read("a")
    first += 1
    file.close()
    assert second.tolist() == [1, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_a_file_that_nobody_uses_any_more_is_closed(path: Path) -> None:
    """In one process, every stage of a run may open a model of hundreds of shards."""
    save_file({"a": torch.ones(3)}, path)

    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    for _ in range(5):
        TensorFile(path).read("a")
    assert open_files() == before


def test_a_closed_file_leaves_the_files_of_others_open(path: Path) -> None:
    """The system gives the descriptor of a closed file to the next file that is opened."""
    save_file({"a": torch.ones(3)}, path)
    first = TensorFile(path)
    first.close()
    second = TensorFile(path)
    del first
    gc.collect()
    assert second.read("a").tolist() == [1, 1, 1]


def with_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: Any, stop: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_the_headers_of_the_next_test_would_be_right_without_their_lie(path: Path) -> None:
    file = TensorFile(with_header(path, {"b": entry(8, 16), "a": entry(0, 8), "__metadata__": {}}, bytes(16)))
    assert file.read("b").tolist() == [0, 0]


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
        ({"a": entry(4, 12)}, 12),
        ({"a": entry(0, 8, dtype="F31")}, 8),
        ({"a": entry(0, 8, dtype=None)}, 8),
        ({"a": entry(0, 8, dtype=["F32"])}, 8),
        ({"a": entry(0, 8, dtype="BF16")}, 8),
        ({"a": entry(0, 8, shape=[3])}, 8),
        ({"a": entry(0, 8, shape=[-1, -2])}, 8),
        ({"a": entry(0, -8, shape=[-2])}, 8),
        ({"a": entry(8, 0)}, 8),
        ({"a": entry(-8, 0)}, 8),
        ({"a": entry(0, 8, shape=2)}, 8),
        ({"a": entry(0, 8, shape="2")}, 8),
        ({"a": entry(0, 8, shape=["2"])}, 8),
        ({"a": entry(0, 8, shape=[2.5])}, 8),
        ({"a": entry(0, 8, shape=[float("inf")])}, 8),
        ({"a": entry(0, 0, shape=[0, 10**30])}, 0),
        ({"a": entry(0.0, 8.0)}, 8),
        ({"a": entry(0, None)}, 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8),
        ({"a": 1}, 8),
        ({"a": None, "b": None}, 8),
        ([], 0),
        ("text", 0),
        (None, 0),
        (7, 0),
        (b"not JSON", 0),
        (b'{"a": ', 0),
        (b"\xff\xfe{}", 0),
        (b"[" * 100_000, 0),
        (b"", 0),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_header_that_lies_is_refused(header: Any, size: int, path: Path) -> None:
    with pytest.raises(SafetensorError):
        load_file(with_header(path, header, bytes(size)))
    with pytest.raises(UserError, match=NOT_WHOLE):
        TensorFile(path)


@pytest.mark.parametrize("length", [0, 1, 9, 1 << 20, 100_000_001, 1 << 62, (1 << 64) - 1])
def test_a_length_that_lies_is_refused(length: int, path: Path) -> None:
    with pytest.raises(UserError, match=NOT_WHOLE):
        TensorFile(with_header(path, {"a": entry(0, 8)}, bytes(8), length))


def test_a_file_cut_anywhere_or_too_long_is_refused(path: Path, tmp_path: Path) -> None:
    save_file({"a": torch.randn(3, 2), "b": torch.randn(4)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    contents = [whole[:size] for size in range(len(whole))] + [whole + b"\0", whole + whole]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match=NOT_WHOLE):
            TensorFile(path)


def test_a_pointer_to_large_file_storage_is_refused(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n")
    with pytest.raises(UserError, match=r"file\.safetensors: a Git LFS pointer.*run `git lfs pull`"):
        TensorFile(path)


def test_what_is_no_file_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"file\.safetensors: cannot be read"):
        TensorFile(path)
    path.mkdir()
    with pytest.raises(UserError, match=r"file\.safetensors"):
        TensorFile(path)


def test_a_file_cut_while_it_is_open_is_refused(path: Path) -> None:
    save_file({"a": torch.randn(5, 3), "b": torch.randn(4)}, path)
    file = TensorFile(path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(UserError, match=r"file\.safetensors: ends inside b"):
        file.read("b")


WHOLE = {"a": entry(0, 8), "b": entry(8, 14, [1, 3], "BF16"), "c": entry(14, 15, [], "BOOL")}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "BF16", "BOOL", ""]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "I8"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-2, 4), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-2, 16), min_size=2, max_size=2) | JSON_VALUES,
    },
)


def refused_or_whole(path: Path) -> None:
    """Every exception but a UserError fails the test."""
    with contextlib.suppress(UserError):
        file = TensorFile(path)
        for name, spec in file.specs.items():
            found = file.read(name)
            assert (found.dtype, found.shape) == (spec.dtype, spec.shape)
        file.close()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file.safetensors"


@given(start=st.integers(0, 200), removed=st.integers(0, 20), put=st.binary(max_size=20), whole=st.booleans())
@settings(deadline=None, max_examples=300)
def test_no_damage_to_a_header_is_a_crash(start: int, removed: int, put: bytes, whole: bool, fuzzed: Path) -> None:
    text = json.dumps(WHOLE).encode()
    text = text[:start] + put + text[start + removed :]
    refused_or_whole(with_header(fuzzed, text, bytes(15), None if whole else len(json.dumps(WHOLE))))


@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRIES) | JSON_VALUES)
@settings(deadline=None, max_examples=300)
def test_no_header_at_all_is_a_crash(header: Any, fuzzed: Path) -> None:
    refused_or_whole(with_header(fuzzed, header, bytes(8)))


@given(content=st.binary(max_size=64))
@settings(deadline=None, max_examples=200)
def test_no_bytes_are_a_crash(content: bytes, fuzzed: Path) -> None:
    fuzzed.write_bytes(content)
    refused_or_whole(fuzzed)


def test_leaving_a_file_unfinished_is_a_mistake_of_ours(path: Path) -> None:
    specs = specs_of({"a": torch.ones(2), "b": torch.ones(4)})
    with pytest.raises(AssertionError, match="'b': 16"), TensorFileWriter(path, specs) as writer:
        writer.write("a", torch.ones(2))


def test_an_exception_on_the_way_is_not_hidden_by_the_unfinished_file(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TensorFileWriter(path, specs_of({"a": torch.ones(2)})):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("tensor", "row"),
    [
        (torch.ones(4, 3, dtype=torch.bfloat16), 0),
        (torch.ones(4, 2), 0),
        (torch.ones(3, 4), 0),
        (torch.ones(5, 3), 0),
        (torch.ones(2, 3), 3),
    ],
    ids=["dtype", "columns", "turned", "rows", "beyond"],
)
def test_what_does_not_fit_is_a_mistake_of_ours(tensor: Tensor, row: int, path: Path) -> None:
    specs = specs_of({"a": torch.ones(4, 3), "b": torch.ones(4, 3)})
    with pytest.raises(AssertionError):
        TensorFileWriter(path, specs).write("a", tensor, row)


def test_a_file_that_exists_is_not_overwritten(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        TensorFileWriter(path, specs_of({"a": torch.ones(2)}))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("shard_bytes", [1, 60, 100, 200, 1 << 20])
def test_shards_are_bounded_and_the_index_says_where_all_is(shard_bytes: int, tmp_path: Path) -> None:
    tensors = mixed()
    with ShardedWriter(tmp_path, specs_of(tensors), shard_bytes) as writer:
        for name in sorted(tensors):
            writer.write(name, tensors[name])
    files = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    places = {name: file for file, content in files.items() for name in content}
    assert all(same(files[file][name], tensors[name]) for name, file in places.items())
    assert places.keys() == tensors.keys()
    assert all(files.values())  # no shard is empty, not even before a tensor that is too large for one
    for content in files.values():
        sizes = [tensor.nbytes for tensor in content.values()]
        assert sum(sizes) <= shard_bytes or sum(sizes) == max(sizes)
    index = tmp_path / "model.safetensors.index.json"
    if shard_bytes == 1 << 20:
        assert list(files) == ["model.safetensors"]
        assert not index.exists()
        return
    count = len(files)
    assert sorted(files) == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": places,
    }


def test_unfinished_shards_get_no_index(tmp_path: Path) -> None:
    specs = specs_of({"a": torch.ones(4), "b": torch.ones(4)})
    with pytest.raises(AssertionError), ShardedWriter(tmp_path, specs, shard_bytes=16) as writer:
        writer.write("a", torch.ones(4))
    assert not (tmp_path / "model.safetensors.index.json").exists()
