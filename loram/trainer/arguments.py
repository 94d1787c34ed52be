"""Options that go on to a library's own class of options, by their names there."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loram.base.errors import UserError
from loram.base.names import in_recipe


def check_names(given: Iterable[str], known: Sequence[str], section: str, library: str, place: str) -> None:
    """Refuse options that a library does not have.

    Args:
        given: names of options.
        known: those that there are.
        section: what the message calls the place they stand in.
        library: what it calls the class that would take them.
        place: that place in a recipe.

    Raises:
        UserError: names the first unknown one, and what it is called here or what is nearest.
    """
    for key in given:
        if key not in known:
            hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(key, known, n=1))
            if ours := in_recipe(key, place, known):
                hint = f"; here it is called {ours}"
            raise UserError(f"{section}: {library} of this version has no option {key!r}{hint}")


def as_user_error(error: Exception, stage: str = "train") -> UserError:
    """What a library says of a bad value, in one line."""
    return UserError(f"{stage}: {str(error).splitlines()[0]}")


def checkpointing(trainer: Mapping[str, Any], *, default: bool, known: Sequence[str]) -> dict[str, bool | None]:
    """Activation checkpointing under the name this version of transformers has; newer ones deprecate the older name."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    value = trainer.get(new, trainer.get(old, default))
    return {new: value, old: None} if new in known else {old: value}


def checkpoints_activations(arguments: Any) -> bool:
    """Whether a Trainer's arguments ask for activation checkpointing, by the name this version has for it."""
    return bool(getattr(arguments, "activation_checkpointing", arguments.gradient_checkpointing))


def option_names(config: Any) -> list[str]:
    """What a dataclass of options takes."""
    return [field.name for field in dataclasses.fields(config) if field.init]
