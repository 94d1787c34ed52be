"""Model cards, as huggingface_hub reads them."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard

import loram
from loram.disk.artifacts import CARD_NAME, find_manifest, verify
from loram.disk.card import Making, add_evaluation, shown, write_card
from loram.model.plan import PruningPlan

BASE_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
base_model: somebody/else
datasets: [somebody/pretraining]
---
# Tiny
"""


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind, made one from the other; the base has a card of its own."""
    root = tmp_path_factory.mktemp("cards")
    names = ("pruned", "aligned", "adapter", "recovered", "merged", "full", "further")
    made = {name: root / name for name in names}
    made["base"] = shutil.copytree(tiny_llama, root / "Tiny-1B")
    (made["base"] / CARD_NAME).write_text(BASE_CARD)
    once: dict[str, Any] = {"trainer": {"max_steps": 1, "gradient_accumulation_steps": 2}, "data": rows_file}
    loram.prune(made["base"], made["pruned"], ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    loram.align(made["pruned"], made["aligned"], data=[rows_file], probe=False, trainer={"max_steps": 1})
    loram.train(made["aligned"], made["adapter"], lora={"r": 12}, **once)
    loram.recover(made["adapter"], made["recovered"], base="acme/Tiny-1B")
    loram.recover(made["adapter"], root / "local")
    loram.merge(made["base"], root / "local", made["merged"])
    loram.train(made["base"], made["full"], method="full", **once)
    loram.train(made["base"], made["further"], adapter=root / "local", **once)
    return made


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / CARD_NAME)


def steps(folder: Path) -> list[str]:
    return re.findall(r"^1\. \*\*(.+?)\*\*", card(folder).text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "library", "tags", "title", "made"),
    [
        ("pruned", "transformers", ["loram", "pruned"], "Tiny-1B, pruned", ["Pruned"]),
        ("aligned", "transformers", ["loram", "pruned"], "Tiny-1B, pruned", ["Pruned", "Aligned"]),
        (
            *("adapter", "peft", ["lora", "loram", "pruned"], "LoRA adapter for a pruned Tiny-1B"),
            ["Pruned", "Aligned", "Trained"],
        ),
        (
            *("recovered", "peft", ["lora", "loram"], "LoRA adapter for Tiny-1B"),
            ["Pruned", "Aligned", "Trained", "Recovered"],
        ),
        (
            *("merged", "transformers", ["loram"], "Tiny-1B, fine-tuned"),
            ["Pruned", "Aligned", "Trained", "Recovered", "Merged"],
        ),
        ("full", "transformers", ["loram"], "Tiny-1B, fine-tuned", ["Trained"]),
        (
            *("further", "peft", ["lora", "loram"], "LoRA adapter for Tiny-1B"),
            ["Pruned", "Aligned", "Trained", "Recovered", "Trained further"],
        ),
    ],
)
def test_every_folder_has_a_card(
    name: str, library: str, tags: list[str], title: str, made: list[str], folders: dict[str, Path]
) -> None:
    data = card(folders[name]).data.to_dict()
    hub = {"base_model": "acme/Tiny-1B", "base_model_relation": "adapter"} if name == "recovered" else {}
    assert data == {
        **hub,
        "library_name": library,
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    assert card(folders[name]).text.strip().splitlines()[0] == f"# {title}"
    assert steps(folders[name]) == made


def test_a_card_tells_what_the_options_were_and_names_no_path(folders: dict[str, Path]) -> None:
    text = card(folders["recovered"]).text
    full, pruned = PruningPlan.load(folders["pruned"]).parameters()
    for fact in (
        f"{full:,} → {pruned:,} parameters",
        "ratio 0.5; criterion magnitude; the first 1 and the last 1 layers kept whole",
        "rank 12, alpha",
        "on 20 rows of `rows.jsonl`: 1 step, batch size 8, learning rate",
        'from_pretrained("acme/Tiny-1B")',
        "vllm serve acme/Tiny-1B --enable-lora --max-lora-rank 16 --lora-modules",
    ):
        assert fact in text
    assert "The card of acme/Tiny-1B gives the licence `other`" in text
    for folder in folders.values():
        assert str(folder.parent) not in (folder / CARD_NAME).read_text()


def test_the_code_in_a_card_loads_the_folder(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders["base"].parent)
    for name, base in (("adapter", "aligned"), ("merged", ""), ("pruned", "")):
        (code,) = re.findall(r"```python\n(.*?)```", card(folders[name]).text, re.DOTALL)
        if base:
            assert f'"{base}", trust_remote_code=True' in code
        scope: dict[str, Any] = {}
        exec(code.replace("FOLDER", name).replace(", trust_remote_code=True", ""), scope)
        assert scope["model"].num_parameters() > 0
        assert scope["tokenizer"].vocab_size > 0


def test_an_edited_card_is_nobodys_business(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["recovered"], tmp_path / "copy")
    before = find_manifest(copy)
    (copy / CARD_NAME).write_text("mine")
    assert find_manifest(copy, edits=False) == before
    verify(copy)
    add_evaluation(copy, "| 1 |", [], "tiny")
    assert (copy / CARD_NAME).read_text() == "mine"


def test_a_masked_update_is_merged_and_not_recovered(folders: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    loram.prune(folders["base"], tmp_path / "sparse", pattern="2:4", criterion="magnitude")
    once: dict[str, Any] = {"trainer": {"max_steps": 1}, "data": rows_file, "mask_update": True}
    loram.train(tmp_path / "sparse", tmp_path / "adapter", **once)
    assert "; pattern 2:4, ratio 0.5; criterion magnitude;" in card(tmp_path / "sparse").text
    text = card(tmp_path / "adapter").text
    assert "`loram merge` adds its masked update to Tiny-1B itself." in text
    assert "Merging:\n\n```\nloram merge Tiny-1B FOLDER merged\n```\n" in text
    assert "loram recover" not in text


@pytest.mark.parametrize("text", ["no metadata", "---\n- a list\n---\n", "---\na: [\n---\n", "\xff"])
def test_a_strange_card_of_the_base_gives_no_licence(text: str, folders: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(folders["base"], tmp_path / "base")
    (base / CARD_NAME).write_text(text, encoding="latin-1")
    loram.prune(base, tmp_path / "out", ratio=0.5, criterion="magnitude", keep_first=1, keep_last=1)
    assert card(tmp_path / "out").data.license is None
    assert "See the licence of base." in card(tmp_path / "out").text


def test_an_evaluation_goes_between_its_marks_and_into_the_metadata(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["recovered"], tmp_path / "copy")
    path = copy / CARD_NAME
    path.write_text(path.read_text().replace("## Licence", "My own words.\n\n## Licence"))
    before = path.read_text()
    result = EvalResult(
        task_type="text-generation", dataset_type="a", dataset_name="b", metric_type="perplexity", metric_value=1.5
    )
    for value in ("first", "second"):
        add_evaluation(copy, f"the {value} table", [result], "tiny")
    after = card(copy)
    assert after.data.eval_results == [result]
    assert "the second table" in after.text
    assert "first table" not in after.text
    assert re.sub(r"## Evaluation\n\n.*\n", "", after.text) == ModelCard(before).text
    stamp = path.stat().st_mtime_ns
    add_evaluation(copy, "the second table", [result], "tiny")
    assert path.stat().st_mtime_ns == stamp
    assert steps(copy) == steps(folders["recovered"])


def test_data_sets_on_the_hub_are_named_and_go_on_to_later_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    first = shutil.copytree(folders["recovered"], tmp_path / "first")
    second = shutil.copytree(folders["recovered"], tmp_path / "second")
    data = ["acme/rows", "/home/me/rows.jsonl"]
    write_card(first, Making(kind="recovered", step="**Trained**.", model="acme/Tiny-1B", datasets=data))
    making = Making(kind="recovered", step="**Again**.", model="acme/Tiny-1B", datasets=["acme/a"], parents=[first])
    write_card(second, making)
    assert card(first).data.datasets == ["acme/rows"]
    assert card(second).data.datasets == ["acme/a", "acme/rows"]
    assert steps(second) == ["Pruned", "Trained", "Again"]


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown("owner/name") == "owner/name"
    assert shown("/home/me/models/tiny.gguf") == "tiny.gguf"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shown("owner/name") == "name"
