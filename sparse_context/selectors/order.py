"""The evenly spread order: how ties break, and where coverage falls."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .cells import Grid


@lru_cache(maxsize=256)
def uniform_order(grid: Grid) -> np.ndarray:
    """Each cell's rank in an evenly spread order: int64 (rows, columns), a permutation of 0 ... rows * columns - 1.

    The grid is halved along its longer side, again and again, and every block hands its turns to its two halves in
    proportion to their sizes, rounded to the nearest. So among the first k cells, for *every* k, each half of the grid
    holds its share within 1/2, each quarter within 1, and every block of the halving within 3/2 (the error of a block
    is at most 1/2 plus its share, at most 2/3, of its parent's). On a square whose side is a power of two this is
    ordered dithering (Bayer 1973), whose first 4**n cells are a lattice; the halving extends it to any grid.
    The result is cached and read-only.
    """
    rows, columns = grid
    if rows < 1 or columns < 1:
        raise ValueError(f"A token grid of {rows} x {columns} holds no token: a reference has at least one.")
    extent = [np.full((rows, 1), rows), np.full((1, columns), columns)]  # rows and columns of each cell's block
    offset = [np.arange(rows)[:, None], np.arange(columns)[None, :]]  # of a cell within its block
    level = [0, 0]
    previous, was_late = -1, np.zeros((1, 1), bool)
    halvings = []  # from the whole grid down to single cells
    while extent[0].max() > 1 or extent[1].max() > 1:
        axis = int(extent[1].max() > extent[0].max())
        block = extent[0] * extent[1]
        near = (extent[axis] + 1) // 2
        far = offset[axis] >= near
        # Which half is served late alternates from level to level, else the first cells lie in a corner of their
        # blocks; and a halving into columns goes the other way in either half of the halving into rows before it, so
        # that a quarter is followed by the opposite one.
        late = far ^ (level[axis] % 2 == axis)
        if (previous, axis) == (0, 1):
            late = late ^ was_late
        late = late & (extent[axis] > 1)
        offset[axis] = np.where(far, offset[axis] - near, offset[axis])
        extent[axis] = np.where(far, extent[axis] - near, near)
        halvings.append((late, extent[0] * extent[1], block))
        level[axis] += 1
        previous, was_late = axis, late
    rank = np.zeros((rows, columns), np.int64)
    for late, half, block in reversed(halvings):  # a half's turn number j becomes a turn of its block
        turn = (2 * rank + 1) * block
        rank = np.where(late, turn // (2 * half), -(-turn // (2 * half)) - 1)
    rank.flags.writeable = False
    return rank
