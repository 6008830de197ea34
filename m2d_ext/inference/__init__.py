"""From the trained grid to a deployed cell: evaluate every layer and dim in one encode, and cut the model."""

from .truncate import truncate_model

__all__ = ["truncate_model"]
