"""Large references: sharp tokens of a picture that is larger than what its host makes of it, at the same budget.

Hosts scale a reference down, to about a megapixel. Where an overview shows the whole of that, sharp tokens need not:
they can be of the larger picture, as many as before, each of a smaller part. Their position ids span the same square,
and only what lies around them is encoded, in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .overview import ids_at
from .selectors.cells import Grid
from .tokens import ReferenceTokens

if TYPE_CHECKING:
    import torch

SIDE = 32  # tokens of a tile
BORDER = 4  # more tokens around it, for the VAE to look at; what it makes of these is thrown away


@dataclass(frozen=True, eq=False)
class Large:
    """A reference in a larger size.

    grid: rows and columns of its tokens. picture: what selectors look at, uint8 (H, W, 3 or 4) for each item of a
    batch. pixels: what the VAE gets, (B, 3, H, W). encode: from parts of these, (B, 3, h, w) each, to their tokens
    (B, N, C), one part after another.
    """

    grid: Grid
    picture: Sequence[np.ndarray]
    pixels: torch.Tensor
    encode: Callable[[Sequence[torch.Tensor]], torch.Tensor]


def large_grid(grid: Grid, token: int, size: tuple[float, float], max_pixels: int) -> Grid | None:
    """The token grid of a reference in at most `max_pixels`, or None where that is no larger than its `grid`.

    token: pixels a side. size: (height, width) of what there is of it, which is not enlarged.
    """
    rows, columns = grid
    area = rows * columns * token**2
    scale = min(math.sqrt(max_pixels / area), size[0] / (rows * token), size[1] / (columns * token)) + 1e-9
    larger = int(rows * scale), int(columns * scale)
    return larger if larger[0] * larger[1] > rows * columns else None


def large_ids(ids: torch.Tensor, grid: Grid, larger: Grid) -> torch.Tensor:
    """Position ids of a larger picture's tokens, float32 (..., tokens, A), from those of the usual one, (..., N, A).

    They span the same square: row i lies at (i + 0.5) / scale - 0.5 of the usual rows, in the middle of what it shows,
    as a token of an overview does.
    """
    import torch

    row, column = (
        (torch.arange(count, device=ids.device) + 0.5) * usual / count - 0.5
        for count, usual in zip(larger, grid, strict=True)
    )
    return ids_at(ids, grid, row, column)


class Tile(NamedTuple):
    """A part of a larger picture. rows, columns: of its tokens, with the border. numbers: int64, of all of these in the
    larger grid. wanted: bool, which of them are kept and no other tile's."""

    rows: slice
    columns: slice
    numbers: np.ndarray
    wanted: np.ndarray


def tiles(index: np.ndarray, grid: Grid, side: int = SIDE, border: int = BORDER) -> list[Tile]:
    """The parts to encode for the tokens at `index`, int64 flat indices into `grid`, row by row.

    The grid is divided into squares of `side` tokens. Of each that holds some, the box around these is a tile, with
    `border` more tokens on every side, as far as the picture goes.
    """
    row, column = np.divmod(index, grid[1])
    square = row // side * grid[1] + column // side
    numbers = np.arange(grid[0] * grid[1]).reshape(grid)
    made = []
    for each in np.unique(square):
        own = square == each
        rows, columns = (
            slice(max(0, int(place[own].min()) - border), min(count, int(place[own].max()) + border + 1))
            for place, count in ((row, grid[0]), (column, grid[1]))
        )
        inside = numbers[rows, columns].ravel()
        made.append(Tile(rows, columns, inside, np.isin(inside, index[own])))
    return made


def large_tokens(large: Large, index: np.ndarray, ids: torch.Tensor, grid: Grid) -> ReferenceTokens:
    """The tokens at `index` of a larger picture, in that order. ids: of the usual one's tokens, with `grid`."""
    import torch

    parts = tiles(index, large.grid)
    high, wide = (side // count for side, count in zip(large.pixels.shape[-2:], large.grid, strict=True))
    latents = large.encode(
        [
            large.pixels[..., part.rows.start * high : part.rows.stop * high, :][
                ..., part.columns.start * wide : part.columns.stop * wide
            ]
            for part in parts
        ]
    )
    numbers = np.concatenate([part.numbers for part in parts])
    placed = large_ids(ids, grid, large.grid).index_select(-2, torch.from_numpy(numbers).to(ids.device))
    wanted = np.flatnonzero(np.concatenate([part.wanted for part in parts]))
    kept = ReferenceTokens(latents, placed).keep(wanted)  # tile after tile
    order = torch.from_numpy(np.argsort(numbers[wanted]))
    return ReferenceTokens(
        kept.latents.index_select(1, order.to(latents.device)), kept.ids.index_select(-2, order.to(ids.device))
    )
