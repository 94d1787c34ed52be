"""A chat through standard input: turns, memory, commands, and two voices side by side."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, random_adapter
from transformers import AutoModelForCausalLM

import loram
from loram import cli
from loram.compute.streaming import Stream
from loram.generation.chat import Conversation, Voice
from loram.generation.options import ChatOptions
from loram.generation.speaker import Speaker

NEW = {"max_new_tokens": 12}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer_to(model: Path, *messages: dict[str, str], **options: Any) -> str:
    (result,) = loram.generate(model, [list(messages)], **{**NEW, **options})
    return result.text


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    return random_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")


@pytest.fixture
def talk(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `loram chat` with lines as its standard input: (exit code, stdout, stderr)."""

    def run(*arguments: Any, lines: tuple[str, ...]) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = cli._main(["chat", *map(str, arguments), "--max-new-tokens", "12"])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_each_line_is_a_turn_and_the_chat_is_remembered(tiny_llama: Path, talk: Any) -> None:
    first = answer_to(tiny_llama, user("Hi"))
    second = answer_to(tiny_llama, user("Hi"), {"role": "assistant", "content": first}, user("What is 1 plus 2?"))
    alone = answer_to(tiny_llama, user("What is 1 plus 2?"))
    assert second != alone
    assert talk(tiny_llama, lines=("Hi", "", "What is 1 plus 2?"))[:2] == (0, f"{first}\n{second}\n")
    code, out, err = talk(tiny_llama, lines=("Hi", "/clear", "What is 1 plus 2?", "/exit", "Hi"))
    assert (code, out) == (0, f"{first}\n{alone}\n")
    assert "begins again, without a system prompt" in err


def test_a_system_prompt_comes_first(tiny_llama: Path, talk: Any) -> None:
    system = {"role": "system", "content": "Say plus."}
    with_it, without = answer_to(tiny_llama, system, user("Hi")), answer_to(tiny_llama, user("Hi"))
    assert with_it != without
    assert talk(tiny_llama, "--system", "Say plus.", lines=("Hi",))[1] == f"{with_it}\n"
    out = talk(tiny_llama, lines=("Hi", "/system Say plus.", "Hi", "/system", "Hi"))[1]
    assert out == f"{without}\n{with_it}\n{without}\n"


def test_an_unknown_command_is_answered_and_a_path_is_not_one(tiny_llama: Path, talk: Any) -> None:
    code, out, err = talk(tiny_llama, lines=("/restart", "/etc/hosts, what is it?"))
    assert code == 0
    assert out == f"{answer_to(tiny_llama, user('/etc/hosts, what is it?'))}\n"
    assert err.count("is not a command") == 1
    assert "/restart is not a command: /clear forgets the chat" in err


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "disk"])
def test_two_voices_answer_each_from_its_own_chat(stream: bool, tiny_llama: Path, adapter: Path) -> None:
    settings = ChatOptions.of(stream=stream, **NEW)
    voices = [Voice(name="base", adapted=False), Voice(name="with adapter", adapted=True)]
    conversation = Conversation(Speaker(tiny_llama, adapter, settings), voices)
    pieces = {"base": "", "with adapter": ""}

    def on_text(name: str, piece: str) -> None:
        pieces[name] += piece

    first = conversation.answer("Hi", on_text)
    assert pieces == first
    second = conversation.answer("What is 1 plus 2?", lambda *_: None)
    for name, own in (("base", None), ("with adapter", adapter)):
        assert first[name] == answer_to(tiny_llama, user("Hi"), adapter=own)
        said = {"role": "assistant", "content": first[name]}
        assert second[name] == answer_to(tiny_llama, user("Hi"), said, user("What is 1 plus 2?"), adapter=own)
    assert first["base"] != first["with adapter"]


def test_compare_shows_both_answers_in_columns(tiny_llama: Path, adapter: Path, talk: Any) -> None:
    code, out, _ = talk(tiny_llama, "--adapter", adapter, "--compare", lines=("Hi",))
    assert code == 0
    heading = next(line for line in out.splitlines() if "base" in line)
    assert heading.split() == ["┃", "base", "┃", "with", "adapter", "┃"]
    row = next(line for line in out.splitlines() if line.startswith("│")).split("│")
    assert row[1].strip() != row[2].strip()


