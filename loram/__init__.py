"""LoRAM: train a LoRA adapter on a pruned model, recover it for the full one (arXiv 2502.13533).

`import loram` also teaches transformers' Auto classes to load pruned folders.
"""

import sys
from pathlib import Path

# Importing torch and transformers takes seconds. The command line, which answers `--help` and `estimate` at once,
# imports what it needs when it needs it; everybody else gets the whole spine here.
if Path(sys.argv[0]).stem != "loram":
    from loram.align.stage import align
    from loram.errors import UserError
    from loram.estimate import Estimate, estimate
    from loram.evaluate import Report, evaluate
    from loram.merge import merge
    from loram.model.plan import PruningPlan
    from loram.model.pruned import load_pruned
    from loram.model.resize import narrow, widen
    from loram.polish import PolishOptions, polish
    from loram.prune.stage import prune
    from loram.quantize import quantize
    from loram.recover import recover
    from loram.teach import teach
    from loram.train import train

__all__ = [
    "Estimate",
    "PolishOptions",
    "PruningPlan",
    "Report",
    "UserError",
    "align",
    "estimate",
    "evaluate",
    "load_pruned",
    "merge",
    "narrow",
    "polish",
    "prune",
    "quantize",
    "recover",
    "teach",
    "train",
    "widen",
]
