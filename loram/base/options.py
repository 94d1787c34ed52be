"""Options, each declared once: name, type, default, bounds and one sentence of help.

A stage has one frozen class of options. Recipes, Python functions, the command line, the dry run, the planner and the
reference page all read that class, so an option is added in one place.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from loram.base.errors import UserError


class Options(BaseModel):
    """The base of every class of options: frozen, and without room for unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    stage: ClassVar[str] = ""  # what errors begin with

    @classmethod
    def of(cls, options: Self | None = None, **fields: Any) -> Self:
        """Make options from what a Python function takes: an object, single fields by name, or both. Fields win.

        Raises:
            TypeError: there is no field of such a name.
            UserError: a value is out of range, or two fields do not go together; one line names the first problem.

        Example: `PolishOptions.of(PolishOptions(max_length=64), max_steps=4)` has both.
        """
        known = {name: [name, *_aliases(field)] for name, field in cls.model_fields.items()}
        if unknown := sorted(fields.keys() - {name for names in known.values() for name in names}):
            hint = suggestion(unknown[0], list(known))
            raise TypeError(f"{cls.stage or cls.__name__}: unexpected keyword argument {unknown[0]!r}; {hint}")
        try:
            if options is not None:
                fields = {**{name: getattr(options, name) for name in options.model_fields_set}, **fields}
            return cls.model_validate(fields)
        except ValidationError as error:
            raise UserError(f"{cls.stage}: {explain(error, cls)}".removeprefix(": ")) from error


def option(
    default: Any,
    help: str,
    *,
    also: str = "",
    notes: Mapping[str, str] | None = None,
    hint: str = "",
    flag: str | None = None,
    common: bool = False,
    planned: bool = False,
    **field: Any,
) -> Any:
    """Declare an option: the value of a class attribute of an `Options` class.

    Args:
        default: its default.
        help: one sentence, for `--help` and the reference page.
        also: the names that other tools give it, separated by blanks; they are answered with ours.
        notes: what is added to that answer for some of these names: `{"use_dora": ": dora"}`.
        hint: what is added to the error for a value out of range.
        flag: its name on the command line without the dashes, where that is not its own name; "" for no flag, and
            capitals for an argument that has no flag.
        common: whether it comes first in `--help`.
        planned: whether the planner counts it; there, and in `loram estimate`, it is called as on the command line.
        field: bounds and other arguments of pydantic's `Field`: `gt`, `ge`, `lt`, `le`, `validation_alias`.
    """
    extra: dict[str, Any] = {
        "also": also.split(),
        "notes": dict(notes or {}),
        "hint": hint,
        "flag": flag,
        "common": common,
        "planned": planned,
    }
    return Field(default, description=help, json_schema_extra=extra, **field)


def passed_on(named: type[Options], library: str, help: str, *, others: str = "") -> Any:
    """Declare a mapping of options that go on to a library's own class, under that library's names.

    Args:
        named: the library's options that have a default or a flag here.
        library: the class that takes them, for messages: `PEFT's LoraConfig`.
        help: one sentence.
        others: further names of that library, separated by blanks, which are recognised on another level of a recipe.
    """
    extra: dict[str, Any] = {"library": library, "named": named, "others": others.split()}
    return Field(default_factory=dict, description=help, json_schema_extra=extra)


def library_defaults(config: Any) -> dict[str, Any]:
    """Return the defaults of a library's dataclass of options: name -> default."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }


def extra_of(field: FieldInfo) -> Mapping[str, Any]:
    """Return the notes that `option` or `passed_on` left at a field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, Mapping) else {}


def named_in(field: FieldInfo) -> type[Options] | None:
    """Return the class of the named options of a `passed_on` field; None for any other field."""
    named: type[Options] | None = extra_of(field).get("named")
    return named


def flag_of(name: str, field: FieldInfo) -> str:
    """Return the name of an option on the command line, without dashes before it; capitals for an argument.

    Example: of `r` in the section `train.lora` it is `lora-r`.
    """
    return (extra_of(field).get("flag") or name).replace("_", "-")


