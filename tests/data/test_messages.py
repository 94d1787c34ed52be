"""Nothing in a row is dropped in silence: a part of a chat is rendered, respected, or refused by file and line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import CHAT_TEMPLATE
from transformers import PreTrainedTokenizerFast

from loram.base.errors import UserError
from loram.data.batches import IGNORED
from loram.data.spec import DataSpec
from loram.data.tokens import load_rows, tokenize

Jsonl = Callable[..., Path]
USER, ANSWER = {"role": "user", "content": "weather?"}, {"role": "assistant", "content": "sunny"}
FUNCTION = {"name": "weather", "arguments": {"city": "Paris"}}
CALL = {"type": "function", "function": FUNCTION}
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TOOL_TEMPLATE = (
    "{% if tools %}{{ 'TOOLS ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ 'CALL ' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def shown(jsonl: Jsonl, tokenizer: Any) -> Callable[..., str]:
    """Show the row that some data become, with brackets around what is in the loss."""

    def show(row: dict[str, Any] | Path, template: str = TOOL_TEMPLATE, **options: Any) -> str:
        path = row if isinstance(row, Path) else jsonl(row)
        with_tools = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", chat_template=template
        )
        [row] = tokenize(load_rows(DataSpec(path=str(path), **options)), with_tools, 1000).rows
        text, inside = "", False
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            text += ("[" if label != IGNORED else "]") * ((label != IGNORED) != inside)
            inside = label != IGNORED
            text += with_tools.decode([token])
        return text + "]" * inside

    return show


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n" + (f"[{text}<|im_end|>\n]" if role == "assistant" else f"{text}<|im_end|>\n")


ASK = turn("user", "weather?")
CALLED = turn("assistant", 'CALL weather{"city": "Paris"}')
SUNNY = turn("assistant", "sunny")


@pytest.mark.parametrize(
    "calls",
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [FUNCTION]},
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "1"}]},
        {"role": "assistant", "content": None, "function_call": {**FUNCTION, "arguments": '{"city": "Paris"}'}},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "Tool_Call", "value": '[{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}]'},
    ],
    ids=["empty", "null", "bare", "id", "function_call", "sharegpt", "list"],
)
def test_tool_calls_are_rendered_however_they_are_written(shown: Callable[..., str], calls: dict[str, Any]) -> None:
    messages = [USER, calls, {"role": "tool", "content": "sunny"}, ANSWER]
    assert shown({"messages": messages}) == ASK + CALLED + turn("tool", "sunny") + SUNNY


def test_calls_that_need_an_id_of_nine_characters(shown: Callable[..., str]) -> None:
    """As Mistral's templates do."""
    strict = TOOL_TEMPLATE.replace(
        "{{ 'CALL '", "{{ '' if c.id | default('') | length == 9 else raise_exception('id') }}{{ 'CALL '"
    )
    assert strict != TOOL_TEMPLATE
    calls = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "abcdefghi"}]}
    assert shown({"messages": [USER, calls]}, strict) == ASK + CALLED
    with pytest.raises(UserError, match="refuses this chat: id"):
        shown({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, strict)


@pytest.mark.parametrize("key", ["parameters", "input"])
def test_other_names_of_arguments(shown: Callable[..., str], key: str) -> None:
    call = {"name": "weather", key: {"city": "Paris"}}
    assert shown({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}) == ASK + CALLED
    with pytest.raises(UserError, match="the call of weather has 'strict'"):
        shown({"messages": [USER, {"role": "assistant", "tool_calls": [{**call, "strict": True}]}]})


def test_tool_calls_become_text_where_the_template_has_no_place_for_them(shown: Callable[..., str]) -> None:
    text = shown({"messages": [USER, {**ANSWER, "content": "I look.", "tool_calls": [CALL]}]}, CHAT_TEMPLATE)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert text == ASK + turn("assistant", f"I look.\n{call}")


@pytest.mark.parametrize("tools", [[SCHEMA], '[{"name": "weather"}]'], ids=["list", "json"])
def test_tools_are_rendered_or_refused(shown: Callable[..., str], tools: Any) -> None:
    row = {"messages": [USER, ANSWER], "tools": tools}
    assert shown(row).startswith("TOOLS [{")
    with pytest.raises(UserError, match=r"data\.jsonl:1: the tokenizer's chat template has no place for tools"):
        shown(row, CHAT_TEMPLATE)
    assert shown({"messages": [USER, ANSWER], "tools": None}) == ASK + SUNNY


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_rendered_or_refused(shown: Callable[..., str], key: str) -> None:
    row = {"messages": [USER, {**ANSWER, key: "so"}]}
    assert shown(row) == ASK + turn("assistant", "<think>so</think>sunny")
    with pytest.raises(UserError, match=rf"data\.jsonl:1: .* does not write the {key} of message 2 \(assistant\)"):
        shown(row, CHAT_TEMPLATE)


def test_a_beginning_that_the_template_cuts_off_is_refused_or_counted(jsonl: Jsonl, tokenizer: Any) -> None:
    """Templates of reasoning models cut off what stands before `</think>`: R1's always, Qwen3's in earlier turns."""
    cut = "{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not (LAST) else m.content }}"
    thought = {**ANSWER, "content": "<think>so</think>sunny"}

    def tokens(messages: list[Any], condition: str) -> Any:
        template = TOOL_TEMPLATE.replace("{{ m.content }}", cut.replace("LAST", condition))
        other = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", chat_template=template
        )
        return tokenize(load_rows(DataSpec(path=str(jsonl({"messages": messages})))), other, 1000)

    with pytest.raises(UserError, match="does not write the beginning of the content of message 2"):
        tokens([USER, thought], "false")
    assert tokens([USER, thought], "loop.last").unused == {}
    assert tokens([USER, thought, USER, thought], "loop.last").unused == {"thoughts of earlier turns": 1}


