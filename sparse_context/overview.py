"""Overview: a small copy of the whole reference, so that no region is ever blind.

A reference is scaled down by a factor `f` a side with an area filter, in pixels, and encoded by the same VAE: 1 / f**2
of its tokens. They lie spread over the reference's own grid, each in the middle of the cells that it covers, and an
axis of the position ids that is free marks the scale. The rest of a budget goes to sharp tokens where the overview is
wrong.

Pipelines do not use overviews yet: the recipe of the embedded model (`recipes/mini`) does, which teaches it to read
them.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch.nn.functional import avg_pool2d, pad


def overview_grid(grid: tuple[int, int], factor: int) -> tuple[int, int]:
    """Rows and columns of the overview of a reference with `grid` tokens: a last cell that is cut counts whole."""
    return -(-grid[0] // factor), -(-grid[1] // factor)


def shrink(pixels: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """The overview's pixels: (B, C, H, W) -> (B, C, h, w), the mean of each `factor` x `factor` pixels.

    H and W hold `grid` tokens. What the last row and column of the overview lack is padded by reflection, so that
    h and w hold `overview_grid(grid, factor)` tokens of the same size in pixels.
    """
    rows, columns = overview_grid(grid, factor)
    cell = pixels.shape[-2] // grid[0], pixels.shape[-1] // grid[1]
    below, right = rows * factor * cell[0] - pixels.shape[-2], columns * factor * cell[1] - pixels.shape[-1]
    if below or right:  # "reflect" takes less than the picture; a tiny one repeats its border
        reflects = below < pixels.shape[-2] and right < pixels.shape[-1]
        pixels = pad(pixels, (0, right, 0, below), mode="reflect" if reflects else "replicate")
    return avg_pool2d(pixels, factor)


def overview_ids(
    ids: torch.Tensor, grid: tuple[int, int], factor: int, mark: tuple[int, float] | None = None
) -> torch.Tensor:
    """Position ids of an overview, float32 (tokens, A), from those of its reference.

    ids: (rows * columns, A) of the whole reference, row by row, evenly spaced. Cell i of the overview lies at
    i * factor + (factor - 1) / 2 of the reference's cells: in the middle of those that it covers. mark: (axis, what is
    added there), such as (0, 1.0) for FLUX.2, whose references lie at T = 10, 20 ...
    """
    rows, columns = grid
    ids = ids.float().unflatten(0, grid)
    below = ids[1, 0] - ids[0, 0] if rows > 1 else torch.zeros_like(ids[0, 0])
    right = ids[0, 1] - ids[0, 0] if columns > 1 else torch.zeros_like(ids[0, 0])
    coarse = overview_grid(grid, factor)
    row, column = (torch.arange(n, device=ids.device) * factor + (factor - 1) / 2 for n in coarse)
    spread = ids[0, 0] + row[:, None, None] * below + column[None, :, None] * right
    if mark is not None:
        spread[..., mark[0]] += mark[1]
    return spread.flatten(0, 1)


def enlarge(small: np.ndarray, size: tuple[int, int], factor: int) -> np.ndarray:
    """A shrunk picture at its former size (H, W) by cubic interpolation: what an overview shows.

    small: (h, w, C), uint8 or float32 in grey levels; so is what is returned, clipped to 0 ... 255.
    """
    height, width = small.shape[:2]
    large = cv2.resize(small, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC)
    return large[: size[0], : size[1]].clip(0, 255)  # cubic interpolation overshoots beside edges


def residual(image: np.ndarray, grid: tuple[int, int], factor: int) -> np.ndarray:
    """Where the overview is wrong: the root mean squared error of the enlarged one in each cell, in grey levels.

    image: uint8 (H, W, 3), with H and W divisible by the rows and columns of `grid`; raises ValueError for another.
    float32 (rows, columns), 0 where the overview shows all there is.
    """
    if image.shape[0] % grid[0] or image.shape[1] % grid[1]:
        raise ValueError(
            f"The picture is {image.shape[1]}x{image.shape[0]}, which {grid[0]} rows and {grid[1]} columns of tokens "
            "do not divide: crop it to whole tokens."
        )
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    small = shrink(pixels, grid, factor)[0].permute(1, 2, 0).numpy()
    error = (image - enlarge(small, image.shape[:2], factor)) ** 2
    height, width = image.shape[0] // grid[0], image.shape[1] // grid[1]
    cells = error.reshape(grid[0], height, grid[1], width, -1).mean((1, 3, 4))
    return np.sqrt(cells, dtype=np.float32)
