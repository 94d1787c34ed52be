"""Rows of every form are read, the loss mask is right, and errors name file and line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import CHAT_TEMPLATE, VOCABULARY
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from loram.base.errors import UserError
from loram.data.batches import IGNORED
from loram.data.forms import Chat, Text
from loram.data.spec import DataSpec, as_spec
from loram.data.tokens import check_rows, load_rows, load_tokens, tokenize

Jsonl = Callable[..., Path]
ASK, REPLY = "what is one plus one", "one plus one is two"
CHAT = [{"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY}]
PROMPT_TEXT = f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n"


def labelled(path: Path, tokenizer: Any, max_length: int = 500, **options: Any) -> list[tuple[str, str]]:
    """Return (text outside the loss, text in the loss) of every row."""
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
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the end of the turn is in the loss nevertheless
    assert labelled(jsonl(row), tokenizer) == [(PROMPT_TEXT, f"{REPLY}<|im_end|>\n")]


def test_alpaca_input_follows_the_instruction(jsonl: Jsonl, tokenizer: PreTrainedTokenizerFast) -> None:
    [(prompt, _)] = labelled(jsonl({"instruction": "say", "input": "a word", "output": REPLY}), tokenizer)
    assert "user\nsay\n\na word<|im_end|>" in prompt


def test_prompt_and_completion_go_through_the_chat_template_unless_told_otherwise(
    jsonl: Jsonl, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = jsonl({"prompt": ASK, "completion": REPLY})
    assert labelled(path, tokenizer) == [(PROMPT_TEXT, f"{REPLY}<|im_end|>\n")]
    path = jsonl({"prompt": f"{ASK}:", "completion": f" {REPLY}"})
    assert labelled(path, tokenizer, apply_chat_template=False) == [(f"{ASK}:", f" {REPLY}<|im_end|>")]
    path = jsonl({"question": ASK, "answer": REPLY})
    [(prompt, _)] = labelled(path, tokenizer, apply_chat_template=False)
    assert prompt == f"Question: {ASK}\nAnswer:"


def test_a_prompt_that_was_written_by_a_template_already_is_refused(jsonl: Jsonl, tokenizer: Any) -> None:
    path = jsonl({"prompt": PROMPT_TEXT, "completion": f"{REPLY}<|im_end|>"})
    with pytest.raises(UserError, match=r"data\.jsonl:1: the prompt begins with '<\|im_start\|>'.*apply_chat_template"):
        labelled(path, tokenizer)
    assert labelled(path, tokenizer, apply_chat_template=False) == [(PROMPT_TEXT, f"{REPLY}<|im_end|>")]
    with pytest.raises(UserError, match="this row is a chat and has no other form"):
        labelled(jsonl({"messages": CHAT}), tokenizer, apply_chat_template=False)


def test_every_assistant_turn_of_messages_is_in_the_loss(jsonl: Jsonl, tokenizer: PreTrainedTokenizerFast) -> None:
    second = [{"role": "user", "content": "and two"}, {"role": "assistant", "content": "four"}]
    [(outside, inside)] = labelled(jsonl({"messages": [*CHAT, *second]}), tokenizer)
    assert inside == f"{REPLY}<|im_end|>\nfour<|im_end|>\n"
    assert "and two" in outside
    # in a prompt-completion row the earlier turns belong to the prompt
    [(_, inside)] = labelled(jsonl({"prompt": [*CHAT, second[0]], "completion": [second[1]]}), tokenizer)
    assert inside == "four<|im_end|>\n"


REWRITING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_writes_the_last_turn_differently(jsonl: Jsonl, tokenizer: Any) -> None:
    """The template of Qwen3 puts an empty thought before the last reply only."""
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", chat_template=REWRITING_TEMPLATE
    )
    second = [{"role": "user", "content": "and two"}, {"role": "assistant", "content": "four"}]
    third = [{"role": "user", "content": "again"}, {"role": "assistant", "content": "four"}]
    [(outside, inside)] = labelled(jsonl({"messages": [*CHAT, *second, *third]}), other)
    assert inside == f"{REPLY}<|im_end|>\nfour<|im_end|>\n<think>\n\n</think>\n\nfour<|im_end|>\n"
    header = "<|im_start|>assistant\n"
    assert outside == f"{PROMPT_TEXT}<|im_start|>user\nand two<|im_end|>\n{header}" + (
        f"<|im_start|>user\nagain<|im_end|>\n{header}"
    )


def test_a_tokenizer_without_an_end_token_is_refused(jsonl: Jsonl, tokenizer: Any) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    for row in ({"text": ASK}, {"prompt": ASK, "completion": REPLY}):
        with pytest.raises(UserError, match="end-of-sequence"):
            labelled(jsonl(row), endless)


def test_without_a_chat_template_questions_are_plain_and_chats_refused(jsonl: Jsonl, tokenizer: Any) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>")
    [(prompt, completion)] = labelled(jsonl({"question": ASK, "answer": REPLY}), plain)
    assert (prompt, completion) == (f"Question: {ASK}\nAnswer:", f" {REPLY}<|im_end|>")
    [(prompt, _)] = labelled(jsonl({"instruction": ASK, "output": REPLY}), plain)
    assert prompt.endswith("### Response:")
    with pytest.raises(UserError, match=r"data\.jsonl:1: this row is a chat, but the tokenizer has no chat template"):
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


def test_a_last_piece_of_one_token_is_skipped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one plus two is three")
    rows = load_rows(DataSpec(path=str(path)))
    ids = [*tokenizer(path.read_text())["input_ids"], tokenizer.eos_token_id]
    for length in range(2, len(ids) + 1):
        alone = len(ids) % length == 1  # the first token of a piece is never predicted
        tokens = tokenize(rows, tokenizer, length)
        assert [i for row in tokens.rows for i in row["input_ids"]] == (ids[:-1] if alone else ids)
        assert (tokens.skipped, tokens.truncated) == (int(alone), 0)


def test_every_token_of_a_text_row_is_in_the_loss(jsonl: Jsonl, tokenizer: Any) -> None:
    assert labelled(jsonl({"text": ASK}, {"text": REPLY}), tokenizer) == [
        ("", f"{ASK}<|im_end|>"),
        ("", f"{REPLY}<|im_end|>"),
    ]
    assert labelled(jsonl({"body": ASK}), tokenizer, columns={"text": "body"}) == [("", f"{ASK}<|im_end|>")]


def test_chats_in_a_column_by_name(jsonl: Jsonl, tokenizer: Any) -> None:
    path = jsonl({"turns": CHAT, "text": "no"})
    assert labelled(path, tokenizer, columns={"messages": "turns"}) == [(PROMPT_TEXT, f"{REPLY}<|im_end|>\n")]


def test_csv_fields_are_text_whatever_they_look_like(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "sums.csv"
    path.write_text('prompt,completion\n1+1=,2\n1-1=,007\n"a, b",NA\n')
    assert [inside for _, inside in labelled(path, tokenizer)] == [f"{x}<|im_end|>\n" for x in ("2", "007", "NA")]
    path = tmp_path / "numbers.csv"  # a whole column that looks like numbers
    path.write_text("prompt,completion\n1+1=,2\n0+7=,007\n")
    assert [inside for _, inside in labelled(path, tokenizer)] == ["2<|im_end|>\n", "007<|im_end|>\n"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_text_that_looks_like_a_date_or_nothing_stays_text(suffix: str, tmp_path: Path, tokenizer: Any) -> None:
    path, answers = tmp_path / f"rows.{suffix}", ["2020-01-01", "2021-02-03"]
    frame = pd.DataFrame([{"prompt": "when:", "completion": answer} for answer in answers])
    writers: dict[str, Callable[[], Any]] = {
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: frame.to_json(path, orient="records"),
        "csv": lambda: frame.to_csv(path, index=False),
        "parquet": lambda: frame.to_parquet(path),
    }
    writers[suffix]()
    assert [inside for _, inside in labelled(path, tokenizer)] == [f"{answer}<|im_end|>\n" for answer in answers]


def test_json_lines_by_the_name_of_json_and_a_byte_order_mark(tmp_path: Path) -> None:
    row = {"text": "caf\u00e9 \u2028"}
    for name, text in (
        ("a.json", f"{json.dumps(row, ensure_ascii=False)}\n" * 2),
        ("b.json", f"\n[{json.dumps(row)},\n{json.dumps(row)}]"),
        ("c.csv", "text\n" + "caf\u00e9 \u2028\n" * 2),
    ):
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / name).write_text(text, encoding=encoding)
            assert list(load_rows(DataSpec(path=str(tmp_path / name)))) == [Text(**row)] * 2


def test_long_and_quoted_csv_fields(tmp_path: Path) -> None:
    text = 'a "word", and\na line ' * 20_000  # longer than the limit of Python's csv
    pd.DataFrame([{"text": text}]).to_csv(tmp_path / "a.csv", index=False)
    assert list(load_rows(DataSpec(path=str(tmp_path / "a.csv")))) == [Text(text=text)]


def test_alpaca_rows_may_lack_their_input(jsonl: Jsonl, tokenizer: Any) -> None:
    path = jsonl({"instruction": "say", "output": "a"}, {"instruction": "say", "input": "a word", "output": "b"})
    first, second = (prompt for prompt, _ in labelled(path, tokenizer))
    assert "user\nsay<|im_end|>" in first
    assert "user\nsay\n\na word<|im_end|>" in second


def test_columns_by_name_and_max_samples(jsonl: Jsonl, tokenizer: Any) -> None:
    path = jsonl(*[{"ask": ASK, "reply": f" {n}", "text": "no"} for n in ("one", "two", "three")])
    columns = {"prompt": "ask", "completion": "reply"}
    found = labelled(path, tokenizer, columns=columns, max_samples=2, apply_chat_template=False)
    assert found == [(ASK, " one<|im_end|>"), (ASK, " two<|im_end|>")]


def test_truncated_and_skipped_rows_are_counted(jsonl: Jsonl, tokenizer: Any) -> None:
    long = "one plus one is two and " * 20
    path = jsonl(
        {"prompt": ASK, "completion": " two"},
        {"prompt": ASK, "completion": long},
        {"prompt": long, "completion": " two"},
    )
    tokens = tokenize(load_rows(DataSpec(path=str(path), apply_chat_template=False)), tokenizer, 40)
    assert (len(tokens.rows), tokens.truncated, tokens.skipped) == (2, 2, 1)
    assert max(map(len, tokens.rows["input_ids"])) == 40


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_labels_are_those_that_trl_makes(jsonl: Jsonl, tokenizer: Any, tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = load_rows(DataSpec(path=str(jsonl({"question": ASK, "answer": REPLY}, {"question": "a", "answer": "b"}))))
    ours = tokenize(rows, tokenizer, 100).rows
    arguments = SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=100)
    chats = [{"prompt": row.messages[:1], "completion": row.messages[1:]} for row in rows if isinstance(row, Chat)]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        arguments,
        train_dataset=Dataset.from_list(chats),
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
        (
            '{"question": "a", "answer": "b"}\n{"question": null, "answer": "b"}\n',
            r"rows\.jsonl:2: 'question' should be",
        ),
        (
            '{"question": "a", "answer": "b"}\n{"question": "", "answer": "b"}\n',
            r"rows\.jsonl:2: 'question' is '', where text is needed",
        ),
        ('{"question": "a", "answer": 7}\n', r"rows\.jsonl:1: 'answer' should be text, but is 7"),
        ('{"foo": "a", "bar": 7}\n', r"cannot tell which columns to use from foo, bar"),
        ("{}\n", r"cannot tell which columns to use from none"),
        (
            '{"messages": [{"role": "user"}]}\n',
            r"rows\.jsonl:1: message 1 of messages: a message needs a role and a content",
        ),
        ('{"text": "a"}\n{"text": "\\ud83d"}\n', r"rows\.jsonl:2: 'text' is not valid text: .*surrogates not allowed"),
        ('{"text": ' + "9" * 5000 + "}\n", r"rows\.jsonl:1: this row is not valid JSON"),
        ('{"text": ' + "[" * 100_000 + "\n", r"rows\.jsonl:1: this row is not valid JSON"),
        (
            '{"prompt": "a", "completion": "b"}\n'
            '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}\n',
            r"rows\.jsonl:2: the prompt is messages, but before it is text",
        ),
        ('{"question": "a", "answer": "b"}\n{"text": "a"}\n', r"rows\.jsonl:2: there is no 'question'"),
    ],
    ids=[
        "empty",
        "broken",
        "no-object",
        "null",
        "blank",
        "number",
        "columns",
        "no-columns",
        "message",
        "half-a-character",
        "huge-number",
        "deep",
        "mixed",
        "two-forms",
    ],
)
def test_errors_name_file_and_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        check_rows(DataSpec(path=str(path)))


@pytest.mark.parametrize(
    "bad",
    [
        {"messages": "hi"},
        {"messages": 7},
        {"messages": ["hi"]},
        {"messages": CHAT[0]},
        {"messages": [CHAT]},
        {"messages": [{"role": "user", "content": None}]},
        {"prompt": 3, "completion": "b"},
        {"prompt": {"a": 1}, "completion": "b"},
        {"prompt": "a", "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "completion": "b"},
    ],
    ids=str,
)
def test_a_chat_that_is_none_names_file_and_line(bad: dict[str, Any], jsonl: Jsonl) -> None:
    with pytest.raises(UserError, match=r"data\.jsonl:1: "):
        check_rows(DataSpec(path=str(jsonl(bad))))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n\n"),
        ("a.json", "[]"),
        ("a.csv", "question,answer\n"),
        ("a.tsv", "question\tanswer\n"),
        ("a.txt", " \n"),
    ],
)
def test_no_rows_is_said_plainly(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: the data set is empty"):
        check_rows(DataSpec(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "caf\u00e9"}\n'),
        ("a.json", '[{"text": "caf\u00e9"}]'),
        ("a.csv", "text\ncaf\u00e9\n"),
        ("a.txt", "caf\u00e9"),
    ],
)
def test_files_in_another_encoding_name_the_file(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}.*utf-8"):
        check_rows(DataSpec(path=str(tmp_path / name)))


def test_broken_files_of_other_kinds_name_the_file(tmp_path: Path) -> None:
    for name, content in (("a.json", '[{"question": "a"'), ("a.parquet", "no parquet"), ("a.csv", 'a,b\n"open,1\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name}(:2)?: cannot"):
            check_rows(DataSpec(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answer\na,b\na,b,c\n", r"a\.csv:3: this row has more fields than there are columns"),
        ("question,answer\na,b\na\n", r"a\.csv:3: there is no 'answer'"),
        ("question,answer,answer\na,b,c\n", r"a\.csv: column 'answer' stands twice"),
        ('question,answer\na,"b"c\n', r"a\.csv:2: cannot be read as csv: "),
    ],
    ids=["more", "fewer", "twice", "quotes"],
)
def test_csv_rows_that_do_not_fit_their_header(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        check_rows(DataSpec(path=str(tmp_path / "a.csv")))


GOOD_ROW, BAD_ROW = {"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", f"\n\n{json.dumps(GOOD_ROW)}\n\n{json.dumps(BAD_ROW)}\n", ":5"),
        ("a.json", f"\n{json.dumps(GOOD_ROW)}\n{json.dumps(BAD_ROW)}\n", ":3"),
        ("a.json", json.dumps([GOOD_ROW, BAD_ROW], indent=2), ": row 2"),
        ("a.csv", '\nprompt,completion\n\n"a\nb\r\nc",d\n\n"",a\n', ":8"),
        ("a.csv", 'prompt,completion\na,b\n"","a\nb"\n', ":3"),  # where a row begins, however many lines it has
        ("a.tsv", "prompt\tcompletion\r\n\r\n\ta\r\n", ":3"),
    ],
    ids=["jsonl", "json-lines", "json-list", "csv", "csv-long", "tsv"],
)
def test_rows_are_named_by_the_line_they_begin_on(name: str, content: str, where: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises(UserError, match=rf"{name}{where}: 'prompt' is ''"):
        check_rows(DataSpec(path=str(tmp_path / name)))


def test_rows_of_parquet_are_named_by_number(tmp_path: Path) -> None:
    pd.DataFrame([GOOD_ROW, BAD_ROW]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 2: 'prompt' is ''"):
        check_rows(DataSpec(path=str(tmp_path / "a.parquet")))


def test_what_the_tokenizer_refuses_is_named_by_line_too(tmp_path: Path, tokenizer: Any) -> None:
    template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' else '' }}" + CHAT_TEMPLATE
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", chat_template=template
    )
    rows = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "a"}, *CHAT]}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"a\.jsonl:3: the tokenizer's chat template refuses this chat: no system"):
        load_tokens(DataSpec(path=str(tmp_path / "a.jsonl")), strict, 100, vocabulary=VOCABULARY)


def test_a_token_beyond_the_embedding_is_named_with_its_line(jsonl: Jsonl, tokenizer: Any) -> None:
    larger = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>")
    larger.add_tokens(["<extra>"])  # like the one of Gemma 3: it is no error until a text uses it
    first, second = {"text": "one plus"}, {"text": "one <extra>"}
    spec = DataSpec(path=str(jsonl(first, second)))
    known = len(tokenizer)
    message = rf"data\.jsonl:2: the tokenizer gives token {known} \('<extra>'\), .* {known} rows: it does not fit"
    with pytest.raises(UserError, match=message):
        load_tokens(spec, larger, 100, vocabulary=known)
    assert len(load_tokens(spec.model_copy(update={"max_samples": 1}), larger, 100, vocabulary=known).rows) == 1
    with pytest.raises(UserError, match=rf"the tokenizer knows {known} tokens, .* only {known - 1} rows"):
        load_tokens(spec, larger, 100, vocabulary=known - 1)


def test_a_data_set_has_its_own_max_length(jsonl: Jsonl, tokenizer: Any) -> None:
    spec = DataSpec(path=str(jsonl({"text": REPLY})), max_length=4)
    assert (
        load_tokens(spec, tokenizer, 100, vocabulary=VOCABULARY).rows["input_ids"][0]
        == tokenizer(REPLY)["input_ids"][:4]
    )


def test_padding_with_the_end_token_keeps_real_ends_in_the_loss(jsonl: Jsonl, tokenizer: Any) -> None:
    """The collator masks by position and not by token; otherwise such padding would teach the model never to stop."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    path = jsonl({"prompt": ASK, "completion": " two"}, {"prompt": ASK, "completion": f" {REPLY} {REPLY}"})
    rows = load_tokens(DataSpec(path=str(path), apply_chat_template=False), tokenizer, 100, vocabulary=VOCABULARY).rows
    batch = DataCollatorForLanguageModeling(pad_token_id=end)(list(rows))
    for row, ids, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        length = len(row["input_ids"])
        assert (ids[length - 1], labels[length - 1]) == (end, end)
        assert set(ids[length:]) <= {end}
        assert set(labels[length:]) <= {IGNORED}
    assert batch["labels"].shape[1] > len(rows["input_ids"][0])  # there was padding


