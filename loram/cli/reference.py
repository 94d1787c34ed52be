"""The reference page of all options, made from their declarations: `make reference` writes it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from loram.base.options import (
    Options,
    extra_of,
    fields_below,
    flag_of,
    has_flag,
    has_opposite,
    named_in,
    plain_type,
    section_at,
    section_in,
    without_none,
)
from loram.cli.commands import COMMANDS
from loram.cli.flags import Flag
from loram.data.spec import CacheSpec, DataSpec, WeightedSpec
from loram.generation.options import ChatOptions, GenerateOptions
from loram.planner.settings import PRUNING, TRAINING
from loram.run.recipe import Recipe

_INTRODUCTION = """# Options

<!-- This page is generated: `make reference` writes it, and a test fails when it is stale. -->

Every option has one name. A recipe has it as a key in the section of its stage, the command of the stage has it as a
flag, and the Python function of the stage takes it as a keyword argument. In a recipe's sections `lora` and `trainer`,
any option of the named library may stand; the tables list those that have a default or a flag here. On the command
line these are written as `--lora name=value` and `--trainer name=value`.
"""
_ALONE = (GenerateOptions, ChatOptions)  # classes of options that no recipe has
_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
_SIGNS = {Gt: (">", "gt"), Ge: ("≥", "ge"), Lt: ("<", "lt"), Le: ("≤", "le")}


def page() -> str:
    """Return the whole page, in Markdown."""
    sections: dict[str, list[tuple[str, FieldInfo]]] = {}
    for place, name, field in fields_below(Recipe):
        sections.setdefault(place, []).append((name, field))
    parts = [_INTRODUCTION]
    for place, fields in sections.items():
        title = f"## `{place}`" if place else "## The whole run"
        parts.append("\n".join([title, "", *_summary(place), "", *_options(place, fields)]))
    for command in _ALONE:
        parts.append("\n".join([f"## `loram {command.stage}`", "", *_alone(command)]))
    parts += ["\n".join(_data_sets()), "\n".join(_commands()), "\n".join(_planner()), "\n".join(_other_names())]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _summary(place: str) -> Iterator[str]:
    """Yield the sentence about a section, as its declaration has it."""
    if not place:
        yield "These keys stand at the top of a recipe."
        return
    *parents, last = place.removesuffix(".NAME").split(".")
    parent = section_at(parents, Recipe)
    assert parent is not None
    field = parent.model_fields[last]
    library = extra_of(field).get("library")
    yield (
        f"Options of {library}, under its own names. Any other option of it may stand here, too."
        if library
        else (_help(field))
    )


def _options(place: str, fields: Iterable[tuple[str, FieldInfo]]) -> Iterator[str]:
    flags = _flags_at(place)
    yield from _table("key", "flag", "value", "default", "what it does")
    for name, field in fields:
        below = named_in(field) or section_in(field.annotation)
        section = below is not None and issubclass(below, Options)
        value = f"[section](#{_anchor(place, name, field)})" if section else _value(field)
        flag = "" if section and named_in(field) is None else _flag(name, field, flags)
        yield _row(f"`{name}`", flag, value, "" if section else _default(field), _help(field))


def _alone(options: type[Options]) -> Iterator[str]:
    yield "No recipe has these options: they are flags of the command, and keyword arguments in Python.\n"
    yield from _options(options.stage, options.model_fields.items())


def _anchor(place: str, name: str, field: FieldInfo) -> str:
    """Return the anchor that code hosts and the docs site give to the heading of a section."""
    chosen = "name" if section_in(field.annotation) and get_origin(field.annotation) is dict else ""
    return f"{place}{name}{chosen}".replace(".", "").lower()


def _flags_at(place: str) -> set[str]:
    """Return the names of the flags that the command of a section has; at the top those of all commands."""
    stage = section_at(place.split(".")[:1], Recipe) if place else None
    name = getattr(stage, "stage", "") or place.split(".")[0]
    commands = COMMANDS.values() if not place else [COMMANDS[name]] if name in COMMANDS else []
    arguments = {argument.name.upper() for command in commands for argument in command.arguments}
    return {flag.name for command in commands for flag in command.flags} | arguments


def _flag(name: str, field: FieldInfo, flags: set[str]) -> str:
    flag = flag_of(name, field)
    if not has_flag(field) or flag not in flags:
        return ""
    if flag.isupper():
        return f"`{flag}`"
    return f"`--{flag}`, `--no-{flag}`" if has_opposite(field) else f"`--{flag}`"


def _value(field: FieldInfo) -> str:
    """Return a type and its bounds in words: `integer > 0`."""
    kind = without_none(field.annotation)
    limits = [*(get_args(kind)[1:] if get_origin(kind) is Annotated else ()), *field.metadata]
    bounds = [
        f"{sign} {getattr(limit, key):g}"
        for limit in limits
        for kind_, (sign, key) in _SIGNS.items()
        if isinstance(limit, kind_)
    ]
    return " ".join([_in_words(plain_type(field.annotation)), " and ".join(bounds)]).strip()


def _in_words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (list, tuple):
        return {
            str: "list of names",
            float: "list of numbers",
            WeightedSpec: "[data sets](#data-sets)",
            CacheSpec: "folders",
        }[parts[0]]
    if origin is dict:
        return "mapping of names to [data sets](#data-sets)" if section_in(kind) else "mapping"
    return "[data set](#data-sets)" if section_in(kind) else _TYPES[kind]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default in (None, (), {}):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _help(field: FieldInfo) -> str:
    return field.description or ""


def _data_sets() -> Iterator[str]:
    yield "## Data sets\n"
    yield "Where a data set is expected, a recipe has its path alone, or a mapping with these keys.\n"
    yield from _table("key", "flag", "value", "default", "what it does")
    flags = {flag.name for flag in COMMANDS["train"].flags}
    for name, field in WeightedSpec.model_fields.items():
        yield _row(f"`{name}`", _flag(name, field, flags), _value(field), _default(field), _help(field))


def _commands() -> Iterator[str]:
    yield "## Commands\n"
    yield "These flags and arguments belong to commands alone; all other flags are the options above.\n"
    known = {flag_of(name, field) for _, name, field in fields_below(Recipe)}
    known |= {flag_of(name, field) for options in _ALONE for name, field in options.model_fields.items()}
    known |= {flag_of(name, field) for name, field in DataSpec.model_fields.items()}
    yield from _table("command", "what it does", "flags of its own")
    for name, command in COMMANDS.items():
        line = " ".join([f"loram {name}", *(argument.name.upper() for argument in command.arguments)])
        own = [flag for flag in command.flags if flag.name not in known and flag.key not in TRAINING]
        summary = (command.call.__doc__ or "").partition("\n")[0]
        yield _row(f"`{line}`", summary, "; ".join(map(_described, own)))


def _described(flag: Flag) -> str:
    return f"`--{flag.name}`: {flag.help[:1].lower()}{flag.help[1:].rstrip('.')}"


def _planner() -> Iterator[str]:
    yield "## Options that the planner counts\n"
    yield "`loram estimate` has them as flags, `loram.estimate` as keyword arguments.\n"
    yield from _table("flag", "keyword argument", "in a recipe")
    for stage, options in (("prune", PRUNING), ("train", TRAINING)):
        for name, option in options.items():
            place = ".".join(part for part in (stage, option.section, option.name) if part)
            yield _row(f"`--{name.replace('_', '-')}`", f"`{name}`", f"`{place}`")


def _other_names() -> Iterator[str]:
    yield "## Names of other tools\n"
    yield "A recipe or a command that uses such a name is answered with ours.\n"
    yield from _table("elsewhere", "here")
    ours: dict[str, list[str]] = {}
    for place, name, field in fields_below(Recipe):
        for other in extra_of(field).get("also", ()):
            ours.setdefault(other, []).append(f"`{place}.{name}`".replace("`.", "`"))
    for other in sorted(ours):
        yield _row(f"`{other}`", ", ".join(ours[other]))


def _table(*headings: str) -> Iterator[str]:
    yield _row(*headings)
    yield _row(*("---" for _ in headings))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(), end="")
