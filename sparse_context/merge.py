"""Merging: the tokens that a budget does not keep are averaged into some that it does, so that no region is lost."""

from __future__ import annotations

import math

import numpy as np

from .budget import rank_tokens


def merge_rest(scores: np.ndarray, count: int, merge: float, coverage: float = 0.0) -> np.ndarray:
    """Where each token of one reference goes if the rest is averaged instead of dropped: int64 (rows * columns,).

    The result names, for each token, the one of the `count` kept tokens that stands for it: for a token that is kept as
    it is, itself. `scores` is (rows, columns); one below 0 is of padding, and stands for nothing: -1, as for every
    token where `count` is 0.

    The grid is divided into about `merge` * `count` blocks, at least one, as square as that goes. The tokens of a block
    that are not kept become one, at the place of that one of them that is nearest to their middle. As many tokens as
    the budget then leaves are kept as they are, by their rank (`rank_tokens`): so there are exactly `count`, or fewer
    where padding leaves no more. With `merge` 1 next to all are averages. A block that is kept whole gives its place
    away.
    """
    rows, columns = scores.shape
    size = scores.size
    if count == 0:
        return np.full(size, -1)
    wanted = min(max(1.0, merge * count), float(count))
    short, long = sorted((rows, columns))
    few = max(1, round(math.sqrt(wanted * short / long)))
    many = max(1, min(round(wanted / few), long, count // few))
    high, wide = (few, many) if rows <= columns else (many, few)
    block = ((np.arange(rows) * high // rows)[:, None] * wide + np.arange(columns) * wide // columns).ravel()

    order = rank_tokens([scores], coverage)
    order = order[scores.ravel()[order] >= 0]
    last = np.zeros(high * wide, np.int64)  # how many tokens have to be kept for the block to be kept whole
    last[block[order]] = np.arange(1, len(order) + 1)  # of equal indices, numpy takes the last value
    # Keeping one token more makes one token more in all, or none where it is the last one of its block
    averages = np.count_nonzero(last) - np.cumsum(np.bincount(last[last > 0], minlength=len(order) + 1))
    sharp = int(np.searchsorted(np.arange(len(order) + 1) + averages, count, side="right")) - 1

    into = np.full(size, -1)
    into[order] = order
    rest = np.sort(order[sharp:])
    row, column = np.divmod(rest, columns)
    of = block[rest]
    members = np.maximum(np.bincount(of, minlength=len(last)), 1)
    middle = [np.bincount(of, weights=axis, minlength=len(last)) / members for axis in (row, column)]
    away = (row - middle[0][of]) ** 2 + (column - middle[1][of]) ** 2
    nearest_first = np.lexsort((rest, away, of))
    blocks, first = np.unique(of[nearest_first], return_index=True)
    stands_for = np.zeros(len(last), np.int64)
    stands_for[blocks] = rest[nearest_first[first]]
    into[rest] = stands_for[of]
    return into
