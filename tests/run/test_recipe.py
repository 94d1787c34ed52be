"""Recipes: read, overridden, and refused with the nearest known key."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loram.base.errors import UserError
from loram.data.spec import DataSpec, WeightedSpec
from loram.run.recipe import Recipe, file_digest, load_recipe

GOOD = """
model_name_or_path: some/model
output_dir: runs/x
dataset: train.jsonl
eval_dataset: test.jsonl
prune: {ratio: 0.5}
train:
  lora: {r: 8}
  trainer: {learning_rate: 1e-3, max_steps: 50}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def load(text: str = GOOD, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, list(overrides))

    return load


def test_a_good_recipe_and_its_defaults(recipe: Any) -> None:
    loaded = recipe()
    assert loaded.train.trainer == {"learning_rate": 0.001, "max_steps": 50}  # 1e-3 is a number, as in YAML 1.2
    assert loaded.dataset == (WeightedSpec(path="train.jsonl"),)
    assert loaded.eval_dataset == {"eval": DataSpec(path="test.jsonl")}
    pruning = loaded.prune.resolved()
    assert (loaded.seed, pruning.criterion, pruning.keep_first, pruning.keep_last) == (42, "taylor", 4, 2)


def test_the_quickstart_is_a_good_recipe() -> None:
    assert load_recipe(Path(__file__).parents[2] / "loram" / "recipes" / "quickstart.yaml").prune.ratio == 0.5


def test_a_dora_adapter_is_not_polished(recipe: Any) -> None:
    text = "model_name_or_path: m\noutput_dir: o\nprune: {ratio: 0.5}\ndataset: a\neval_dataset: b\npolish: {}\n"
    assert recipe(text).polish is not None
    with pytest.raises(UserError, match="set polish: null"):
        recipe(text, "train.method=dora")
    assert recipe(text, "train.method=dora", "polish=null").polish is None


def test_parts_of_a_run(recipe: Any) -> None:
    publisher = "model_name_or_path: m\noutput_dir: o\nprune: {ratio: 0.5}\nalign: {dataset: a.jsonl}\nteach: {}\n"
    found = recipe(publisher)
    assert (found.dataset, found.eval_dataset, found.teach.top_k) == ((), {}, 64)
    assert found.align.dataset == (WeightedSpec(path="a.jsonl"),)
    several = recipe(publisher, "dataset=[{path: a.csv, weight: 2}, {path: b.txt, weight: 1}]")
    assert [spec.weight for spec in several.dataset] == [2, 1]
    mixed = recipe(publisher, "align.dataset=[{path: a.csv, weight: 0.7}, {path: b.txt, weight: 0.3}]")
    assert [spec.weight for spec in mixed.align.dataset] == [0.7, 0.3]
    user = recipe("model_name_or_path: p\nbase_model_name_or_path: m\noutput_dir: o\ndataset: a\neval_dataset: b\n")
    assert (user.prune, user.align) == (None, None)


@pytest.mark.parametrize("name", ["publisher", "user"])
def test_the_recipes_of_two_machines_are_good(name: str) -> None:
    loaded = load_recipe(Path(__file__).parents[2] / "loram" / "recipes" / f"{name}.yaml")
    assert (loaded.prune is None, loaded.align is None, not loaded.dataset) == (
        (name == "user",) * 2 + (name != "user",)
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("align.objectve=clm", r"align\.objectve: unknown key; did you mean objective"),
        ("align.objective=kl", r"align\.objective: Input should be 'distill'"),
        ("align.dataset={path: a, wight: 1}", r"align\.dataset\.0\.wight: unknown key; did you mean weight"),
        ("align.dataset=[{path: a, weight: 1}, b]", "dataset: give every one a weight, or none"),
        ("dataset=[{path: a, weight: 1}, b]", "dataset: give every one a weight, or none"),
        ("align.lr=1", r"align\.lr: unknown key; here it is called align\.trainer\.learning_rate"),
        ("align.teacher=x", "the rows come from the teacher's folder; drop one"),
        ("teach.top_k=0", r"teach\.top_k: "),
        ("align.objective=clm", "teach: needs an `align` section"),
        ("base_model_name_or_path=x", "with `prune`, model_name_or_path is the full model"),
        ("train.method=lora", "dataset: missing, and training needs rows"),
        ("evaluate.full_lora=true", "dataset: missing, and training needs rows"),
    ],
)
def test_parts_that_do_not_fit(override: str, message: str, recipe: Any) -> None:
    parts = "model_name_or_path: m\noutput_dir: o\nprune: {ratio: 0.5}\nalign: {dataset: a.jsonl}\nteach: {}\n"
    with pytest.raises(UserError, match=message):
        recipe(parts, override)
    with pytest.raises(UserError, match="at least one is needed, else there is nothing to do"):
        recipe("model_name_or_path: m\noutput_dir: o\n")


