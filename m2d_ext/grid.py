"""The weight grid: every recipe is a way to fill it."""

from typing import NamedTuple

from torch import Tensor


class Grid(NamedTuple):
    """What the loss asks of the pooled rows, in the order of the operators' arguments."""

    weights: Tensor  # W (L, K), float64 on the CPU
    kl_weights: Tensor  # V (L,), float64 on the CPU
    dims: tuple[int, ...]
    num_columns: int
    scale: float
    kl_temperature: float
    normalize: bool
    # What is added to the scale of a candidate's logit, but not of its gradient: another anchor's; an anchor's own
    # behind the positive.
    hardness: float = 0.0
    own_hardness: float = 0.0

    def active(self) -> tuple[list[int], "Grid"]:
        """The layers that matter and the grid over them alone. A final layer that teaches matters."""
        used = self.weights != 0
        layers = used.any(1) | (self.kl_weights != 0)
        # The teacher; and where nothing is asked, a loss of 0 that still has a gradient.
        layers[-1] |= bool((self.kl_weights != 0).any()) or not bool(layers.any())
        columns = used.any(0)
        columns[-1] |= not bool(columns.any())
        grid = self._replace(
            weights=self.weights[layers][:, columns].contiguous(),
            kl_weights=self.kl_weights[layers].contiguous(),
            dims=tuple(d for d, keep in zip(self.dims, columns.tolist(), strict=True) if keep),
        )
        return layers.nonzero().flatten().tolist(), grid
