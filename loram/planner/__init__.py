"""What pruning, training and recovering a model need, from its config.json alone. No weights, no torch."""

from loram.base.size import parse_size, show_size
from loram.planner.fit import Fit, fit
from loram.planner.total import Estimate, estimate

__all__ = ["Estimate", "Fit", "estimate", "fit", "parse_size", "show_size"]
