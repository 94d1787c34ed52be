"""Faults in the files of users: each one is reported in one clear line, and nothing is written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, random_adapter

import loram
from loram.compute.belonging import load_for
from loram.disk.checkpoint import Checkpoint
from loram.disk.gguf import convert_gguf
from loram.disk.tensorfile import TensorFile, TensorFileWriter
from loram.disk.writer import ShardedWriter

LAYERS = {"keep_first": 2, "keep_last": 1}  # layers 2 and 3 of 5 are pruned
STEP = {"max_steps": 1, "learning_rate": 1e-2}
WHOLE = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1]}  # not pruned: fits pruned and full


@pytest.fixture(scope="module")
def run(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a pruned folder, an adapter on each, and a recovered adapter; by its shapes, every adapter fits both."""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_llama, root / "base")
    loram.prune(root / "base", root / "pruned", ratio=0.5, criterion="magnitude", **LAYERS)
    loram.train(root / "base", root / "plain", data=rows_file, lora=WHOLE, trainer=STEP)
    loram.train(root / "pruned", root / "adapter", data=rows_file, lora=WHOLE, trainer=STEP)
    loram.recover(root / "adapter", root / "recovered")
    return root


def shifted(folder: Path) -> Path:
    """Change every row of a weight of a model, as further training would; the file keeps its size."""
    path = folder / "model.safetensors"
    file = TensorFile(path)
    weights = {name: file.read(name) for name in file.specs}
    weights["model.layers.2.mlp.up_proj.weight"] += 1e-3
    path.unlink()
    with TensorFileWriter(path, file.specs) as writer:
        for name, weight in weights.items():
            writer.write(name, weight)
    return folder


def both_fingerprints(one: Path, other: Path) -> str:
    return rf"{Checkpoint(one).fingerprint[:12]} instead of {Checkpoint(other).fingerprint[:12]}"


# Fingerprints


