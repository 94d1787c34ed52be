"""A folder to start from: the recipes of this package with the model of a user, and the data that they name."""

import json
import tempfile
from pathlib import Path

from loram.base.paths import named
from loram.disk.artifacts import check_output
from loram.recipes.word_problems import write_problems

HERE = Path(__file__).parent
MODEL, DATA = "models/SmolLM2-135M-Instruct", "data/word_problems"  # what the recipes name


def write_start(out: str | Path, model: str) -> Path:
    """Write `recipes/*.yaml` and the data that they name into a new folder, which appears whole or not at all.

    The folder has no manifest, because its files are there to be changed.

    Args:
        out: the folder to make.
        model: the hub id, folder or .gguf file that the recipes shall name; it is not opened.

    Returns:
        The absolute path of `out`.

    Raises:
        UserError: `out` exists already or cannot be made.
    """
    out = check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
        folder = Path(staging) / out.name
        write_problems(folder / DATA)
        (folder / "recipes").mkdir()
        for recipe in HERE.glob("*.yaml"):
            text = recipe.read_text(encoding="utf-8").replace(MODEL, json.dumps(named(model)))  # JSON is YAML
            (folder / "recipes" / recipe.name).write_text(text, encoding="utf-8")
        folder.rename(out)
    return out
