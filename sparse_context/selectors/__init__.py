"""What makes a token matter: scores in [0, 1] for each cell of a picture's token grid.

A selector is a function `(image, grid, generator) -> scores`. To add one, write it into a file here and give it a
line in `registry.SELECTORS`.
"""

from .cells import Grid, Selector
from .masks import Mask, mask
from .matting import Matting, matting
from .order import uniform_order
from .registry import SELECTORS, Blend, blend, resolve, user_mask
from .text import Text, text

__all__ = [
    "SELECTORS",
    "Blend",
    "Grid",
    "Mask",
    "Matting",
    "Selector",
    "Text",
    "blend",
    "mask",
    "matting",
    "resolve",
    "text",
    "uniform_order",
    "user_mask",
]
