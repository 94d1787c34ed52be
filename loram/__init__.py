"""LoRAM: train a LoRA adapter on a pruned model, recover it for the full one (arXiv 2502.13533).

The names below are loaded when they are first used (PEP 562), so `import loram` takes no time, and the command line
answers `--help` without torch. As soon as transformers is imported too, its Auto classes know pruned models, so loading
a pruned folder needs no `trust_remote_code`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from loram.alignment.align import align
    from loram.alignment.teach import teach
    from loram.base.errors import UserError
    from loram.compute.loading import load_pruned
    from loram.disk.push import Upload, push
    from loram.evaluation.evaluate import Report, evaluate
    from loram.evaluation.tasks import TaskReport, evaluate_tasks
    from loram.export.export import export_adapter
    from loram.export.merge import merge
    from loram.export.quantize import quantize
    from loram.generation.chat import chat
    from loram.generation.generate import Generated, generate
    from loram.model.plan import PruningPlan
    from loram.model.resize import narrow, widen
    from loram.planner import Estimate, estimate
    from loram.pruning.prune import prune
    from loram.recovery.recover import recover
    from loram.training.options import PolishOptions
    from loram.training.polish import polish
    from loram.training.train import train

_PLACES = {
    "Estimate": "planner",
    "Generated": "generation.generate",
    "PolishOptions": "training.options",
    "PruningPlan": "model.plan",
    "Report": "evaluation.evaluate",
    "TaskReport": "evaluation.tasks",
    "Upload": "disk.push",
    "UserError": "base.errors",
    "align": "alignment.align",
    "chat": "generation.chat",
    "estimate": "planner",
    "evaluate": "evaluation.evaluate",
    "evaluate_tasks": "evaluation.tasks",
    "export_adapter": "export.export",
    "generate": "generation.generate",
    "load_pruned": "compute.loading",
    "merge": "export.merge",
    "narrow": "model.resize",
    "polish": "training.polish",
    "prune": "pruning.prune",
    "push": "disk.push",
    "quantize": "export.quantize",
    "recover": "recovery.recover",
    "teach": "alignment.teach",
    "train": "training.train",
    "widen": "model.resize",
}

__all__ = [
    "Estimate",
    "Generated",
    "PolishOptions",
    "PruningPlan",
    "Report",
    "TaskReport",
    "Upload",
    "UserError",
    "align",
    "chat",
    "estimate",
    "evaluate",
    "evaluate_tasks",
    "export_adapter",
    "generate",
    "load_pruned",
    "merge",
    "narrow",
    "polish",
    "prune",
    "push",
    "quantize",
    "recover",
    "teach",
    "train",
    "widen",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value  # so that this function is asked once for each name
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion in a shell or a notebook."""
    return sorted({*globals(), *__all__})


def _teach_auto_classes(transformers: Any) -> None:
    """Called with transformers when it is imported, or at once where it is imported already."""
    from loram.model.families import MODEL_CLASSES
    from loram.model.modeling_loram import register
    from loram.model.wrappers import WRAPPED_CLASSES

    register(MODEL_CLASSES, WRAPPED_CLASSES)


register_post_import_hook(_teach_auto_classes, "transformers")