def test_a_message_inside_another_is_refused(shown: Callable[..., str]) -> None:
    """Gemma 4's templates write calls, then what the tool answers, and then the content of the first message."""
    inside = TOOL_TEMPLATE.replace("{{ m.content }}", "").replace(
        "{{ '<|im_end|>\n' }}",
        "{% if m.tool_calls and not loop.last %}{{ messages[loop.index].content }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}",
    )
    inside = inside.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    assert inside != TOOL_TEMPLATE
    calls = {"role": "assistant", "content": "before", "tool_calls": [CALL]}
    with pytest.raises(UserError, match="writes message 3 inside message 2"):
        shown({"messages": [USER, calls, {"role": "tool", "content": "sun"}, ANSWER]}, inside)


def test_an_end_token_in_the_content_is_not_doubled(shown: Callable[..., str]) -> None:
    for content in ("sunny<|im_end|>", "sunny<|im_end|>\n"):
        assert shown({"messages": [USER, {**ANSWER, "content": content}]}).startswith(ASK + SUNNY[:-2])
        assert "<|im_end|><|im_end|>" not in shown({"question": "weather?", "answer": content})


def test_keys_of_messages_that_are_not_written_are_counted(jsonl: Jsonl, tokenizer: Any) -> None:
    messages = [{**USER, "name": "Bob", "role_play": 1}, {**ANSWER, "id": "7"}]
    tokens = tokenize(load_rows(DataSpec(path=str(jsonl({"messages": messages})))), tokenizer, 1000)
    assert tokens.unused == {"name of messages": 1, "role_play of messages": 1, "id of messages": 1}


def test_a_message_that_the_template_leaves_out_is_refused(shown: Callable[..., str]) -> None:
    template = CHAT_TEMPLATE.replace("{% for message in messages %}", "{% for message in messages[-2:] %}")
    assert template != CHAT_TEMPLATE
    with pytest.raises(UserError, match=r"does not write the content of message 1 \(system\)"):
        shown({"messages": [{"role": "system", "content": "Be short."}, USER, ANSWER]}, template)


