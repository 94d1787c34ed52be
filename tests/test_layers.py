"""Imports run one way: cli -> pipeline -> stages -> data, artifacts, model. Read from the source, not by importing."""

import ast
from pathlib import Path

import loram

ROOT = Path(loram.__file__).parent
# A module may import from its own floor's allowed list only; a longer prefix wins.
FLOORS = {
    "loram.errors": 0,
    "loram.progress": 0,
    "loram.names": 0,
    "loram.processes": 0,
    "loram.data_spec": 1,
    "loram.artifacts": 1,
    "loram.model": 2,
    "loram.align.spec": 1,
    "loram.methods.table": 1,
    "loram.methods": 3,
    "loram.data": 3,
    "loram.likelihood": 3,
    "loram.correct": 3,
    "loram.anchors": 3,
    "loram.checkpoints": 3,
    "loram.loss": 3,
    "loram.liger": 3,
    "loram.options": 3,
    "loram.prune.counts": 3,
    "loram.prune.criteria": 3,
    "loram.prune.settings": 3,
    "loram.prune": 4,
    "loram.align": 4,
    "loram.train": 4,
    "loram.quantize": 4,
    "loram.recover": 4,
    "loram.merge": 4,
    "loram.polish": 4,
    "loram.evaluate": 4,
    "loram.teach": 4,
    "loram.estimate": 4,
    "loram.doctor": 4,
    "loram.recipe": 5,
    "loram.report": 5,
    "loram.record": 5,
    "loram.stages": 6,
    "loram.pipeline": 6,
    "loram.compare": 6,
    "loram.dry_run": 6,
    "loram.cli": 7,
    "loram.__main__": 8,
    "loram": 8,
}
STAGES = {
    "loram.prune",
    "loram.train",
    "loram.recover",
    "loram.merge",
    "loram.polish",
    "loram.evaluate",
    "loram.estimate",
    "loram.teach",
    "loram.quantize",
    "loram.align",
}


def floor(module: str) -> int:
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def stage(module: str) -> str | None:
    return next((name for name in STAGES if module == name or module.startswith(f"{name}.")), None)


def imports() -> list[tuple[str, str]]:
    found = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "loram":
                found.append((name, node.module))
                if node.module == "loram":  # from loram import progress: the module, not what loram re-exports
                    found[-1:] = [(name, f"loram.{alias.name}") for alias in node.names]
            elif isinstance(node, ast.Import):
                found.extend((name, alias.name) for alias in node.names if alias.name.split(".")[0] == "loram")
    return found


def test_imports_run_one_way() -> None:
    assert len(imports()) > 50
    wrong = [(name, used) for name, used in imports() if floor(used) > floor(name)]
    assert wrong == []


def test_stages_do_not_import_one_another() -> None:
    shared = {"loram.prune.counts", "loram.prune.settings"}  # how much stays, and what goes together: no stage
    pairs = [(name, used) for name, used in imports() if stage(name) and stage(used) and used not in shared]
    assert [(name, used) for name, used in pairs if stage(name) != stage(used)] == []


def test_what_travels_with_a_pruned_folder_needs_no_loram() -> None:
    assert [used for name, used in imports() if name == "loram.model.modeling_loram"] == []