def test_an_answer_that_is_stopped_is_forgotten(tiny_llama: Path, adapter: Path) -> None:
    voices = [Voice(name="base", adapted=False), Voice(name="with adapter", adapted=True)]
    conversation = Conversation(Speaker(tiny_llama, adapter, ChatOptions.of(**NEW)), voices)

    def stop(name: str, piece: str) -> None:
        if name == "with adapter":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("Hi", stop)
    assert [voice.messages for voice in voices] == [[], []]
    assert conversation.answer("Hi", lambda *_: None)["base"] == answer_to(tiny_llama, user("Hi"))


def test_a_model_on_disk_that_is_stopped_within_a_layer_answers_as_before(
    tiny_llama: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voices = [Voice(name="with adapter", adapted=True)]
    conversation = Conversation(Speaker(tiny_llama, adapter, ChatOptions.of(stream=True, **NEW)), voices)
    step = Stream._pass

    def stop(stream: Stream, index: int, *arguments: Any) -> None:
        if index == 2:
            raise KeyboardInterrupt
        step(stream, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "_pass", stop)
        with pytest.raises(KeyboardInterrupt):
            conversation.answer("Hi", lambda *_: None)
    answers = conversation.answer("Hi", lambda *_: None)
    assert answers == {"with adapter": answer_to(tiny_llama, user("Hi"), adapter=adapter)}


def test_what_cannot_chat_ends_in_one_line(
    tiny_llama: Path, tokenizer: Any, adapter: Path, tmp_path: Path, talk: Any
) -> None:
    plain = make_model(tmp_path / "plain", "llama", tokenizer)
    (plain / "chat_template.jinja").unlink()
    other = make_model(tmp_path / "other", "llama", tokenizer, hidden_size=48)
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}Hi")
    for arguments, message in (
        ((plain,), "has no chat template, so it cannot chat; give one with --chat-template"),
        ((tiny_llama, "--compare"), "compare: shows answers without and with an adapter; name one with --adapter"),
        ((other, "--adapter", adapter), "adapter"),
        ((tiny_llama, "--chat-template", refusing, "--system", "x"), "refuses this chat: no system"),
    ):
        code, out, err = talk(*arguments, lines=("Hi",))
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("error") == 1
    assert talk(plain, "--chat-template", tiny_llama, lines=("Hi",))[0] == 0


def test_generate_on_the_line_writes_json_lines(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hi\nWhat is 1 plus 2?\n")
    arguments = ["generate", str(tiny_llama), "--max-new-tokens", "12"]
    capfd.readouterr()
    assert cli._main([*arguments, "--prompts", str(prompts)]) == 0
    lines = capfd.readouterr().out.splitlines()
    first, second = map(json.loads, lines)
    assert first == {"prompt": "Hi", "text": answer_to(tiny_llama, user("Hi")), "tokens": first["tokens"]}
    assert second["prompt"] == "What is 1 plus 2?"
    assert cli._main([*arguments, "--prompt", "Hi"]) == 0
    assert capfd.readouterr().out.splitlines() == lines[:1]
    out = tmp_path / "out.jsonl"
    assert cli._main([*arguments, "--prompts", str(prompts), "--output-file", str(out)]) == 0
    assert out.read_text().splitlines() == lines
    for more, message in (
        (["--prompt", "Hi", "--output-file", str(out)], "the output exists already"),
        (["--prompt", "Hi", "--output-file", str(tmp_path / "none" / "out.jsonl")], "there is no folder"),
        (["--prompt", "Hi", "--prompts", str(prompts)], "give either --prompt TEXT or --prompts FILE"),
        (["--max-samples", "2"], "give either --prompt TEXT or --prompts FILE"),
        ([], "give either --prompt TEXT or --prompts FILE"),
    ):
        assert cli._main([*arguments, *more]) == 2
        assert message in capfd.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    new = tmp_path / "new.jsonl"
    assert cli._main([*arguments, "--prompts", str(tmp_path / "bad.jsonl"), "--output-file", str(new)]) == 2
    assert "bad.jsonl:2" in capfd.readouterr().err
    assert not new.exists()
    assert not list(tmp_path.glob(".*"))
