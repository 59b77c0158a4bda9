"""Selectors without a subject: at random, evenly spread, outlines and texture."""

from __future__ import annotations

import math

import cv2
import numpy as np

from .cells import Grid, cell_means, luma_pixels, saturate
from .order import uniform_order


def random(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """Chance: independent scores, uniform on [0, 1). What Sparse Context trains with (arXiv 2606.23682)."""
    return generator.random(grid, dtype=np.float32)


def uniform(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """Evenly spread, whatever the picture shows: 1 - rank / N by `uniform_order`. The kept sets are nested."""
    order = uniform_order(grid)
    return (1 - order / order.size).astype(np.float32)


def edges(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """Outlines: the length of Canny edges in each cell, in cell sides. One straight edge across a cell scores 0.63.

    For edits that keep the layout. Canny (1986), as OpenCV has it, on the blurred luma; the upper threshold is Otsu's
    (1979) over the picture's gradients, held between a step of 13 and one of 100 grey levels, so that noise on a flat
    picture is no edge and a strong edge does not hide a fair one; the lower threshold is 0.4 of it. The paper
    (arXiv 2606.23682) names Canny edges for editing and leaves the rest open.
    """
    luma = cv2.GaussianBlur(luma_pixels(image, "edges"), (5, 5), 0)
    across, down = cv2.spatialGradient(luma)  # int16, 2.5 per grey level of a sharp step
    steepness = (np.abs(across[::4, ::4]) + np.abs(down[::4, ::4])) // 2  # a sample is enough for a threshold
    otsu, _ = cv2.threshold(np.minimum(steepness, 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    upper = min(max(2 * otsu, 32), 256)
    lines = cv2.Canny(across, down, 0.4 * upper, upper)  # 255 on a line one pixel wide
    side = math.sqrt(lines.size / (grid[0] * grid[1]))  # of a cell, in pixels
    return saturate(cell_means(lines, grid) * (side / 255))


def detail(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """Local contrast: the standard deviation of luma in each cell; 32 of 255 grey levels score 0.63.

    The textbook measure of texture (RMS contrast; Peli 1990). Half a grey level is rounding and counts as none.
    """
    luma = luma_pixels(image, "detail").astype(np.float32)
    variance = cell_means(luma * luma, grid) - cell_means(luma, grid) ** 2
    return saturate(np.sqrt(np.maximum(variance - 0.25, 0)) / 32)
