"""What a model writes is what transformers' `generate` writes, whatever is in the batch and wherever the model is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_wrapped, random_adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import loram
from loram.compute.loading import load_model
from loram.data.spec import DataSpec
from loram.data.template import Renderer
from loram.disk.checkpoint import Checkpoint
from loram.generation.options import GenerateOptions
from loram.generation.prompts import read_prompts
from loram.generation.speaker import Speaker

PROMPTS = ["What is 3 plus 4?", "Yes", "What is 1 plus 1? Say it in as few words as you possibly can."]
WHERE = ("memory", "disk")
NEW = {"max_new_tokens": 12}


def by_transformers(model: Any, folder: Path, prompts: list[str], *, chat: bool = True) -> list[str]:
    """What a model in memory writes after each prompt by itself."""
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        if chat:
            message = {"role": "user", "content": prompt}
            ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            whole = model.eval().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **NEW)
        texts.append(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def texts(model: Path, prompts: Any = PROMPTS, **options: Any) -> list[str]:
    return [result.text for result in loram.generate(model, prompts, **{**NEW, **options})]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_5_text"])
def test_tokens_are_those_of_transformers_whatever_is_beside_them(
    family: str, where: str, tiny_models: dict[str, Path]
) -> None:
    folder = tiny_models[family]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [[5, 6, 7, 8, 9, 20, 33], [40, 41, 42], [70] * 12]
    alone = [model.generate(torch.tensor([ids]), do_sample=False, **NEW)[0, len(ids) :].tolist() for ids in prompts]
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)
    speaker = Speaker(folder, None, GenerateOptions.of(stream=where == "disk", **NEW))
    assert speaker.write(prompts) == alone
    assert speaker.write(prompts[:2]) == alone[:2]
    assert speaker.write(prompts[::-1]) == alone[::-1]


@pytest.mark.parametrize("where", WHERE)
def test_an_answer_does_not_depend_on_the_batch(where: str, tiny_models: dict[str, Path]) -> None:
    folder = tiny_models["gemma2"]
    expected = by_transformers(AutoModelForCausalLM.from_pretrained(folder), folder, PROMPTS)
    assert len(set(expected)) == len(PROMPTS)
    for size in (1, 2, 3):
        assert texts(folder, stream=where == "disk", batch_size=size) == expected


@pytest.mark.parametrize("where", WHERE)
def test_a_pruned_folder_and_a_full_model_write_with_their_adapters(
    where: str, tiny_llama: Path, pruned_models: dict[str, Path], tmp_path: Path
) -> None:
    pruned, adapter = pruned_models["llama"], tmp_path / "adapter"
    random_adapter(loram.load_pruned(pruned), adapter)
    loram.PruningPlan.load(pruned).save(adapter)
    loram.recover(adapter, tmp_path / "recovered")
    for model, folder, own in (
        (loram.load_pruned(pruned), pruned, adapter),
        (AutoModelForCausalLM.from_pretrained(tiny_llama), tiny_llama, tmp_path / "recovered"),
    ):
        plain = by_transformers(model, folder, PROMPTS)
        assert texts(folder, stream=where == "disk") == plain
        adapted = by_transformers(PeftModel.from_pretrained(model, own), folder, PROMPTS)
        assert adapted != plain
        assert texts(folder, adapter=own, stream=where == "disk") == adapted
    with pytest.raises(loram.UserError, match="run `loram recover` on it first"):
        loram.generate(tiny_llama, PROMPTS, adapter=adapter)


@pytest.mark.parametrize("where", WHERE)
def test_the_text_model_of_a_wrapped_model_writes(where: str, tokenizer: Any, tmp_path: Path) -> None:
    folder = make_wrapped(tmp_path / "wrapped", "gemma3", tokenizer)
    expected = by_transformers(load_model(Checkpoint(folder)), folder, PROMPTS)
    assert texts(folder, stream=where == "disk") == expected


def test_an_adapter_on_experts_writes_in_4_bits(tokenizer: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "moe", "qwen3_moe", tokenizer)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    random_adapter(model, tmp_path / "adapter", target_modules=[], target_parameters=names, lora_alpha=48)
    plain, adapted = (texts(folder, adapter=adapter, load_in_4bit=True) for adapter in (None, tmp_path / "adapter"))
    assert plain != adapted
    assert adapted != texts(folder, adapter=tmp_path / "adapter")


def test_without_a_chat_template_a_prompt_is_continued_as_plain_text(tokenizer: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "plain", "llama", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = by_transformers(model, folder, PROMPTS, chat=False)
    assert texts(folder, apply_chat_template=False) == expected
    (folder / "chat_template.jinja").unlink()
    assert texts(folder) == expected
    with pytest.raises(loram.UserError, match="prompt 1: this row is a chat, but the tokenizer has no chat template"):
        loram.generate(folder, [[{"role": "user", "content": "Hello"}]])


def test_what_is_drawn_depends_on_the_seed_alone(tiny_llama: Path) -> None:
    first, again, other = (texts(tiny_llama, do_sample=True, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    # so cold that nothing but the likeliest token is drawn
    assert texts(tiny_llama, do_sample=True, temperature=1e-4) == texts(tiny_llama)
    assert texts(tiny_llama, do_sample=True, top_p=1e-4) == texts(tiny_llama)


def test_generation_config_holds_beside_the_options(tokenizer: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", tokenizer)
    before = texts(folder)
    config = {"eos_token_id": [2, 7], "suppress_tokens": [], "do_sample": True, "temperature": 0.6, "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert texts(folder) == before  # greedy, and of the requested length
    likeliest = AutoTokenizer.from_pretrained(folder)(before[0], add_special_tokens=False).input_ids[0]
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [likeliest]}))
    (result,) = loram.generate(folder, PROMPTS[:1], **NEW)
    assert result.tokens == 1  # that token now ends the text


def test_prompts_of_files_are_those_of_training(tiny_llama: Path, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Hello"}
    lines = tmp_path / "lines.txt"
    lines.write_text("Hi\n\nWhat is 3 plus 4?\n")
    for path, contents in (
        (lines, ["Hi", "What is 3 plus 4?"]),
        (jsonl({"prompt": "Hi"}, {"prompt": "Yes", "completion": " No"}), ["Hi", "Yes"]),
        (jsonl({"question": "Hi", "answer": ""}, name="b.jsonl"), ["Hi"]),
        (
            jsonl({"messages": [user, answer, user, answer]}, {"messages": [user]}, name="c.jsonl"),
            [[user, answer, user], "Hi"],
        ),
        (jsonl({"prompt": [user], "completion": [answer]}, name="d.jsonl"), ["Hi"]),
        (
            jsonl({"instruction": "Add", "input": "3 4", "system": "Count."}, name="e.jsonl"),
            [[{"role": "system", "content": "Count."}, {"role": "user", "content": "Add\n\n3 4"}]],
        ),
    ):
        results = loram.generate(tiny_llama, path, max_new_tokens=1)
        assert [result.prompt for result in results] == contents
    assert texts(tiny_llama, lines)[1] == texts(tiny_llama, PROMPTS[:1])[0]
    assert len(read_prompts(DataSpec(path=str(lines), max_samples=1))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ""}\n', r"p.jsonl:2: 'prompt' is ''"),
        ('{"prompt": "a"}\n{not json}\n', "p.jsonl:2: this row is not valid JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [{"content": 1}]}\n', "p.jsonl:2: message 1"),
        ('{"messages": []}\n', "p.jsonl:1: the prompt is empty"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "p.jsonl:1: there is nothing to answer"),
        ('{"query": "a"}\n', "no column messages, prompt, question or instruction; there are query"),
        ('{"text": "a"}\n', "no column messages, prompt, question or instruction; there are text"),
        ("", "the data set is empty"),
    ],
)
def test_a_bad_file_of_prompts_is_refused_with_the_line(
    text: str, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(loram.UserError, match=message):
        loram.generate(tiny_llama, path)


def test_options_that_say_nothing_together_are_refused(tiny_llama: Path) -> None:
    for options, message in (
        ({"temperature": 0.5}, "temperature: is for drawn tokens; add do_sample"),
        ({"stream": True, "load_in_4bit": True}, "what is streamed is never loaded"),
        ({"max_new_tokens": 0}, "greater than 0"),
    ):
        with pytest.raises(loram.UserError, match=message):
            loram.generate(tiny_llama, PROMPTS, **options)
    with pytest.raises(loram.UserError, match="there is no prompt"):
        loram.generate(tiny_llama, [])


def test_the_template_says_what_ends_a_turn(tokenizer: Any) -> None:
    assert Renderer(tokenizer).end_of_turn == "<|im_end|>"
    other = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    other.chat_template = "{% for message in messages %}{{ message['content'] }} </turn>{% endfor %}"
    assert Renderer(other).end_of_turn == ""
