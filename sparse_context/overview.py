"""Overview: a small copy of the whole reference, so that no region is ever blind.

A reference is scaled down by a factor `f` a side with an area filter, in pixels, and encoded by the same VAE: 1 / f**2
of its tokens. The rest of a budget goes to sharp tokens where the overview is wrong. Two layouts say where its tokens
lie:

- "spread": over the reference's own grid, each in the middle of the cells that it covers (`overview_ids`). An axis of
  the position ids that is free marks the scale, by the logarithm of the factor, so that attention can tell scales apart
  and by how much. Only weights that were trained for it understand this.
- "reference": as one more reference, after all others, with the ids that the host gives a picture of that size. A model
  that never saw two scales knows a downscaled picture as just that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    import torch

LAYOUTS = ("spread", "reference")
FINEST, COARSEST = 2, 16  # factors
VERY_LARGE = 128 * 128  # tokens of a reference, four megapixels of FLUX.2

ROUNDING = 1 / 12  # mean squared error of rounding to whole grey levels: what is below it counts as no error


@dataclass(frozen=True)
class Overview:
    """The overview of one reference: how many cells a side one of its tokens covers, its layout, and its own grid."""

    factor: int
    layout: str
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        """How many it takes of the budget."""
        return self.grid[0] * self.grid[1]

    def cells(self, usual: tuple[int, int], grid: tuple[int, int]) -> int:
        """How many cells a side of `grid` one of its tokens covers, about: its factor, where that is the `usual` one,
        and more where it is that of a larger picture."""
        return round(self.factor * math.sqrt(grid[0] * grid[1] / (usual[0] * usual[1])))


def overview_grid(grid: tuple[int, int], factor: int) -> tuple[int, int]:
    """Rows and columns of the overview of a reference with `grid` tokens: a last cell that is cut counts whole."""
    return -(-grid[0] // factor), -(-grid[1] // factor)


def factor_for(ratio: float, grid: tuple[int, int], task: str = "edit") -> int:
    """The factor that suits a task and a budget, the share of a reference's tokens that it may spend: what "auto" asks
    for.

    2 for an edit of the whole picture ("global") from a budget of 0.3 up; else 4, and 8 for references of four
    megapixels and more. Other tasks look at a part, which sharp tokens show better (docs/benchmarks/notebook.md).
    """
    if task == "global" and ratio >= 0.3:
        return 2
    return 8 if grid[0] * grid[1] >= VERY_LARGE else 4


def coarser(factor: int) -> int | None:
    """The next power of two above a factor, or None beyond the coarsest one."""
    above = 1 << int(factor).bit_length()
    return above if above <= COARSEST else None


# Pixels ---------------------------------------------------------------------------------------------------------------


def shrink(pixels: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """The overview's pixels: (B, C, H, W) -> (B, C, h, w), the mean of each `factor` x `factor` pixels, in float32.

    H and W hold `grid` tokens. What the last row and column of the overview lack is padded by reflection, so that
    h and w hold `overview_grid(grid, factor)` tokens of the same size in pixels.
    """
    from torch.nn.functional import avg_pool2d, pad

    below, right = _lacks(pixels.shape[-2:], grid, factor)
    pixels = pixels.float()
    if below or right:  # "reflect" takes less than the picture; a tiny one repeats its border
        reflects = below < pixels.shape[-2] and right < pixels.shape[-1]
        pixels = pad(pixels, (0, right, 0, below), mode="reflect" if reflects else "replicate")
    return avg_pool2d(pixels, factor)


def _lacks(size: Sequence[int], grid: tuple[int, int], factor: int) -> tuple[int, int]:
    """How many rows and columns of pixels a picture lacks to hold whole cells of its overview."""
    coarse = overview_grid(grid, factor)
    below, right = (
        cells * factor * (side // whole) - side for cells, side, whole in zip(coarse, size, grid, strict=True)
    )
    return below, right


def shrink_picture(image: np.ndarray, grid: tuple[int, int], factor: int) -> np.ndarray:
    """As `shrink` does for a tensor: uint8 (H, W, C) -> float32 (h, w, C) in grey levels."""
    below, right = _lacks(image.shape[:2], grid, factor)
    if below or right:
        reflects = below < image.shape[0] and right < image.shape[1]
        border = cv2.BORDER_REFLECT_101 if reflects else cv2.BORDER_REPLICATE
        image = cv2.copyMakeBorder(image, 0, below, 0, right, border)
    size = image.shape[1] // factor, image.shape[0] // factor
    return cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)


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
    size = (image.shape[0], image.shape[1])
    error = (image - enlarge(shrink_picture(image, grid, factor), size, factor)) ** 2
    height, width = size[0] // grid[0], size[1] // grid[1]
    cells = error.reshape(grid[0], height, grid[1], width, -1).mean((1, 3, 4))
    return np.sqrt(cells, dtype=np.float32)


def count_for(errors: np.ndarray, order: np.ndarray, psnr: float) -> int:
    """The fewest tokens of `order`, from its front, that have to be sharp for all pictures to reach `psnr` dB.

    errors: mean squared ones of the cells beside an overview, (pictures, cells), in grey levels; those that do not
    count are NaN. order: int64, all cells. With all of them sharp there is no error left.
    """
    counted = np.isfinite(errors)
    served = np.where(counted, errors, 0)[:, order].cumsum(axis=1, dtype=np.float64)
    left = (served[:, -1:] - np.concatenate([np.zeros((len(errors), 1)), served], axis=1)).clip(min=0)
    allowed = 255**2 / 10 ** (psnr / 10) * counted.sum(axis=1, keepdims=True) * (1 + 1e-9)
    return int(np.argmax((left <= allowed).all(axis=0)))


def psnr_of(errors: np.ndarray, sharp: np.ndarray) -> float:
    """The dB that the picture reaches where the cells `sharp` are; of several pictures, the worst one's.

    errors: as in `count_for`. An error below that of rounding counts as that: 58.9 dB is the most.
    """
    left = errors.copy()
    left[:, sharp] = 0 * left[:, sharp]  # NaN stays
    worst = max(float(np.nanmean(left, axis=1, dtype=np.float64).max()), ROUNDING)
    return 10 * math.log10(255**2 / worst)


# Position ids ---------------------------------------------------------------------------------------------------------


def overview_ids(
    ids: torch.Tensor, grid: tuple[int, int], factor: int, mark: tuple[int, float] | None = None
) -> torch.Tensor:
    """Position ids of an overview that is spread over its reference's grid, float32 (..., tokens, A).

    ids: (..., rows * columns, A) of the whole reference, row by row, evenly spaced. Cell i of the overview lies at
    i * factor + (factor - 1) / 2 of the reference's cells: in the middle of those that it covers. mark: (axis, unit),
    an axis that is free, to which unit * log2(factor) is added: by (0, 1.0) in FLUX.2, whose references lie at T = 10,
    20 ..., an overview by 4 of the first one lies at 12. One mark for all factors would tell an attention head that a
    token is coarse, and not how far from its middle the cells lie that it covers.
    """
    import torch

    row, column = (torch.arange(n, device=ids.device) * factor + (factor - 1) / 2 for n in overview_grid(grid, factor))
    spread = ids_at(ids, grid, row, column)
    if mark is not None:
        axis, unit = mark
        spread[..., axis] += unit * math.log2(factor)
    return spread


def ids_at(ids: torch.Tensor, grid: tuple[int, int], row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Position ids of the places at each of `row` (R,) and each of `column` (C,), float32 (..., R * C, A), row by row.

    ids: (..., rows * columns, A) of a whole reference, evenly spaced. The places are counted in its cells, from 0, and
    may lie anywhere between and beyond them.
    """
    import torch

    ids = ids.float().unflatten(-2, grid)
    first = ids[..., 0, 0, :]
    below = ids[..., 1, 0, :] - first if grid[0] > 1 else torch.zeros_like(first)
    right = ids[..., 0, 1, :] - first if grid[1] > 1 else torch.zeros_like(first)
    rows_apart, columns_apart = row[:, None] * below.unsqueeze(-2), column[:, None] * right.unsqueeze(-2)
    places = first[..., None, None, :] + rows_apart.unsqueeze(-2) + columns_apart.unsqueeze(-3)
    return places.flatten(-3, -2)


def spread_ids(
    ids: torch.Tensor,
    grids: Sequence[tuple[int, int]],
    overviews: Mapping[int, Overview],
    mark: tuple[int, float] | None = None,
) -> torch.Tensor:
    """Position ids (..., tokens, A) of overviews, one after another, that are spread over their references' grids.

    ids: (..., N, A) of all whole references, one after another, with these grids. overviews: by the number of their
    reference. mark: as in `overview_ids`.
    """
    import torch

    whole = ids.split([rows * columns for rows, columns in grids], dim=-2)
    parts = [overview_ids(whole[i], grids[i], each.factor, mark) for i, each in overviews.items()]
    return torch.cat(parts, dim=-2)