@pytest.mark.parametrize("adapter", ["plain", "recovered", "adapter"])
def test_an_adapter_on_another_base_of_the_same_shape(
    adapter: str, run: Path, rows_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", "llama", tokenizer, seed=1)
    with pytest.raises(loram.UserError, match=both_fingerprints(other, run / "base")):
        loram.merge(other, run / adapter, tmp_path / "merged")
    with pytest.raises(loram.UserError, match=both_fingerprints(other, run / "base")):
        loram.evaluate(other, adapter=run / adapter, data=rows_file)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("adapter", ["plain", "recovered"])
def test_an_adapter_on_another_revision_of_its_base(adapter: str, run: Path, tmp_path: Path) -> None:
    other = shifted(shutil.copytree(run / "base", tmp_path / "other"))
    with pytest.raises(loram.UserError, match=both_fingerprints(other, run / "base")):
        loram.merge(other, run / adapter, tmp_path / "merged")


def test_an_adapter_on_pruned_weights_that_changed_under_the_same_plan(run: Path, tmp_path: Path) -> None:
    other = shifted(shutil.copytree(run / "pruned", tmp_path / "other"))
    with pytest.raises(loram.UserError, match="not the content that the manifest says"):
        loram.merge(other, run / "adapter", tmp_path / "merged")
    (other / "loram_manifest.json").unlink()
    with pytest.raises(loram.UserError, match=both_fingerprints(other, run / "pruned")):
        loram.merge(other, run / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_adapter_of_the_full_model_on_the_pruned_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match=both_fingerprints(run / "pruned", run / "base")):
        loram.merge(run / "pruned", run / "plain", tmp_path / "merged")


def test_an_unrecovered_adapter_on_the_full_model_though_its_shapes_fit(run: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match="run `loram recover`"):
        loram.merge(run / "base", run / "adapter", tmp_path / "merged")


def test_a_recovered_adapter_on_the_pruned_model_though_its_shapes_fit(run: Path, tmp_path: Path) -> None:
    with pytest.raises(loram.UserError, match="is recovered; use it on the full model"):
        loram.merge(run / "pruned", run / "recovered", tmp_path / "merged")


def test_the_right_pairs_go_together(run: Path, tmp_path: Path) -> None:
    for base, adapter in (("base", "plain"), ("base", "recovered"), ("pruned", "adapter")):
        assert load_for(Checkpoint(run / base), run / adapter).modules


def test_recover_with_the_plan_of_another_pruning(run: Path, tmp_path: Path) -> None:
    loram.prune(run / "base", tmp_path / "pruned", ratio=0.5, criterion="random", **LAYERS)
    foreign = random_adapter(loram.load_pruned(run / "pruned"), tmp_path / "foreign")  # names the folder it was made on
    shutil.copy(tmp_path / "pruned" / "loram_plan.json", foreign)
    with pytest.raises(loram.UserError, match=r"loram_plan\.json: not the plan of .*copy that one"):
        loram.recover(foreign, tmp_path / "out")
    shutil.copy(run / "pruned" / "loram_plan.json", foreign)
    loram.recover(foreign, tmp_path / "out")


def test_recover_of_an_adapter_of_the_full_model_with_a_plan_copied_beside_it(run: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(run / "plain", tmp_path / "plain")
    shutil.copy(run / "pruned" / "loram_plan.json", plain)
    with pytest.raises(loram.UserError, match="not the plan that the adapter was trained with"):
        loram.recover(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Files of a model or an adapter

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.fixture(params=["prune", "train", "merge", "eval", "eval --stream"])
def attempt(request: pytest.FixtureRequest, run: Path, rows_file: Path, tmp_path: Path) -> Callable[[Path, str], None]:
    """`attempt(base, message)` checks that a stage refuses a base with this message and writes nothing."""
    out = tmp_path / "work" / "deep" / "out"
    out.parents[1].mkdir()

    def use(base: Path, message: str) -> None:
        calls: dict[str, Callable[[], Any]] = {
            "prune": lambda: loram.prune(base, out, ratio=0.5, criterion="magnitude", **LAYERS),
            "train": lambda: loram.train(base, out, data=rows_file, trainer=STEP),
            "merge": lambda: loram.merge(base, run / "plain", out),
            "eval": lambda: loram.evaluate(base, adapter=run / "plain", data=rows_file),
            "eval --stream": lambda: loram.evaluate(base, data=rows_file, stream=True),
        }
        with pytest.raises(loram.UserError, match=message) as caught:
            calls[request.param]()
        assert len(str(caught.value).splitlines()) == 1
        assert not list(out.parents[1].iterdir())

    return use


@pytest.fixture
def base(run: Path, tmp_path: Path) -> Path:
    """A sharded copy of the base."""
    folder = shutil.copytree(run / "base", tmp_path / "model")
    checkpoint = Checkpoint(run / "base")
    (folder / "model.safetensors").unlink()
    specs = {name: checkpoint.spec(name) for name in checkpoint.names()}
    with ShardedWriter(folder, specs, shard_bytes=60_000) as writer:
        for name in specs:
            writer.copy(name, checkpoint)
    return folder


SHARD = "model-00002-of-"
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda whole: whole[:-1], "not a whole safetensors file"),
    "cut in the header": (lambda whole: whole[:20], "not a whole safetensors file"),
    "empty": (lambda _: b"", "not a whole safetensors file"),
    "a byte too many": (lambda whole: whole + b"0", "not a whole safetensors file"),
    "pointer": (lambda _: POINTER, "a Git LFS pointer, not the file itself; run `git lfs pull`"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_shard_is_named_and_nothing_is_written(fault: str, base: Path, attempt: Any) -> None:
    change, message = BROKEN[fault]
    (shard,) = base.glob(f"{SHARD}*")
    shard.write_bytes(change(shard.read_bytes()))
    attempt(base, rf"{shard.name}: {message}")


def test_an_index_that_names_an_absent_shard(base: Path, attempt: Any) -> None:
    (shard,) = base.glob(f"{SHARD}*")
    shard.unlink()
    attempt(base, rf"{shard.name}: the shard is missing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_a_pointer_in_place_of_a_json_file(name: str, base: Path, attempt: Any) -> None:
    (base / name).write_bytes(POINTER)
    attempt(base, rf"{name}: a Git LFS pointer, not the file itself; run `git lfs pull`")


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def placed(shard: Any) -> Callable[[dict[str, Any]], Any]:
    """Change an index so that it names this file for the final norm."""
    return lambda index: {"weight_map": {**index["weight_map"], "model.norm.weight": shard}}


NOT_THERE = r"index\.json: says model\.x is in model-00001-of-\S+, but it is not there"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: {"weight_map": {**index["weight_map"], "model.x": min(index["weight_map"].values())}},
            NOT_THERE,
        ),
        (
            placed("../elsewhere.safetensors"),
            r"model\.norm\.weight is in \.\./elsewhere\.safetensors, which is outside",
        ),
        (placed("sub/../../elsewhere.safetensors"), "which is outside the folder"),
        (placed("/elsewhere.safetensors"), "which is outside the folder"),
        (placed("pytorch_model.bin"), r"pytorch_model\.bin, and only safetensors files are opened"),
        (placed(3), "not a valid shard index"),
        (lambda index: {"weight_map": [*index["weight_map"]]}, "not a valid shard index"),
        (lambda _: {}, "not a valid shard index"),
        (lambda _: [], "not a JSON object"),
    ],
    ids=["tensor", "parent", "parent of sub", "absolute", "pickled", "number", "list", "empty", "no object"],
)
def test_an_index_that_lies(change: Any, message: str, base: Path) -> None:
    shutil.copy(next(base.glob("*.safetensors")), base.parent / "elsewhere.safetensors")
    change_index(base, change)
    with pytest.raises(loram.UserError, match=message) as caught:
        Checkpoint(base)
    assert str(base) in str(caught.value)


def test_a_whole_file_beside_an_index_of_others_is_ambiguous(run: Path, base: Path, attempt: Any) -> None:
    shutil.copy(run / "base" / "model.safetensors", base)
    attempt(base, r"has both model\.safetensors and model\.safetensors\.index\.json")


class Bomb:
    """An object that makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[bytes, Path]:
    """A pickle that makes a folder when it is opened, and the path of that folder."""
    content, made = pickle.dumps(Bomb(tmp_path / "opened")), tmp_path / "opened"
    pickle.loads(content)
    made.rmdir()
    return content, made


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_by_name_and_never_opened(
    name: str, run: Path, attempt: Any, bomb: tuple[bytes, Path], tmp_path: Path
) -> None:
    content, made = bomb
    folder = shutil.copytree(run / "base", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    attempt(folder, rf"{name} is pickled and never opened: convert it to safetensors")
    assert not made.exists()


def test_pickled_weights_beside_safetensors_are_never_opened(
    run: Path, rows_file: Path, bomb: tuple[bytes, Path], tmp_path: Path
) -> None:
    content, made = bomb
    folder = shutil.copytree(run / "base", tmp_path / "model")
    adapter = shutil.copytree(run / "plain", tmp_path / "adapter")
    for path in (folder / "pytorch_model.bin", adapter / "adapter_model.bin", adapter / "training_args.bin"):
        path.write_bytes(content)
    loram.evaluate(folder, adapter=adapter, data=rows_file)
    assert not made.exists()


def test_a_pickled_adapter_is_refused_by_name_and_never_opened(
    run: Path, bomb: tuple[bytes, Path], tmp_path: Path
) -> None:
    content, made = bomb
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(content)
    for use in (lambda: loram.merge(run / "pruned", adapter, tmp_path / "out"), lambda: loram.recover(adapter, "out")):
        with pytest.raises(loram.UserError, match=r"adapter_model\.bin: pickled, so it is not opened"):
            use()
    assert not made.exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_in_place_of_an_adapter_s_file(name: str, run: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (adapter / name).write_bytes(POINTER)
    for use in (lambda: loram.merge(run / "pruned", adapter, tmp_path / "out"), lambda: loram.recover(adapter, "out")):
        with pytest.raises(loram.UserError, match=rf"{name}: a Git LFS pointer"):
            use()


def test_a_pointer_in_place_of_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(POINTER)
    with pytest.raises(loram.UserError, match=r"model\.gguf: a Git LFS pointer"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
