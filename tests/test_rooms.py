"""The rooms of the house stand on floors, and imports run down. Read from the source, not by importing."""

import ast
from pathlib import Path

import pytest

import loram

ROOT = Path(loram.__file__).parent
# From the ground up: a room imports itself and rooms of lower floors only.
FLOORS = (
    {"base"},
    {"model", "data"},
    {"disk"},
    {"compute"},
    {"trainer"},
    {"pruning", "alignment", "training", "recovery", "evaluation", "generation", "export"},
    {"planner"},
    {"run", "recipes"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Importing torch takes seconds, so what answers at once does not import it at the top of a module.
LIGHT = (
    *(
        "base",
        "planner",
        "cli",
        "recipes",
        "data/spec.py",
        "disk/lora_keys.py",
        "pruning/criteria.py",
        "training/methods/table.py",
    ),
    *(f"export/{name}.py" for name in ("__init__", "export", "merge", "options", "quantize", "table")),
    *(
        f"model/{name}.py"
        for name in ("architecture", "counts", "families", "geometry", "gguf_names", "packing", "sparsity")
    ),
)
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "safetensors", "numpy"}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def rooms_used(path: Path) -> set[str]:
    """The rooms that a module imports from, at its top or inside a function."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "loram":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loram."):
            used.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            used |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("loram.")}
    return used


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down(path: Path) -> None:
    upwards = {used for used in rooms_used(path) if used != room(path) and FLOOR[used] >= FLOOR[room(path)]}
    assert upwards == set()


def test_every_folder_is_a_room_on_a_floor() -> None:
    assert {room(path) for path in modules()} == FLOOR.keys()
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_what_answers_at_once_imports_nothing_heavy() -> None:
    heavy = []
    for path in modules():
        if str(path.relative_to(ROOT)).startswith(LIGHT):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                heavy += [(path.name, name) for name in names if name.split(".")[0] in HEAVY]
    assert heavy == []


def test_what_travels_with_a_pruned_folder_needs_no_loram() -> None:
    assert rooms_used(ROOT / "model" / "modeling_loram.py") == set()
