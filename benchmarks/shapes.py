"""The problems that the benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One training step's hidden states: `layers` tensors (columns * batch, tokens, width), float32."""

    layers: int
    batch: int
    columns: int
    tokens: int
    width: int
    dims: tuple[int, ...]  # ascending

    @property
    def texts(self) -> int:
        return self.columns * self.batch

    @property
    def state_bytes(self) -> int:
        """Of all hidden states together; their gradients take as much again."""
        return 4 * self.layers * self.texts * self.tokens * self.width

    @property
    def peak_bytes_allowed(self) -> float:
        """Beyond the hidden states and their gradients: a few copies of the pooled rows, and fixed buffers."""
        return 2.5 * 4 * self.layers * self.texts * self.width + 16 * 2**20

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Shape:
        return cls(**data | {"dims": tuple(data["dims"])})

    def __str__(self) -> str:
        return f"L{self.layers}-B{self.batch}-C{self.columns}-T{self.tokens}-D{self.width}"


SMALL = Shape(layers=7, batch=64, columns=2, tokens=64, width=384, dims=(32, 64, 128, 256, 384))
BASE = Shape(layers=13, batch=64, columns=2, tokens=64, width=768, dims=(64, 128, 256, 512, 768))
MAIN_SHAPES = (SMALL, BASE)
# How the ratios move away from the main shapes: few and many texts (the similarities grow with the batch's square),
# short and long ones (the hidden states grow, the similarities do not).
MORE_SHAPES = tuple(
    replace(shape, **change)
    for shape in MAIN_SHAPES
    for change in ({"batch": 16}, {"batch": 256}, {"batch": 512}, {"tokens": 16}, {"tokens": 256})
)

# The share of tokens that is padding.
PADDINGS = {"none": 0.0, "half": 0.5}
SHARES = PADDINGS | {"a quarter": 0.25, "three quarters": 0.75}

# From the small shape without padding, one thing at a time; by value, the shape and its padding. An axis is measured
# in one process: memory is half as fast again in one as in the next, by the pages that it happened to get.
GROWTH: dict[str, dict[float, tuple[Shape, str]]] = {
    "layers": {n: (replace(SMALL, layers=n), "none") for n in (2, 4, 7, 13, 25)},
    "dims": {n: (replace(SMALL, dims=SMALL.dims[-n:]), "none") for n in (1, 2, 3, 4, 5)},
    "batch": {n: (replace(SMALL, batch=n), "none") for n in (16, 32, 64, 128, 256)},
    "tokens": {n: (replace(SMALL, tokens=n), "none") for n in (16, 32, 64, 128, 256)},
    "padding": {share: (SMALL, name) for name, share in sorted(SHARES.items(), key=lambda item: item[1])},
}
