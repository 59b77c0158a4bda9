"""Where a small copy of the picture is wrong: for sharp tokens beside an overview."""

from __future__ import annotations

import numpy as np

from .. import overview
from .cells import Grid, rgb_pixels, saturate, whole_cells

FACTOR = 4  # of the overview that is meant where there is none


class Residual:
    """A selector: what the picture loses when it is scaled down by `factor` a side and up again; 16 grey levels
    of error in a cell (root mean square) score 0.63.

    Beside an overview `factor` is that of the overview, whatever it was made with. Without one, it is a detail score:
    unlike "detail", it passes over whatever is smooth at the scale of a token. Half a grey level is rounding and counts
    as none. See `overview.residual`.
    """

    def __init__(self, factor: int = FACTOR) -> None:
        self.factor = factor
        self.label = "residual"

    def __call__(self, image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
        error = overview.residual(whole_cells(rgb_pixels(image, "residual"), grid), grid, self.factor)
        return saturate(np.sqrt(np.maximum(error**2 - 0.25, 0)) / 16)


residual = Residual()