def has_flag(field: FieldInfo) -> bool:
    """Return whether an option has a flag of its own on the command line."""
    return extra_of(field).get("flag") != ""


def has_opposite(field: FieldInfo) -> bool:
    """Return whether an option also has a flag `--no-...`: it can be on, or is left open, by default."""
    return plain_type(field.annotation) is bool and field.default is not False


def without_none(annotation: Any) -> Any:
    """Return a type without `None`: `PositiveInt` for `PositiveInt | None`."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    return next(part for part in get_args(annotation) if part is not NoneType)


def plain_type(annotation: Any) -> Any:
    """Return a type without `None` and without bounds: `int` for `PositiveInt | None`."""
    given = without_none(annotation)
    return plain_type(get_args(given)[0]) if get_origin(given) is Annotated else given


def help_of(field: FieldInfo) -> str:
    """Return the sentence of an option with its default, unless the sentence says already what the default is."""
    text, default = field.description or "", field.default
    if field.is_required() or field.default_factory is not None or "(default: " in text:
        return text
    if default is None or default is False or default == () or isinstance(default, dict | BaseModel):
        return text
    return f"{text.removesuffix('.')} (default: {'yes' if default is True else default})."


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the first model class in a type such as `PruneOptions | None` or `tuple[DataSpec, ...]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := section_in(part))), None)


def fields_below(options: type[BaseModel], place: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield (place of the section, name, field) of every option in a class and in its sections, top down.

    Example: of a recipe, ("", "seed", ...), ("prune", "ratio", ...), ("train.lora", "r", ...); and
    ("compare.NAME", "base", ...), where the user chooses the name of a section.
    """
    for name, field in options.model_fields.items():
        yield place, name, field
        below = named_in(field) or section_in(field.annotation)
        if below is not None and issubclass(below, Options):
            chosen = ".NAME" if named_in(field) is None and get_origin(field.annotation) is dict else ""
            yield from fields_below(below, f"{place}.{name}{chosen}".lstrip("."))


def explain(error: ValidationError, options: type[BaseModel]) -> str:
    """Return the first problem of a validation as one line.

    Unknown names come first, since one of them may be why another is missing.

    Example: `max_steps: Input should be greater than 0 (max_steps is 0)`.
    """
    problem = first_problem_of(error)
    place = canonical(problem["loc"], options)
    where = ".".join(place)
    section = section_at(place[:-1], options) or options
    scalar = bool(place) and isinstance(problem["input"], str | int | float)
    if problem["type"] == "extra_forbidden":
        return f"{where}: {problem['msg']}; {suggestion(place[-1], list(section.model_fields))}"
    field = section.model_fields.get(place[-1]) if place else None
    if scalar and field is not None and (hint := extra_of(field).get("hint")):
        return f"{where} {problem['input']!r}: {hint}"
    message = f"{where}: {problem['msg']}".removeprefix(": ").replace("Value error, ", "")
    return f"{message} ({place[-1]} is {problem['input']!r})" if scalar else message


def canonical(place: Sequence[int | str], options: type[BaseModel]) -> list[str]:
    """Return a place below a class of options with fields' own names in place of their aliases."""
    names: list[str] = []
    for key in map(str, place):
        section = section_at(names, options)
        fields = {} if section is None else section.model_fields
        aliases = {alias: name for name, field in fields.items() for alias in _aliases(field)}
        names.append(aliases.get(key, key))
    return names


def _aliases(field: FieldInfo) -> list[str]:
    choices = field.validation_alias
    return [alias for alias in choices.choices if isinstance(alias, str)] if isinstance(choices, AliasChoices) else []


def first_problem_of(error: ValidationError) -> Mapping[str, Any]:
    """Return the problem of a validation that a user should hear of first."""
    return min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")


def section_at(place: Sequence[int | str], options: type[BaseModel]) -> type[BaseModel] | None:
    """Return the class of the section at a place below a class of options; None where there is no such section."""
    section: type[BaseModel] | None = options
    for key in place:
        if section is not None and str(key) in section.model_fields:
            section = section_in(section.model_fields[str(key)].annotation)
    return section


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