def test_overrides(recipe: Any) -> None:
    found = recipe(
        GOOD, "prune.ratio=0.65", "train.trainer.learning_rate=2e-4", "train.lora.r=16", "evaluate.full_lora=true"
    )
    assert (found.prune.ratio, found.train.lora["r"], found.evaluate.full_lora) == (0.65, 16, True)
    assert found.train.trainer == {"learning_rate": 0.0002, "max_steps": 50}


def test_eval_dataset_forms(recipe: Any) -> None:
    one = recipe(GOOD, "eval_dataset={path: a.csv, max_samples: 3}")
    assert one.eval_dataset == {"eval": DataSpec(path="a.csv", max_samples=3)}
    two = recipe(GOOD, "eval_dataset={task: a.csv, text: {path: b.txt}}")
    assert two.eval_dataset == {"task": DataSpec(path="a.csv"), "text": DataSpec(path="b.txt")}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modl=1", "modl: unknown key; known are model_name_or_path"),
        ("model_name_or_pth=x", "did you mean model_name_or_path"),
        ("prune.ration=0.5", r"prune\.ration: unknown key; did you mean ratio"),
        ("prune.keep_frist=1", "did you mean keep_first"),
        ("evaluate.max_sample=1", "did you mean max_samples"),
        ("dataset={path: a, colums: {}}", "did you mean columns"),
        ("prune.ratio=1.0", r"prune\.ratio: Input should be less than 1"),
        ("prune.ratio=0", r"prune\.ratio: Input should be greater than 0"),
        ("prune.ratio=half", r"prune\.ratio: .*found 'half'"),
        ("seed=x", "seed: "),
        ("prune=3", "prune: "),
        ("eval_dataset=3", "eval_dataset: "),
        ("prune.ratio.x=1", "ratio is not a section"),
        ("eval_dataset={test: {path: a, spilt: b}}", r"eval_dataset\.test\.spilt: unknown key; did you mean split"),
        ("prune.calibration={pth: a}", r"prune\.calibration\."),
        ("prune.ratio=.nan", r"prune\.ratio: "),
        ("prune.ratio=-0.5", r"prune\.ratio: Input should be greater than 0"),
        ("evaluate.max_length=0", r"evaluate\.max_length: "),
        ("output_dir=", "output_dir: "),
        ("dataset=[a, 3]", r"dataset\.1: "),
        ("dataset.max_samples=3", "dataset is not a section"),
        ("novalue", "should be key=value"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_bad_overrides_name_the_key(override: str, message: str, recipe: Any) -> None:
    with pytest.raises(UserError, match=message):
        recipe(GOOD, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "seed: 1\nseed: 2\n", r"recipe\.yaml:\d+: not valid YAML: key 'seed' stands twice"),
        ("a: [1\nb: 2\n", r"recipe\.yaml:\d+: not valid YAML"),
        ("just text", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        (GOOD.replace("dataset: train.jsonl\n", ""), "dataset: missing, and training needs rows"),
        ("? [a, b]\n: 1\n", "recipe"),
    ],
    ids=["twice", "yaml", "text", "empty", "missing", "list-key"],
)
def test_bad_files(text: str, message: str, recipe: Any) -> None:
    with pytest.raises(UserError, match=message):
        recipe(text)