def test_parts_of_text_are_joined_and_others_refused(shown: Callable[..., str]) -> None:
    parts = [{"type": "text", "text": "wea"}, {"type": "text", "text": "ther?"}]
    assert shown({"messages": [{**USER, "content": parts}, ANSWER]}) == ASK + SUNNY
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    with pytest.raises(UserError, match=r"data\.jsonl:1: message 1 of messages: only parts of text .*image_url"):
        shown({"messages": [{**USER, "content": [image, *parts]}, ANSWER]})


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("human", "Human", "USER", "user "), "user"),
        (("gpt", "GPT", "Assistant", "model", "bot", "ai"), "assistant"),
        (("system", "System"), "system"),
        (("observation", "function", "Tool"), "tool"),
    ],
)
def test_roles_of_sharegpt_in_any_case(shown: Callable[..., str], names: tuple[str, ...], role: str) -> None:
    for name in names:
        turns = [{"from": name, "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
        assert shown({"conversations": turns}) == turn(role, "a") + turn("user", "b") + turn("assistant", "c")


def test_an_unknown_role_of_sharegpt_is_refused(shown: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="message 1 of conversations: the role 'narrator' is not known"):
        shown({"conversations": [{"from": "narrator", "value": "a"}, {"from": "gpt", "value": "b"}]})


def test_lists_as_json_text_or_as_an_object_of_lists(shown: Callable[..., str], tmp_path: Path) -> None:
    assert shown({"messages": json.dumps([USER, ANSWER])}) == ASK + SUNNY
    assert shown({"conversations": {"from": ["human", "gpt"], "value": ["weather?", "sunny"]}}) == ASK + SUNNY
    (tmp_path / "a.csv").write_text("instruction,output,history\nweather?,sunny,[]\n")
    assert shown(tmp_path / "a.csv") == ASK + SUNNY


def test_the_system_column_of_sharegpt(shown: Callable[..., str]) -> None:
    turns = [{"from": "human", "value": "weather?"}, {"from": "gpt", "value": "sunny"}]
    assert shown({"conversations": turns, "system": "Be short."}) == turn("system", "Be short.") + ASK + SUNNY
    assert shown({"conversations": turns, "system": ""}) == ASK + SUNNY
    with pytest.raises(UserError, match="'system' is a second system prompt"):
        shown({"conversations": [{"from": "system", "value": "a"}, *turns], "system": "b"})


def test_system_and_history_of_alpaca(shown: Callable[..., str]) -> None:
    row = {"instruction": "weather?", "input": "", "output": "sunny", "system": "Be short.", "history": [["a", "b"]]}
    before = turn("system", "Be short.") + turn("user", "a") + turn("assistant", "b")
    assert shown(row) == before + ASK + SUNNY
    with pytest.raises(UserError, match=r"data\.jsonl:1: 'history' should be pairs"):
        shown({**row, "history": ["a"]})
    assert shown({**row, "history": [["a", ""]]}) == before.replace("[b<|im_end|>\n]", "<|im_end|>\n") + ASK + SUNNY
    assert shown({"instruction": "", "input": "weather?", "output": "sunny"}) == ASK + SUNNY


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 0.0}])
def test_a_turn_that_is_marked_as_not_to_train_is_not_in_the_loss(
    shown: Callable[..., str], mark: dict[str, Any]
) -> None:
    row = {"messages": [{**USER, "weight": 0}, {**ANSWER, **mark}, USER, {**ANSWER, "weight": 1}]}
    assert shown(row) == ASK + "<|im_start|>assistant\nsunny<|im_end|>\n" + ASK + SUNNY


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({**ANSWER, "weight": 0.5}, "weight can be 0 or 1, but is 0.5"),
        ({**ANSWER, "train": "no"}, "train can be true or false, but is 'no'"),
        ({**USER, "train": True}, "only an assistant's turn can be in the loss"),
        ({"role": "assistant", "content": None}, "has no content and no tool calls"),
        ({"role": "assistant", "tool_calls": [{"type": "function"}]}, "needs the name of a function"),
        ({"role": "assistant", "tool_calls": "weather"}, "tool_calls should be a list"),
        ({"from": "function_call", "value": "weather()"}, "should be JSON, but is 'weather\\(\\)'"),
        ({**ANSWER, "reasoning_content": ["so"]}, "reasoning_content should be text"),
        ({**ANSWER, "content": {"a": 1}}, "content should be text, but is {'a': 1}"),
    ],
)
def test_what_cannot_be_used_is_refused_by_line_and_message(
    shown: Callable[..., str], message: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=rf"data\.jsonl:1: message 2 of messages: .*{problem}"):
        shown({"messages": [USER, message]})


