"""The page for those who come from other tools: LoRAM answers every name in it, and its recipe is one."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments, SFTConfig

from loram.base.names import in_recipe
from loram.run.recipe import Recipe, load_recipe

PAGE = (Path(__file__).parent.parent / "docs" / "how-to" / "migrate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)


def table() -> list[dict[str, list[str]]]:
    """The rows of the table of names: tool -> names."""
    lines = PAGE.partition("## Names\n\n")[2].partition("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [{tool: re.findall("`(.+?)`", cell) for tool, cell in zip(head, row, strict=True)} for row in rows]


ROWS = table()


@pytest.mark.parametrize("row", ROWS, ids=[row["LoRAM"][0] for row in ROWS])
def test_every_name_is_answered_with_ours(row: dict[str, list[str]]) -> None:
    (ours,) = row["LoRAM"]
    for name in (name for names in row.values() for name in names):
        answer = in_recipe(name.rpartition(".")[2], root=Recipe)
        assert answer is not None, name
        assert re.split("[:;]", answer)[0] == ours, name


def test_trl_has_the_names_in_its_column() -> None:
    tools = (ModelConfig, ScriptArguments, SFTConfig, DPOConfig, KTOConfig)
    names = {field.name for tool in tools for field in dataclasses.fields(tool)}
    assert {name for row in ROWS for name in row["TRL"]} <= names


def test_the_two_recipes_side_by_side_say_the_same(tmp_path: Path) -> None:
    lines = BLOCKS[0].splitlines()
    column = lines[0].index("# LoRAM")
    theirs = yaml.safe_load("\n".join(line[:column] for line in lines))
    (tmp_path / "mine.yaml").write_text("\n".join(line[column:] for line in lines))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.prune is not None
    for name in theirs.keys() - {"base_model", "datasets", "output_dir"}:  # ours are absolute paths
        here: Any = recipe.model_dump()
        for part in str(in_recipe(name, root=Recipe)).split("."):
            here = here[part]
        assert here == theirs[name], name
