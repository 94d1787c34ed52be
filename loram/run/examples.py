"""How the full model answers held-out rows, before and after the training."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from loram.base.errors import UserError
from loram.data.forms import Chat
from loram.data.spec import DataSpec
from loram.data.tokens import load_rows
from loram.disk.opening import open_model
from loram.disk.template import as_setting
from loram.generation.generate import generate
from loram.generation.prompts import Prompt, prompt_of
from loram.run.report import Example
from loram.run.stages import Evaluated, Run, Stage, described, fingerprint

MAX_NEW_TOKENS = 100


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A held-out row: what comes before the answer, and the answer."""

    prompt: Prompt
    expected: str


def held_out_rows(spec: DataSpec, count: int) -> list[HeldOut]:
    """Return the first rows of a data set that end with an answer.

    Raises:
        UserError: there is no such row, such as in plain text.
    """
    answered = (
        HeldOut(prompt=prompt_of(chat, where), expected=str(chat.messages[-1]["content"]))
        for where, chat in load_rows(spec).placed()
        if isinstance(chat, Chat) and len(chat.messages) > 1 and chat.messages[-1]["role"] == "assistant"
    )
    if not (first := list(islice(answered, count))):
        raise UserError(f"evaluate.examples: {spec.path} has no row with a prompt and an answer; leave it out")
    return first


def examples_of(run: Run, final: Stage) -> tuple[Example, ...]:
    """Return the answers to the first rows of every evaluation data set, by the base and by what the run is about."""
    models = {"base": (run.base, None), final.row(run): final.evaluated(run)}
    return tuple(example for dataset in run.recipe.held_out for example in _of_dataset(run, dataset, models))


def _of_dataset(run: Run, dataset: str, models: dict[str, Evaluated]) -> tuple[Example, ...]:
    recipe, spec = run.recipe, run.recipe.held_out[dataset]
    opened = [open_model(model, chat_template=run.chat_template) for model, _ in models.values()]
    settings = {
        **as_setting(opened[0].chat_template),
        "dataset": described(spec),
        "max_new_tokens": MAX_NEW_TOKENS,
        "models": [model.fingerprint for model in opened],
        "adapters": [None if adapter is None else fingerprint(adapter) for _, adapter in models.values()],
    }
    count = recipe.examples
    name = f"answer {count} {'row' if count == 1 else 'rows'} of {dataset}"  # another number is another stage
    done = run.record.stage(name, settings, lambda: tuple(_answer(run, dataset, models)))
    return done.examples or ()


def _answer(run: Run, dataset: str, models: dict[str, Evaluated]) -> Iterator[Example]:
    spec, section = run.recipe.held_out[dataset], run.recipe.evaluate
    assert section is not None
    rows = held_out_rows(spec, section.examples)
    answers = {
        name: generate(
            model,
            [row.prompt for row in rows],
            adapter=adapter,
            max_new_tokens=MAX_NEW_TOKENS,
            apply_chat_template=spec.apply_chat_template,
            stream=section.stream,
            device=run.recipe.device,
            chat_template=run.chat_template,
        )
        for name, (model, adapter) in models.items()
    }
    for number, row in enumerate(rows):
        yield Example(
            dataset=dataset,
            prompt=str(row.prompt.chat.messages[-1]["content"]),
            expected=row.expected,
            answers={name: texts[number].text for name, texts in answers.items()},
        )
