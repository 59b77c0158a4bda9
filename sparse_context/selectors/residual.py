"""Where a small copy of the picture is wrong: for sharp tokens beside an overview."""

from __future__ import annotations

import cv2
import numpy as np

from .. import overview
from .cells import Grid, rgb_pixels, saturate

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


def whole_cells(image: np.ndarray, grid: Grid) -> np.ndarray:
    """A picture whose sides are divisible by the grid's: itself, as from every host, or scaled up to be so."""
    height, width = (-(-side // count) * count for side, count in zip(image.shape[:2], grid, strict=True))
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
