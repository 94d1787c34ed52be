"""Names that other tools give to our options: axolotl, LLaMA-Factory, Unsloth, TRL, transformers.

The names stand where the options are declared (`also`, and `others` for a library's). Our own names are answered too,
where they stand in the wrong section of a recipe.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from loram.base.options import Options, extra_of, fields_below, flag_of, named_in


@dataclass(frozen=True, kw_only=True)
class _Match:
    """An option that somebody calls by the name that is looked for.

    Args:
        section, name: where it stands in a recipe, and what it is called there.
        flag: its name on the command line, without dashes.
        passed_on: whether it goes on to a library, so that it may also be written as `--trainer name=VALUE`.
        note: what there is to know about it.
    """

    section: str
    name: str
    flag: str
    passed_on: bool
    note: str = ""

    @property
    def stage(self) -> str:
        """The first part of its place."""
        return self.section.partition(".")[0]

    @property
    def place(self) -> str:
        """Its place in a recipe."""
        return f"{self.section}.{self.name}".lstrip(".")


def in_recipe(
    name: str, section: str = "", known: Collection[str] = (), *, root: type[Options], at: str = ""
) -> str | None:
    """Return what another tool's option is called in a recipe, with a note about it; None if no tool has this name.

    Args:
        name: a key as another tool has it, or one of ours on another level.
        section: where it stands; an option of this section is named by its last part alone.
        known: the keys of that section, which win over the same key elsewhere.
        root: the class whose options are searched, such as `Recipe`.
        at: the place of that class in a recipe.

    Examples: `lora_rank` is `train.lora.r`; in the section `train.lora` it is `r`.
    """
    matches = _matches(name, root, at, section.partition(".")[0])
    if any(f"{section}.".startswith(f"{match.place}.") for match in matches):
        return None  # the option is the section itself, or one around it
    for match in matches:
        if match.name in known or (section and match.section == section):
            return match.name + match.note
    return matches[0].place + matches[0].note if matches else None


def on_the_line(flag: str, flags: Collection[str], arguments: Collection[str], *, root: type[Options]) -> str | None:
    """Return what a flag that a subcommand does not know is called there; None if it has no such option.

    Args:
        flag: the flag as the user wrote it: `--lora-rank`.
        flags: the flags of the subcommand.
        arguments: the names of its arguments.
        root: the class whose options are searched, such as `Recipe`.

    Examples: `--lora-rank` of `loram train` is `--lora-r`; of `loram run` it is `train.lora.r=VALUE`.
    """
    if flag in flags:
        return None
    for match in _matches(flag.removeprefix("--").replace("-", "_"), root, "", ""):
        library = f"--{match.section.rpartition('.')[2]}"
        if "overrides" in arguments:
            return f"{match.place}=VALUE, without dashes{match.note}"
        if match.flag.lower() in arguments:
            return f"{match.flag}, an argument without a flag"
        if f"--{match.flag}" in flags:
            return f"--{match.flag}{match.note}"
        if match.passed_on and library in flags:
            return f"{library} {match.name}=VALUE{match.note}"
    return None


def _matches(name: str, root: type[Options], at: str, stage: str) -> list[_Match]:
    """Return the options with this name: first a stage's own, then those of training, then the others in order.

    Args:
        stage: the first part of the place where the name was written; "" for the top level and the command line.
    """
    return sorted(_everywhere(name, root, at), key=lambda match: (match.stage != stage, match.stage != "train"))


def _everywhere(name: str, root: type[Options], at: str) -> Iterator[_Match]:
    libraries = set()
    for section, ours, field in fields_below(root, at):
        if "NAME" in section:  # the name of such a section is the user's, so there is no place to point at
            continue
        extra, place = extra_of(field), f"{section}.{ours}".lstrip(".")
        if named_in(field) is not None:
            libraries.add(place)
        if name == ours or name in extra.get("also", ()):
            note = extra.get("notes", {}).get(name, "")
            yield _Match(
                section=section, name=ours, flag=flag_of(ours, field), passed_on=section in libraries, note=note
            )
        if name in extra.get("others", ()):
            yield _Match(section=place, name=name, flag=name.replace("_", "-"), passed_on=True)
