"""From the trained grid to a deployed cell: evaluate every layer and dim in one encode, choose one, cut the model."""

from .choose import Cell, Choice, choose
from .evaluator import GridEvaluator
from .grid import Grid
from .profile import Profile, profile
from .truncate import truncate_model

__all__ = ["Cell", "Choice", "Grid", "GridEvaluator", "Profile", "choose", "profile", "truncate_model"]
