"""Rows of every form, the loss mask, and errors that name file and row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

from loram.data import IGNORED, load_rows, tokenize
from loram.data_spec import DataSpec
from loram.errors import UserError

Jsonl = Callable[..., Path]
ASK, REPLY = "what is one plus one", "one plus one is two"
CHAT = [{"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY}]
PROMPT_TEXT = f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n"


def labelled(path: Path, tokenizer: Any, max_length: int = 500, **options: Any) -> list[tuple[str, str]]:
    """(text outside the loss, text in the loss) of every row."""
    rows = tokenize(load_rows(DataSpec(path=str(path), **options)), tokenizer, max_length).rows
    result = []
    for row in rows:
        pairs = list(zip(row["input_ids"], row["labels"], strict=True))
        assert all(label in (IGNORED, token) for token, label in pairs)
        texts = [tokenizer.decode([t for t, label in pairs if (label == IGNORED) is out]) for out in (True, False)]
        result.append((texts[0], texts[1]))
    return result


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": REPLY}]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"question": ASK, "answer": REPLY},
        {"instruction": ASK, "output": REPLY},
        {"instruction": ASK, "input": "", "output": REPLY, "extra": 1},
    ],
    ids=lambda row: "-".join(row),
)
def test_every_kind_of_chat_has_the_reply_and_its_end_in_the_loss(
    row: dict[str, Any], jsonl: Jsonl, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # and the end of the turn is in the loss all the same
    assert labelled(jsonl(row), tokenizer) == [(PROMPT_TEXT, f"{REPLY}<|im_end|>\n")]


def test_alpaca_input_follows_the_instruction(jsonl: Jsonl, tokenizer: PreTrainedTokenizerFast) -> None:
    [(prompt, _)] = labelled(jsonl({"instruction": "say", "input": "a word", "output": REPLY}), tokenizer)
    assert "user\nsay\n\na word<|im_end|>" in prompt


def test_plain_prompt_and_completion(jsonl: Jsonl, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl({"prompt": f"{ASK}:", "completion": f" {REPLY}"})
    assert labelled(path, tokenizer) == [(f"{ASK}:", f" {REPLY}<|im_end|>")]


def test_every_assistant_turn_of_messages_is_in_the_loss(jsonl: Jsonl, tokenizer: PreTrainedTokenizerFast) -> None:
    second = [{"role": "user", "content": "and two"}, {"role": "assistant", "content": "four"}]
    [(outside, inside)] = labelled(jsonl({"messages": [*CHAT, *second]}), tokenizer)
    assert inside == f"{REPLY}<|im_end|>\nfour<|im_end|>\n"
    assert "and two" in outside
    # of a prompt-completion row the earlier turns are prompt
    [(_, inside)] = labelled(jsonl({"prompt": [*CHAT, second[0]], "completion": [second[1]]}), tokenizer)
    assert inside == "four<|im_end|>\n"


def test_without_a_chat_template_questions_are_plain_and_chats_refused(jsonl: Jsonl, tokenizer: Any) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>")
    [(prompt, completion)] = labelled(jsonl({"question": ASK, "answer": REPLY}), plain)
    assert (prompt, completion) == (f"Question: {ASK}\nAnswer:", f" {REPLY}<|im_end|>")
    [(prompt, _)] = labelled(jsonl({"instruction": ASK, "output": REPLY}), plain)
    assert prompt.endswith("### Response:")
    with pytest.raises(UserError, match="row 1 is a chat, but the tokenizer has no chat template"):
        labelled(jsonl({"messages": CHAT}), plain)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_formats(suffix: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / f"rows.{suffix}"
    frame = pd.DataFrame([{"question": ASK, "answer": REPLY}] * 2)
    writers: dict[str, Callable[[], Any]] = {
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: frame.to_json(path, orient="records"),
        "csv": lambda: frame.to_csv(path, index=False),
        "tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        "parquet": lambda: frame.to_parquet(path),
    }
    writers[suffix]()
    assert labelled(path, tokenizer) == [(PROMPT_TEXT, f"{REPLY}<|im_end|>\n")] * 2


def test_text_is_cut_into_pieces_that_make_the_whole(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one plus two is three\n\n" * 30)
    rows = tokenize(load_rows(DataSpec(path=str(path))), tokenizer, 32).rows
    ids = [token for row in rows for token in row["input_ids"]]
    assert tokenizer.decode(ids) == path.read_text() + "<|im_end|>"
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert [len(length) for length in rows["input_ids"][:-1]] == [32] * (len(rows) - 1)


def test_columns_by_name_and_max_samples(jsonl: Jsonl, tokenizer: Any) -> None:
    path = jsonl(*[{"ask": ASK, "reply": f" {n}", "text": "no"} for n in ("one", "two", "three")])
    found = labelled(path, tokenizer, columns={"prompt": "ask", "completion": "reply"}, max_samples=2)
    assert found == [(ASK, " one<|im_end|>"), (ASK, " two<|im_end|>")]


def test_truncated_and_skipped_rows_are_counted(jsonl: Jsonl, tokenizer: Any) -> None:
    long = "one plus one is two and " * 20
    path = jsonl(
        {"prompt": ASK, "completion": " two"},
        {"prompt": ASK, "completion": long},
        {"prompt": long, "completion": " two"},
    )
    tokens = tokenize(load_rows(DataSpec(path=str(path))), tokenizer, 40)
    assert (len(tokens.rows), tokens.truncated, tokens.skipped) == (2, 2, 1)
    assert max(map(len, tokens.rows["input_ids"])) == 40


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_labels_are_those_that_trl_makes(jsonl: Jsonl, tokenizer: Any, tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = load_rows(DataSpec(path=str(jsonl({"question": ASK, "answer": REPLY}, {"question": "a", "answer": "b"}))))
    ours = tokenize(rows, tokenizer, 100).rows
    arguments = SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=100)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        arguments,
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    assert trainer.train_dataset["input_ids"][:] == ours["input_ids"][:]
    assert trainer.train_dataset["labels"][:] == ours["labels"][:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"rows\.jsonl: the data set is empty"),
        ('{"question": "a", "answer": "b"}\n{"question": "a", ', r"rows\.jsonl:2: this row is not valid JSON"),
        ('{"question": "a", "answer": "b"}\n[1, 2]\n', r"rows\.jsonl:2: this row is not a JSON object"),
        ('{"question": "a", "answer": "b"}\n{"question": "a", "answer": null}\n', r"row 2: 'answer' is None"),
        (
            '{"question": "a", "answer": "b"}\n{"question": "", "answer": "b"}\n',
            r"row 2: 'question' is '', where text is needed",
        ),
        ('{"question": "a", "answer": 7}\n', r"row 1: 'answer' should be text, but is 7"),
        ('{"foo": "a", "bar": 7}\n', r"cannot tell which columns to use from foo, bar"),
        ('{"messages": [{"role": "user"}]}\n', r"row 1: a message needs a role and a content"),
    ],
    ids=["empty", "broken", "no-object", "null", "blank", "number", "columns", "message"],
)
def test_errors_name_file_and_row(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_rows(DataSpec(path=str(path)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"path": "/nowhere/rows.jsonl"}, "/nowhere/rows.jsonl: no such file"),
        ({"path": "data.xlsx"}, "unknown kind of data file"),
        ({"path": "rows.jsonl", "columns": {"text": "body"}}, "no column 'body' for text; there are question, answer"),
        ({"path": "rows.jsonl", "columns": {"prompt": "question"}}, "both prompt and completion"),
    ],
    ids=["missing", "suffix", "column", "half"],
)
def test_bad_specs(spec: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    (tmp_path / "data.xlsx").touch()
    with pytest.raises(UserError, match=message):
        load_rows(DataSpec(**spec))


def test_nothing_in_the_loss_is_an_error(jsonl: Jsonl, tokenizer: Any) -> None:
    rows = load_rows(DataSpec(path=str(jsonl({"question": ASK, "answer": REPLY}))))
    with pytest.raises(UserError, match="no token of any row is in the loss within max_length 5"):
        tokenize(rows, tokenizer, 5)
