"""Raw rows of preferences -> two answers to one prompt, or one answer and whether it is a good one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loram.base.errors import UserError
from loram.data.forms import Chat, Example, normalise
from loram.data.reading import Row

_AROUND = ("system", "tools")  # the columns that belong to both answers
_LABELS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt, of which the first is preferred."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """An answer, and whether answers like it are desirable."""

    answer: Example
    desirable: bool


def read_pair(row: Row, form: Mapping[str, str], where: str) -> Pair | None:
    """Bring a raw row with a chosen and a rejected answer into the form that the rest of loram reads.

    Where there is no column for the prompt, or a text beside two conversations, the prompt is what both begin with.
    Texts without a prompt of their own are continued as they are, and do not become chats.

    Args:
        row: the raw row.
        form: our name of each column -> its name in the row.
        where: the place of the row, for messages.

    Returns:
        The row; None if an answer is empty, or both are the same, so that there is nothing to prefer.

    Raises:
        UserError: a value is missing, or not of the expected type, or both answers begin differently.
    """
    chosen, rejected = (_answer(row, form[ours], where) for ours in ("chosen", "rejected"))
    if not chosen or not rejected or chosen == rejected:
        return None
    prompt = row.get(form.get("prompt", ""))
    if "prompt" not in form or (isinstance(prompt, str) and isinstance(chosen, list)):
        prompt = _shared(chosen, rejected, f"{where}: {form['chosen']} and {form['rejected']}")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif form["prompt"] not in row:
        raise UserError(f"{where}: there is no {form['prompt']!r}")
    first, second = (
        normalise(
            {**row, "prompt": prompt, form[ours]: answer},
            {"prompt": "prompt", "completion": form[ours], **{name: form[name] for name in _AROUND if name in form}},
            where,
        )
        for ours, answer in (("chosen", chosen), ("rejected", rejected))
    )
    if first is None or second is None:
        return None
    if "prompt" in form:
        return Pair(chosen=first, rejected=second)
    return Pair(chosen=_as_written(first), rejected=_as_written(second))


def read_labelled(row: Row, form: Mapping[str, str], where: str) -> Labelled | None:
    """Bring a raw row with an answer and a label into the form that the rest of loram reads; as `read_pair`."""
    if form["label"] not in row:
        raise UserError(f"{where}: there is no {form['label']!r}")
    label = row[form["label"]]
    if (desirable := _LABELS.get(str(label).lower())) is None:
        raise UserError(f"{where}: {form['label']!r} should be true or false, but is {label!r}")
    answer = normalise(row, {ours: theirs for ours, theirs in form.items() if ours != "label"}, where)
    return None if answer is None else Labelled(answer=answer, desirable=desirable)


def _answer(row: Row, name: str, where: str) -> Any:
    """Return an answer of a raw row: a text or a list of messages, empty where it is null."""
    if name not in row:
        raise UserError(f"{where}: there is no {name!r}")
    answer = "" if row[name] is None else row[name]
    if not isinstance(answer, str | list):
        raise UserError(f"{where}: {name!r} should be text or a list of messages, but is {answer!r}")
    return answer


def _shared(chosen: Any, rejected: Any, what: str) -> Any:
    """Return what two answers begin with: messages, or a text up to before a blank.

    Raises:
        UserError: they have nothing in common at the start, or one is text and the other a conversation; begins with
            `what`.
    """
    if type(chosen) is not type(rejected):
        raise UserError(f"{what} should both be text or both be messages")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    length = next((index for index, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    if isinstance(chosen, str) and chosen[:length].endswith(" "):  # tokens begin with their blank
        length -= 1
    if not length:
        raise UserError(f"{what} do not begin with the same prompt; give the prompt a column of its own")
    return chosen[:length]


def _as_written(example: Example) -> Example:
    """Return a text that held its prompt as plain text: whatever made the data set has written it as a whole."""
    return example.plain if isinstance(example, Chat) and example.plain is not None else example