# what YAML's own constructors reject with all kinds of exceptions
BAD_SCALARS = ["2020-13-45", "0x_", "0b_", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!map x", "9" * 5000]


@pytest.mark.parametrize("scalar", BAD_SCALARS, ids=lambda scalar: scalar[:12])
def test_bad_scalars_name_the_line_or_the_override(scalar: str, recipe: Any) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml(:\d+)?: not valid YAML"):
        recipe(GOOD + f"seed: {scalar}\n")
    with pytest.raises(UserError, match=r"override 'seed=.*not valid YAML"):
        recipe(GOOD, f"seed={scalar}")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: caf\xe9\n", b"[" * 1000], ids=["utf-16", "latin-1", "deep"])
def test_unreadable_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base_model=x", "base_model: unknown key; here it is called model_name_or_path"),
        ("lora_rank=8", "lora_rank: unknown key; here it is called train.lora.r"),
        ("train.lora_target=[q_proj]", "train.lora_target: unknown key; here it is called train.lora.target_modules"),
        ("micro_batch_size=1", "here it is called train.trainer.per_device_train_batch_size"),
        ("learning_rate=1e-3", "learning_rate: unknown key; here it is called train.trainer.learning_rate"),
        ("train.gradient_checkpointing=true", "here it is called train.trainer.gradient_checkpointing"),
        ("warmup_ratio=0.1", "here it is called train.trainer.warmup_steps; a value below 1 is a share of all steps"),
        ("datasets=[]", "here it is called dataset"),
        ("test_datasets=[]", "here it is called eval_dataset"),
        ("adapter=lora", "here it is called train.method"),
        ("train.finetuning_type=lora", "train.finetuning_type: unknown key; here it is called method"),
        ("prune.sparsity=0.5", "prune.sparsity: unknown key; here it is called ratio"),
        ("ratio=0.5", "ratio: unknown key; here it is called prune.ratio"),
        ("evaluate.cutoff_len=64", "evaluate.cutoff_len: unknown key; here it is called max_length"),
        (
            "dataset={path: a, max_seq_length: 64}",
            "dataset.0.max_seq_length: unknown key; here it is called max_length",
        ),
        ("dataset={path: a, data_path: b}", "dataset.0.data_path: unknown key; did you mean path?"),
    ],
)
def test_names_of_other_tools_are_answered_with_ours(override: str, message: str, recipe: Any) -> None:
    with pytest.raises(UserError) as caught:
        recipe(GOOD, override)
    assert str(caught.value).endswith(message)


def test_an_unknown_key_is_named_before_what_is_missing(recipe: Any) -> None:
    with pytest.raises(UserError, match="base_model: unknown key; here it is called model_name_or_path"):
        recipe(GOOD.replace("model_name_or_path", "base_model"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*Recipe.model_fields, "prune.ratio", "dataset.path", "x"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(KEYS, JSON, max_size=4))
def test_any_content_gives_a_recipe_or_a_clear_error(changes: dict[str, Any], recipe: Any) -> None:
    values = {**yaml.safe_load(GOOD), **changes}
    with contextlib.suppress(UserError):
        assert isinstance(recipe(yaml.safe_dump(values)), Recipe)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text_gives_a_clear_error(text: str, recipe: Any) -> None:
    with pytest.raises(UserError):
        recipe(text.encode("utf-8", "ignore").decode())


FRAGMENTS = [*BAD_SCALARS[:8], *"a[]{},\n", "seed", ": ", "  ", "- ", "? ", "&a ", "*a", "<<", "1e3"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
def test_any_yaml_after_a_good_recipe_gives_a_recipe_or_a_clear_error(text: str, recipe: Any) -> None:
    for content, overrides in ((GOOD + text, ()), (GOOD, (f"train.lora.x={text}",))):
        with contextlib.suppress(UserError):
            assert isinstance(recipe(content, *overrides), Recipe)


def test_file_digest_follows_content_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("one")
    first = file_digest(DataSpec(path=str(path)))
    assert first == file_digest(DataSpec(path=str(path)))
    assert file_digest(DataSpec(path="org/name")) == "org/name"
    path.write_text("two")
    assert first != file_digest(DataSpec(path=str(path)))
