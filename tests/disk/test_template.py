"""Chat templates that take the place of a folder's own."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE
from pydantic import ValidationError
from transformers import AutoTokenizer

import loram
from loram.disk.artifacts import find_manifest, verify
from loram.disk.template import read_template
from loram.run.dry_run import dry_run
from loram.run.pipeline import run
from loram.run.recipe import Recipe

MINE = CHAT_TEMPLATE.replace("<|im_end|>", "!<|im_end|>")
ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jinja"
    path.write_text(MINE, encoding="utf-8")
    return path


@pytest.fixture
def pruned(pruned_models: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(pruned_models["llama"], tmp_path / "pruned")


def template_in(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_a_chosen_template_is_in_the_rows_and_travels_with_the_adapter(
    mine: Path, pruned: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    own = loram.train(pruned, tmp_path / "own", data=rows_file, trainer=ONE_STEP)
    adapter = loram.train(pruned, tmp_path / "adapter", data=rows_file, trainer=ONE_STEP, chat_template=mine)
    before, after = find_manifest(own), find_manifest(adapter)
    assert before is not None
    assert after is not None
    assert before.made_from["rows"] != after.made_from["rows"]
    assert "chat_template" in after.settings
    assert "chat_template" not in before.settings
    loram.recover(adapter, tmp_path / "recovered")
    loram.merge(tiny_llama, tmp_path / "recovered", tmp_path / "merged")
    for folder in ("adapter", "recovered", "merged"):
        assert template_in(tmp_path / folder) == MINE
    loss = loram.evaluate(tiny_llama, data=rows_file, adapter=tmp_path / "recovered", chat_template=mine).loss
    assert loss == pytest.approx(loram.evaluate(tmp_path / "merged", data=rows_file).loss, rel=1e-5)
    other = loram.evaluate(tiny_llama, data=rows_file, adapter=tmp_path / "recovered").loss
    assert loss != pytest.approx(other, rel=1e-3)
    again = loram.train(pruned, tmp_path / "again", data=rows_file, trainer=ONE_STEP, chat_template=adapter)
    assert find_manifest(again).made_from["rows"] == after.made_from["rows"]  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"ratio": 0.5, "keep_first": 1, "keep_last": 1}, {"pattern": "4:8"}])
def test_prune_puts_a_chosen_template_into_its_folder(
    options: dict[str, Any], mine: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    loram.prune(tiny_llama, tmp_path / "out", criterion="magnitude", chat_template=mine, **options)
    assert template_in(tmp_path / "out") == MINE
    assert find_manifest(tmp_path / "out", edits=False) is not None


def test_every_stage_of_a_recipe_uses_its_template(
    mine: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "model_name_or_path": str(tiny_llama),
        "output_dir": tmp_path / "out",
        "dataset": str(rows_file),
        "eval_dataset": str(rows_file),
        "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
        "train": {"anchor_steps": 0, "trainer": ONE_STEP},
    }
    chosen = Recipe.model_validate({**values, "chat_template_path": str(mine)})
    assert any("!" in span.text for span in dry_run(chosen).examples[0])
    assert not any("!" in span.text for span in dry_run(Recipe.model_validate(values)).examples[0])
    report = run(chosen)
    base = loram.evaluate(tiny_llama, data=rows_file, chat_template=mine)
    assert report.row("base").perplexity["eval"] == base.perplexity
    assert template_in(tmp_path / "out" / "recovered") == MINE
    mine.write_text(MINE + "{# changed #}", encoding="utf-8")
    with pytest.raises(loram.UserError, match="pruned was made with other settings \\(chat_template"):
        run(chosen)
    with pytest.raises(loram.UserError, match="trainer: chat_template_path cannot be set: it is a key of the recipe"):
        dry_run(Recipe.model_validate({**values, "train": {"trainer": {"chat_template_path": str(mine)}}}))


def test_an_edited_template_is_used_with_one_warning(
    pruned: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pruned / "chat_template.jinja").write_text(MINE, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="loram"):
        loram.train(pruned, tmp_path / "adapter", data=rows_file, trainer=ONE_STEP)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("loram")] == [
        f"{pruned / 'chat_template.jinja'}: changed since the folder was written; it is used as it is now"
    ]
    assert template_in(tmp_path / "adapter") == MINE
    with pytest.raises(loram.UserError, match=r"chat_template\.jinja: .* the manifest says .*--chat-template"):
        verify(pruned)


def test_a_recipe_that_begins_with_an_edited_folder_uses_its_template_everywhere(
    pruned: Path, tiny_llama: Path, rows_file: Path, mine: Path, tmp_path: Path
) -> None:
    (pruned / "chat_template.jinja").write_text(MINE, encoding="utf-8")
    values = {"model_name_or_path": str(pruned), "output_dir": tmp_path / "out", "dataset": str(rows_file)}
    report = run(Recipe.model_validate({**values, "eval_dataset": str(rows_file), "train": {"trainer": ONE_STEP}}))
    expected = loram.evaluate(tiny_llama, data=rows_file, chat_template=mine).perplexity
    assert report.row("base").perplexity["eval"] == expected


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "loram_plan.json", "generation_config.json"])
def test_no_other_file_may_be_edited(name: str, pruned: Path, rows_file: Path, tmp_path: Path) -> None:
    path = pruned / name
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "chat_template": MINE}), encoding="utf-8")
    with pytest.raises(loram.UserError, match=f"{name}: .*make the folder again") as refused:
        loram.train(pruned, tmp_path / "adapter", data=rows_file, trainer=ONE_STEP)
    assert ("--chat-template" in str(refused.value)) == (name == "tokenizer_config.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jinja", "{% for m in messages %}\n{{ m.content }}\n{% endif %}", r"a\.jinja:3: not valid Jinja: .*endif"),
        ("a.jinja", "", r"a\.jinja: the chat template is empty"),
        ("a.json", "{}", r"a\.json: a chat template is a file \.jinja or \.j2"),
        ("a.jinja", b"\xff\xfe\xff", r"a\.jinja: cannot be read"),
    ],
    ids=["syntax", "empty", "suffix", "bytes"],
)
def test_templates_that_cannot_be_used_are_refused(name: str, text: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(loram.UserError, match=message):
        read_template(tmp_path / name)


def test_a_template_that_is_not_there_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    for source in (tmp_path / "none.jinja", "owner/none"):
        with pytest.raises(loram.UserError, match=r"none.*: no chat template file, and no tokenizer"):
            read_template(source)
    plain = tmp_path / "plain"
    tokenizer.save_pretrained(plain)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(loram.UserError, match="no tokenizer that has a template"):
        read_template(plain)
    with pytest.raises(ValidationError):
        Recipe.model_validate({"chat_template_path": 3})


def test_tags_that_only_transformers_knows_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "a.j2"
    path.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    assert "generation" in read_template(path)
