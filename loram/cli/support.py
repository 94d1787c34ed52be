"""The page of what each family loses and where its adapters go, made from the rows: `make reference` writes it."""

from collections.abc import Iterable

from loram.model.architecture import Architecture
from loram.model.families import ARCHITECTURES
from loram.training.experts import taken_for_experts

_INTRODUCTION = """# Families in detail

<!-- This page is generated: `make reference` writes it, and a test fails when it is stale. -->

This is what [pruning](../concepts/pruning.md) takes from each family, and where adapters go. The
[laws](../architecture.md#laws) are tested on a tiny model of each family; a test fails for a family that is in no such
test. [Supported models](models.md) says what is special about some.
"""
_COLUMNS = ("family", "what it loses", "adapters by default", "`target_modules` may name", "`target_parameters`")


def page() -> str:
    """Return the whole page, in Markdown."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join([_INTRODUCTION, *lines, *map(_line, ARCHITECTURES.values())]) + "\n"


def _line(row: Architecture) -> str:
    spaces = ", ".join(space.name.replace("_", " ") for space in row.spaces)
    others = [name for name in row.adapter_targets if name not in row.default_targets]
    named = [name for name in others if taken_for_experts([name], row) is None]
    tensors = _code(tensor.name for tensor in row.expert_matrices)
    cells = (row.model_type, spaces, _code(row.default_targets), _code([*named, row.head]), tensors)
    return f"| {' | '.join(cells)} |"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(page(), end="")
