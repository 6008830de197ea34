"""From the trained grid to a deployed cell: evaluate every layer and dim in one encode, and cut the model."""

from .evaluator import GridEvaluator
from .grid import Grid
from .truncate import truncate_model

__all__ = ["Grid", "GridEvaluator", "truncate_model"]
