"""Flags made of options: one flag per field of a class of options, and the way back from flags to keyword arguments."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from loram.base.options import (
    Options,
    extra_of,
    flag_of,
    has_flag,
    has_opposite,
    help_of,
    named_in,
    plain_type,
    section_in,
)
from loram.run.recipe import parse_pair

COMMON, RUN = "Common options", "This run"  # the first group of a command's help, and the last


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag.

    Args:
        name: the name without dashes: `lora-r`.
        place: where its value goes among the keyword arguments of the command's function: ("lora", "r").
        type: int, float, bool, str, Path, a Literal, or list[str] for a flag that may be repeated.
        read: how the value that the parser gives becomes the option's.
        help: one sentence, with the default.
        metavar: what stands for the value in the help; None for the type's own name.
        group: the heading that it stands under in the help.
        required: whether the command needs it.
        negative: whether there is a flag for the opposite, too: for what is on, or left open, by default.
    """

    name: str
    place: tuple[str, ...]
    type: Any
    read: Callable[[Any], Any] = lambda value: value
    help: str
    metavar: str | None = None
    group: str
    required: bool = False
    negative: bool = False

    @property
    def key(self) -> str:
        """Its name as a Python name."""
        return self.name.replace("-", "_")


def flags_of(
    options: type[BaseModel], group: str, *, only: Iterable[str] = (), under: tuple[str, ...] = ()
) -> Iterator[Flag]:
    """Yield the flags of a class of options: its fields, then those of its sections; common ones have a heading.

    Args:
        options: the class.
        group: the heading of the options that are neither common nor in a section.
        only: the fields that get a flag; all fields if empty.
        under: where the values go; at the top level an option's keyword is its name on the command line.
    """
    for name, field in options.model_fields.items():
        if not has_flag(field) or (only and name not in only):
            continue
        named, section = named_in(field), section_in(field.annotation)
        if named is not None:
            library = f"Options of {extra_of(field)['library']}"
            yield from flags_of(named, library, under=(*under, name))
            yield _flag(name, field, library, under)
        elif section is not None and issubclass(section, Options):
            yield from flags_of(section, (field.description or "").rstrip("."), under=(*under, name))
        else:
            yield _flag(name, field, group, under)


def keywords(flags: Iterable[Flag], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that were given, as keyword arguments.

    Args:
        flags: the flags of the command.
        values: what the parser read: key -> value, None or empty where a flag was not given.

    Example: `--lora-r 4 --lora use_rslora=true` becomes {"lora": {"r": 4, "use_rslora": True}}.
    """
    arguments: dict[str, Any] = {}
    for flag in flags:
        if (value := values[flag.key]) in (None, []):
            continue
        *sections, name = flag.place
        target = arguments
        for section in sections:
            target = target.setdefault(section, {})
        read = flag.read(value)
        target[name] = {**target.get(name, {}), **read} if isinstance(read, dict) else read
    return arguments


def _flag(name: str, field: FieldInfo, group: str, under: tuple[str, ...]) -> Flag:
    plain, flag = plain_type(field.annotation), flag_of(name, field)
    single = Flag(
        name=flag,
        place=(*under, name) if under else (flag.replace("-", "_"),),
        type=plain,
        help=help_of(field),
        group=COMMON if extra_of(field).get("common") else group,
        required=field.is_required(),
        negative=has_opposite(field),
    )
    repeated = replace(single, type=list[str], metavar="<name>", help=f"{single.help} Repeatable.")
    origin = get_origin(plain)
    if origin is list:
        return repeated
    if origin is dict:
        return replace(repeated, metavar="<name=value>", read=lambda items: _pairs(items, f"--{flag}"))
    if origin is tuple and section_in(plain):  # data sets, or folders, each with an optional weight
        return replace(repeated, metavar="<path>", read=lambda items: [_weighted(item) for item in items])
    if section_in(plain):  # a data set, of which this flag gives the path
        return replace(single, type=str, metavar="<path>", place=(*single.place, "path"))
    return single


def of_several(flags: Iterable[Flag]) -> Iterator[Flag]:
    """Yield the flags of a data set where several may be named, each with an optional weight: `--dataset a=0.7`."""
    for flag in flags:
        if flag.place[-1] != "path":
            yield flag
            continue
        more = "Repeatable, each with its share of the rows, if you like: FILE=0.7; the other options are for all."
        yield replace(
            flag,
            type=list[str],
            metavar="<path>",
            help=f"{flag.help} {more}",
            read=lambda items: [_weighted(item) for item in items],
        )


def each_of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the data sets that the flags of `of_several` name, each with the options that are for all."""
    return [{**data, **one} for one in data["path"]]


def _pairs(items: list[str], flag: str) -> dict[str, Any]:
    """`name=value` of a repeatable flag; values are YAML, as in a recipe."""
    return dict(parse_pair(item, flag) for item in items)


def _weighted(text: str) -> dict[str, Any]:
    """`PATH=SHARE`, or a path alone."""
    path, _, share = text.rpartition("=")
    try:
        return {"path": path, "weight": float(share)} if path else {"path": text}
    except ValueError:
        return {"path": text}
