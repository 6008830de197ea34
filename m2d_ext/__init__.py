"""2D Matryoshka training of sentence embeddings: every layer × every dimension at the cost of a plain step."""

from . import functional
from ._extension import build_info
from ._version import __version__
from .inference import GridEvaluator, truncate_model
from .losses import AdaptiveLayerLoss, Matryoshka2dLoss, MatryoshkaLoss, fuse

__all__ = [
    "AdaptiveLayerLoss",
    "GridEvaluator",
    "Matryoshka2dLoss",
    "MatryoshkaLoss",
    "__version__",
    "build_info",
    "functional",
    "fuse",
    "truncate_model",
]