def test_a_mapping_with_a_bad_key_or_value_is_a_clear_error() -> None:
    for data in ({"pth": "a"}, {"path": "a", "max_samples": 0}, {"path": "a", "columns": {"query": "q"}}, {}, ""):
        with pytest.raises(UserError, match="data: "):
            as_spec(data)


@pytest.mark.parametrize("option", ["split", "config"])
def test_options_of_hub_data_sets_are_not_ignored_for_files(option: str, jsonl: Jsonl) -> None:
    path = jsonl({"text": "a"})
    with pytest.raises(UserError, match=option):
        check_rows(DataSpec(path=str(path), **{option: "test"}))


@pytest.mark.parametrize("name", ["rows", "rows.jsonl"])
def test_a_folder_is_no_data_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: "):
        check_rows(DataSpec(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"path": "none.jsonl"}, r"none\.jsonl: no such file$"),  # without asking the hub
        ({"path": "/nowhere/rows.jsonl"}, "/nowhere/rows.jsonl: no such file"),
        ({"path": "data.xlsx"}, "unknown kind of data file"),
        ({"path": "rows.jsonl", "columns": {"text": "body"}}, "no column 'body' for text; there are question, answer"),
        ({"path": "rows.jsonl", "columns": {"prompt": "question"}}, "prompt belong to rows with prompt and completion"),
    ],
    ids=["bare", "missing", "suffix", "column", "half"],
)
def test_bad_specs(spec: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    (tmp_path / "data.xlsx").touch()
    with pytest.raises(UserError, match=message):
        check_rows(DataSpec(**spec))


def test_nothing_in_the_loss_is_an_error(jsonl: Jsonl, tokenizer: Any) -> None:
    rows = load_rows(DataSpec(path=str(jsonl({"question": ASK, "answer": REPLY}))))
    with pytest.raises(UserError, match="no token of any row is in the loss within max_length 5"):
        tokenize(rows, tokenizer, 5)
