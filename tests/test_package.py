"""The wheel: built from the source archive, it has every file of the package, and works where there is no clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import loram
from loram.recipes.start import MODEL, write_start

ROOT = Path(__file__).parent.parent
SOURCES = ("loram", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "constraints.txt")


def python(code: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """Run Python in a folder and return what it prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked; it is built in a copy, because a build leaves files."""
    clean, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("sdist")
    for source in map(ROOT.joinpath, SOURCES):
        if source.is_dir():
            shutil.copytree(source, clean / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, clean)
    python("import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])", str(out), cwd=clean)
    shutil.unpack_archive(next(out.glob("*.tar.gz")), out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    out = tmp_path_factory.mktemp("wheel")
    python("import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])", str(out), cwd=sdist)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    assert files(wheel / "loram") == files(ROOT / "loram")
    assert sorted(path.name.partition("-")[0] for path in wheel.iterdir()) == ["loram", "loram"]  # and no tests


def test_the_metadata_says_what_it_is_and_whose(wheel: Path, sdist: Path) -> None:
    (information,) = wheel.glob("*.dist-info")
    metadata = (information / "METADATA").read_text(encoding="utf-8")
    head, _, description = metadata.partition("\n\n")
    assert description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert "Description-Content-Type: text/markdown" in head
    assert "License-Expression: Apache-2.0" in head
    assert (information / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "loram = loram.cli:main" in (information / "entry_points.txt").read_text(encoding="utf-8")
    assert (sdist / "constraints.txt").exists()


def test_the_wheel_works_without_a_clone(wheel: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Calibration text, code that travels with a pruned model, the card's template and the recipes are read from it."""
    place = "import loram; print(loram.__file__)"
    assert Path(python(place, cwd=tmp_path, PYTHONPATH=str(wheel)).strip()).is_relative_to(wheel)

    def command(*line: str) -> str:
        run = "from loram.cli import main; main()"
        return python(run, *line, cwd=tmp_path, PYTHONPATH=str(wheel))

    shutil.copy(tiny_llama / "config.json", tmp_path)
    half, few = ("--ratio", "0.5", "--keep-first", "2", "--keep-last", "1"), ("--calibration-samples", "4")
    assert "parameters" in command("estimate", "config.json", *half)
    assert "fewer" in command("prune", str(tiny_llama), "pruned", *half, *few)
    assert {"modeling_loram.py", "README.md"} <= {path.name for path in (tmp_path / "pruned").iterdir()}
    command("init", "start")
    assert (tmp_path / "start" / "recipes" / "quickstart.yaml").exists()


def test_a_folder_to_start_from_has_every_recipe_with_the_users_model(tmp_path: Path, tiny_llama: Path) -> None:
    start = write_start(tmp_path / "start", str(tiny_llama))
    recipes = {path.name: path for path in (start / "recipes").iterdir()}
    assert recipes.keys() == {path.name for path in (ROOT / "loram" / "recipes").glob("*.yaml")}
    for name, path in recipes.items():
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = recipe["model_name_or_path"]
        assert model == ("runs/publisher/aligned" if name == "user.yaml" else str(tiny_llama))
        for data in (recipe.get("dataset"), recipe.get("eval_dataset")):
            assert data is None or (start / data).exists()
        assert MODEL not in path.read_text(encoding="utf-8")
    with pytest.raises(loram.UserError, match="exists already"):
        write_start(start, str(tiny_llama))
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
