"""Comparing: every variant on the same data, judged on the full model, in one table."""

import json
from pathlib import Path
from typing import Any

import pytest

import loram
from loram.run.compare import JSON_NAME, PLOT_NAME, TABLE_NAME, compare, variant_of
from loram.run.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "loram" / "recipes"


@pytest.fixture
def values(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_llama),
        "output_dir": tmp_path / "run",
        "dataset": str(rows_file),
        "eval_dataset": {"path": str(rows_file), "max_samples": 4},
        "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
        "train": {"lora": {"r": 2}, "trainer": {"max_steps": 2, "learning_rate": 1e-2}},
        "compare": {
            "LISA": {"base": "full", "train": {"method": "lisa", "lora": None}},
            "LoRAM, polished?": {"train": {"method": "lora-fa"}},
        },
    }


def test_variants_are_run_judged_and_put_in_one_table(values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    rows = compare(recipe)
    assert [(row.name, row.on, row.method) for row in rows[1:]] == [
        ("LISA", "full", "lisa"),
        ("LoRAM, polished?", "pruned", "lora-fa"),
    ]
    untuned, lisa, pruned = rows
    expected = loram.evaluate(values["model_name_or_path"], data=values["eval_dataset"]["path"], max_samples=4)
    assert untuned.perplexity["eval"] == pytest.approx(expected.perplexity)
    assert all(row.perplexity["eval"] < untuned.perplexity["eval"] for row in rows[1:])
    assert pruned.optimizer_bytes == 8 * pruned.trained  # AdamW's two moments in float32
    assert lisa.trained > pruned.trained > 0
    assert all(row.peak_memory > 1e8 for row in rows[1:])
    out = recipe.output_dir
    assert [row["name"] for row in json.loads((out / JSON_NAME).read_text())] == [row.name for row in rows]
    assert len((out / TABLE_NAME).read_text().splitlines()) == 2 + len(rows)
    assert (out / PLOT_NAME).stat().st_size > 1000
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*") if path.is_file()}
    assert compare(recipe) == rows
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # nothing was made again


def test_a_variant_lies_over_the_recipe(values: dict[str, Any]) -> None:
    values["compare"] = {
        "a/b": {"train": {"lora": {"lora_alpha": 4}, "load_in_4bit": True}, "prune": {"criterion": None}}
    }
    recipe = Recipe.model_validate(values)
    variant = variant_of(recipe, "a/b")
    assert variant.train.lora == {"r": 2, "lora_alpha": 4}
    assert variant.train.load_in_4bit
    assert variant.prune is not None
    assert variant.prune.resolved().criterion == "taylor"
    assert variant.output_dir == recipe.output_dir / "a_b"
    assert not variant.compare


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": {}}, "compare: missing"),
        ({"prune": None}, "compare: needs `dataset` and `prune`"),
        ({"compare": {"x": {"train": {"methud": "lora"}}}}, "compare.x: .*methud"),
        ({"compare": {"x": {"train": {"method": "lore"}}}}, "compare.x: .*lore"),
    ],
)
def test_what_cannot_be_compared_is_refused(values: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(loram.UserError, match=message):
        compare(Recipe.model_validate(values | changes))
    assert not values["output_dir"].exists()


def test_the_recipe_in_the_repository_is_valid() -> None:
    recipe = load_recipe(RECIPES / "compare.yaml", [])
    assert {variant_of(recipe, name).train.method for name in recipe.compare} == {
        "lora",
        "lora-fa",
        "lora-sp",
        "lisa",
        "full",
    }