def test_nulls_that_parquet_adds_to_calls_are_not_arguments(shown: Callable[..., str], tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL, other]}]
    pd.DataFrame([{"messages": messages}]).to_parquet(tmp_path / "a.parquet")
    text = turn("assistant", 'CALL weather{"city": "Paris"}CALL time{"zone": "CET"}')
    assert shown(tmp_path / "a.parquet") == ASK + text


@pytest.mark.parametrize(
    ("row", "columns", "text"),
    [
        ({"query": "weather?", "response": "sunny"}, {"question": "query", "answer": "response"}, ASK + SUNNY),
        (
            {"instruction": "weather?", "context": "now", "response": "sunny"},
            {"instruction": "instruction", "input": "context", "output": "response"},
            turn("user", "weather?\n\nnow") + SUNNY,
        ),
        ({"instruction": "weather?", "response": "sunny"}, {"output": "response"}, ASK + SUNNY),
        (
            {"system_prompt": "Be short.", "question": "weather?", "answer": "sunny"},
            {"system": "system_prompt"},
            turn("system", "Be short.") + ASK + SUNNY,
        ),
    ],
    ids=["query", "dolly", "one", "system"],
)
def test_columns_are_named_as_a_chat(
    shown: Callable[..., str], row: dict[str, Any], columns: dict[str, str], text: str
) -> None:
    assert shown({**row, "id": "7"}, columns=columns) == text


def test_columns_that_are_not_used_are_counted(jsonl: Jsonl, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b", "id": 1}, {"question": "a", "answer": "b", "id": None, "source": "s"}]
    frame = pd.DataFrame(rows)
    frame.to_parquet(tmp_path / "a.parquet")
    for path in (jsonl(*rows), tmp_path / "a.parquet"):
        tokens = tokenize(load_rows(DataSpec(path=str(path))), tokenizer, 100)
        assert (tokens.columns, tokens.unused) == (
            {"question": "question", "answer": "answer"},
            {"id": 1, "source": 1},
        )


def test_empty_rows_are_skipped_and_counted(jsonl: Jsonl, tokenizer: Any) -> None:
    for rows in (
        [{"text": ""}, {"text": "one"}, {"text": " \n"}, {"text": None}],
        [
            {"prompt": None, "completion": None},
            {"prompt": "a", "completion": "b"},
            {"prompt": None, "completion": None},
            {"prompt": "a", "completion": " "},
        ],
        [{"question": "a", "answer": ""}, {"question": "a", "answer": "b"}] * 2 + [{"question": "a", "answer": None}],
        [
            {"messages": []},
            {"messages": [USER, ANSWER]},
            {"messages": None},
            {"messages": [USER, {**ANSWER, "content": ""}]},
        ],
    ):
        tokens = tokenize(load_rows(DataSpec(path=str(jsonl(*rows)))), tokenizer, 100)
        assert len(tokens.rows) + tokens.skipped == len(rows)
        assert tokens.skipped == 3
