"""Rows of preferences are known by their columns, and become two tokenised answers, or one with a label."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loram.base.errors import UserError
from loram.data.spec import DataSpec, Kind
from loram.data.tokens import load_rows, load_tokens

ASK = {"role": "user", "content": "What is 1 plus 2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("1 plus 2 is 3.", "I do not know."))
Write = Callable[..., Path]


def tokens(path: Path, tokenizer: Any, kind: Kind = "pairs", **options: Any) -> Any:
    spec = DataSpec(path=str(path), **options)
    return load_tokens(spec, tokenizer, 64, vocabulary=400, kinds=(kind,))


def texts(row: dict[str, list[int]], tokenizer: Any, prefix: str = "") -> tuple[str, str]:
    """The whole text of an answer with its prompt, and the part that is in the loss."""
    ids, labels = row[f"{prefix}input_ids"], row[f"{prefix}labels"]
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label >= 0])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": ASK["content"], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"question": ASK["content"], "good": GOOD["content"], "bad": BAD["content"]},
    ],
    ids=["texts", "messages", "implicit prompt", "text beside conversations", "named columns"],
)
def test_every_form_of_a_pair_gives_the_same_tokens(row: dict[str, Any], jsonl: Write, tokenizer: Any) -> None:
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"} if "good" in row else {}
    encoded = tokens(jsonl(row), tokenizer, columns=columns).rows[0]
    whole, loss = texts(encoded, tokenizer)
    assert ASK["content"] in whole
    assert loss == "1 plus 2 is 3.<|im_end|>\n"
    whole, loss = texts(encoded, tokenizer, "rejected_")
    assert ASK["content"] in whole
    assert loss == "I do not know.<|im_end|>\n"


def test_a_text_that_begins_with_its_prompt_stays_as_it_is_written(jsonl: Write, tokenizer: Any) -> None:
    row = {"chosen": "Human: 1 plus 2? AI: It is 3.", "rejected": "Human: 1 plus 2? AI: It may be 4."}
    encoded = tokens(jsonl(row), tokenizer).rows[0]
    assert texts(encoded, tokenizer) == ("Human: 1 plus 2? AI: It is 3.<|im_end|>", " is 3.<|im_end|>")
    assert texts(encoded, tokenizer, "rejected_")[1] == " may be 4.<|im_end|>"


@pytest.mark.parametrize("label", [True, 1, "True"])
def test_an_answer_with_a_label(label: Any, jsonl: Write, tokenizer: Any) -> None:
    row = {"prompt": [ASK], "completion": [GOOD], "label": label}
    encoded = tokens(jsonl(row, {**row, "label": False}), tokenizer, "labels").rows
    assert encoded["desirable"][:] == [True, False]
    assert texts(encoded[0], tokenizer)[1].startswith("1 plus 2 is 3.")


def test_a_pair_without_a_preference_is_skipped(jsonl: Write, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "1 plus 2?", "chosen": "3", "rejected": "4"}
    encoded = tokens(jsonl(row, {**row, "rejected": "3"}, {**row, "chosen": None}, row), tokenizer)
    assert (len(encoded.rows), encoded.skipped, list(encoded.sources)) == (2, 2, [0, 3])
    assert "2 were skipped because an answer had no token in the loss, or both were the same" in caplog.text


PAIR = {"prompt": "1 plus 2?", "chosen": "3", "rejected": "4"}
PLAIN = {"prompt": "1 plus 2?", "completion": "3"}
CONVERSATION = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("text", PAIR, "data.jsonl: has prompt and chosen and rejected, which methods dpo and orpo can read"),
        ("text", {**PLAIN, "label": True}, "data.jsonl:1: has a label, .* only method kto reads"),
        (
            "pairs",
            PLAIN,
            "data.jsonl: has prompt and completion, which every method .* should have chosen and rejected",
        ),
        ("pairs", {"question": "1 plus 2?", "answer": "3"}, "data.jsonl: has question and answer, which every method"),
        ("pairs", {"prompt": "1 plus 2?", "a": "3"}, "data.jsonl: cannot tell .* expected chosen and rejected"),
        ("labels", PAIR, "data.jsonl: has prompt and chosen and rejected, .* should have prompt, completion and label"),
        ("labels", {**PLAIN, "label": "good"}, "data.jsonl:1: 'label' should be true or false, but is 'good'"),
        ("pairs", {**PAIR, "rejected": 4}, "data.jsonl:1: 'rejected' should be text or a list of messages, but is 4"),
        ("pairs", {**PAIR, "rejected": [BAD]}, "data.jsonl:1: prompt and rejected should both be text or both be"),
        ("pairs", {**CONVERSATION, "rejected": "4"}, "data.jsonl:1: chosen and rejected should both be text or both"),
        ("pairs", {"chosen": [ASK, GOOD], "rejected": [BAD]}, "data.jsonl:1: .* do not begin with the same prompt"),
    ],
)
def test_rows_that_cannot_be_used(kind: Kind, row: dict[str, Any], message: str, jsonl: Write) -> None:
    with pytest.raises(UserError, match=message):
        list(load_rows(DataSpec(path=str(jsonl(row))), (kind,)))


def test_a_row_without_an_answer_is_named(jsonl: Write) -> None:
    with pytest.raises(UserError, match=r"data.jsonl:2: there is no 'rejected'"):
        list(load_rows(DataSpec(path=str(jsonl(PAIR, {"prompt": "a", "chosen": "b"}))), ("pairs",)))
