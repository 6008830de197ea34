"""Drop-in twins of sentence-transformers' Matryoshka losses."""

from .adaptive_layer import AdaptiveLayerLoss
from .fuse import fuse
from .matryoshka import MatryoshkaLoss
from .matryoshka_2d import Matryoshka2dLoss

__all__ = ["AdaptiveLayerLoss", "Matryoshka2dLoss", "MatryoshkaLoss", "fuse"]
