"""What selectors share: the token grid, and from pixels to one number for each cell of it."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Grid = tuple[int, int]


Selector = Callable[[np.ndarray | None, Grid, np.random.Generator], np.ndarray]


def check_picture(image: np.ndarray | None, name: str) -> np.ndarray:
    """`image` itself, or the reason why the selector `name` cannot work with it."""
    if image is None:
        raise ValueError(
            f"The selector {name!r} needs the picture's pixels, but this reference was passed as latents: "
            "use 'uniform' or 'random', or pass the picture."
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or image.size == 0:
        raise ValueError(
            f"The selector {name!r} got a picture of shape {image.shape} and type {image.dtype}: "
            "pass uint8 (H, W, 3) or (H, W, 4)."
        )
    return image


def rgb_pixels(image: np.ndarray | None, name: str) -> np.ndarray:
    image = check_picture(image, name)
    return image if image.shape[2] == 3 else cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)


def luma_pixels(image: np.ndarray | None, name: str) -> np.ndarray:
    return cv2.cvtColor(rgb_pixels(image, name), cv2.COLOR_RGB2GRAY)


def whole_cells(image: np.ndarray, grid: Grid) -> np.ndarray:
    """A picture whose sides are divisible by the grid's: itself, as from every host, or scaled up to be so."""
    height, width = (-(-side // count) * count for side, count in zip(image.shape[:2], grid, strict=True))
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def cell_means(values: np.ndarray, grid: Grid) -> np.ndarray:
    """Mean of `values` (H, W) over each cell of the grid, float32 (rows, columns). Cells may split pixels."""
    rows, columns = grid
    height, width = values.shape
    size = min(columns, width), min(rows, height)  # OpenCV averages over areas only where it shrinks along both axes
    means = cv2.resize(values.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    if means.shape != (rows, columns):  # more tokens than pixels along an axis
        means = cv2.resize(means, (columns, rows), interpolation=cv2.INTER_NEAREST)
    return means


def saturate(amount: np.ndarray) -> np.ndarray:
    """Amounts from 0 up, in some fixed unit, as scores: 0 -> 0, 1 -> 0.63, 3 -> 0.95. Strictly rising: it ties none."""
    return -np.expm1(-amount)


def best_around(scores: np.ndarray) -> np.ndarray:
    """Of each cell the highest score in the 3x3 around it."""
    return cv2.dilate(scores, np.ones((3, 3), np.uint8))
