"""Which reference tokens a training batch keeps: drawn anew for each, and the same for all its samples.

Random dropping alone may teach a model to fill every gap from its neighbours, so that clustered selections get worse
(docs/benchmarks/quality.md says where it did and where not). So a batch draws a kind of set from a mix: scattered, in
blobs, in bands, along edges, on the salient part, around an object. A kind is a selector like those of
selectors/registry.py and is cut by the same budget, so training and inference share one mechanism. To add one, write a
function and give it a line in `DROPS`.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config import SparseContextConfig
from ..selection import Selection, select_tokens
from ..selectors.cells import Grid, Selector
from ..selectors.registry import SELECTORS


def blobs(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """One to three connected patches that grow from random tokens with ragged borders, whatever the picture shows.

    First-passage percolation (Hammersley and Welsh 1965): each cell has a random cost, smooth over some tokens, and the
    score falls with the order in which cells are reached. So at every budget each patch is connected (by sides).
    """
    rows, columns = grid
    coarse = generator.exponential(size=(-(-rows // 3) + 1, -(-columns // 3) + 1))
    cost = np.kron(coarse, np.ones((3, 3)))[:rows, :columns] + 0.3 * generator.random(grid) + 0.05
    starts = generator.choice(rows * columns, size=min(int(generator.integers(1, 4)), rows * columns), replace=False)
    front = [(0.0, int(cell)) for cell in starts]
    scores = np.zeros(rows * columns, np.float32)
    reached = np.zeros(rows * columns, bool)
    count = 0
    while front:
        at, cell = heapq.heappop(front)
        if reached[cell]:
            continue
        reached[cell], scores[cell] = True, 1 - count / scores.size
        count += 1
        row, column = divmod(cell, columns)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < rows and 0 <= c < columns and not reached[r * columns + c]:
                heapq.heappush(front, (at + float(cost[r, c]), r * columns + c))
    return scores.reshape(grid)


def bands(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """A straight band at a random angle and place: the score falls with the distance from its middle line."""
    rows, columns = grid
    y, x = np.mgrid[:rows, :columns]
    angle = generator.uniform(0, math.pi)
    through = generator.uniform(0, rows - 1), generator.uniform(0, columns - 1)
    away = np.abs((y - through[0]) * math.cos(angle) + (x - through[1]) * math.sin(angle))
    return (1 - away / (away.max() + 1)).astype(np.float32)


def inside(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """The object: what its mask (the picture's fourth channel) covers; without one, what is salient."""
    masked = image is not None and image.ndim == 3 and image.shape[2] == 4
    return SELECTORS["mask" if masked else "saliency"](image, grid, generator)


def outside(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """The complement of the object: everything but what `inside` scores."""
    return 1 - inside(image, grid, generator)


DROPS: dict[str, Selector] = {
    "random": SELECTORS["random"],
    "uniform": SELECTORS["uniform"],
    "blobs": blobs,
    "bands": bands,
    "edges": SELECTORS["edges"],
    "detail": SELECTORS["detail"],
    "saliency": SELECTORS["saliency"],
    "subject": SELECTORS["subject"],
    "inside": inside,
    "outside": outside,
}

MIX = {"random": 0.4, "blobs": 0.15, "bands": 0.05, "edges": 0.15, "saliency": 0.15, "outside": 0.1}
"""The default shares. Not tuned: random as in the paper, and more than that of clustered and selector-shaped sets."""


@dataclass(frozen=True)
class Dropping:
    """How batches drop. Raises ValueError that names the field and its value.

    keep_min, keep_max: the range of the keep ratio, in (0, 1]; it is log-uniform, and each reference draws its own.
    dense: the share of batches, in [0, 1], that keep all tokens. mix: the share of each kind of `DROPS` among the
    others, any numbers of 0 or more. coverage: shares of evenly spread tokens, in [0, 1], of which a batch draws one.
    merge: the same for shares of averages, each as in `SparseContextConfig`.
    """

    keep_min: float = 0.05
    keep_max: float = 1.0
    dense: float = 0.1
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))
    coverage: Sequence[float] = (0.0, 0.1)
    merge: Sequence[float] = (0.0,)

    def __post_init__(self) -> None:
        if not 0 < self.keep_min <= self.keep_max <= 1:
            raise ValueError(
                f"The keep ratio runs from {self.keep_min!r} to {self.keep_max!r}: pass two numbers above 0 and up to "
                "1, the smaller one first."
            )
        if not 0 <= self.dense <= 1:
            raise ValueError(f"dense is {self.dense!r}: pass the share of batches that keep all tokens, from 0 to 1.")
        for kind, share in self.mix.items():
            if kind not in DROPS:
                raise ValueError(f"There is no kind of dropping {kind!r}: choose from {', '.join(DROPS)}.")
            if not 0 <= share < math.inf:
                raise ValueError(f"The share of {kind!r} in the drop mix is {share!r}: pass a number of 0 or more.")
        if not sum(self.mix.values()) > 0:
            raise ValueError("The drop mix holds no share above 0: name at least one kind, such as random=1.")
        for name in ("coverage", "merge"):
            shares = getattr(self, name)
            if not len(shares) or not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"{name} is {list(shares)!r}: pass at least one share, each from 0 to 1.")


def draw_selection(
    dropping: Dropping,
    pictures: Sequence[np.ndarray | Sequence[np.ndarray] | None],
    grids: Sequence[tuple[int, int]],
    seed: Sequence[int],
) -> Selection:
    """The tokens that one batch keeps of its references.

    pictures, grids: as `selection.select_tokens` takes them; where the items of a batch have different pictures, one of
    the items is drawn, and the set, which all share, is what the selector says of that one: the mean of many would be a
    blot in the middle, whatever the kind. seed: whatever tells this batch from others, such as (seed, batch
    number, rank); equal seeds draw equal sets.
    """
    rng = np.random.default_rng(list(seed))
    kinds = [kind for kind, share in dropping.mix.items() if share > 0]
    shares = np.array([dropping.mix[kind] for kind in kinds], float)
    # All is drawn every time, so that one setting does not move the random numbers of another. (But of a single share
    # nothing is drawn, so one `coverage` and several have other sets.)
    dense = rng.random() < dropping.dense
    kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
    coverage = float(rng.choice(np.asarray(dropping.coverage, float)))
    low, high = math.log(dropping.keep_min), math.log(dropping.keep_max)
    ratios = np.exp(rng.uniform(low, high, len(grids))).clip(dropping.keep_min, dropping.keep_max)
    seed_of_selection = int(rng.integers(2**31))
    drawn = rng.random()
    merge = float(rng.choice(np.asarray(dropping.merge, float)))
    pictures = [each[int(drawn * len(each))] if isinstance(each, Sequence) and each else each for each in pictures]
    config = SparseContextConfig(
        keep=1.0 if dense else [float(ratio) for ratio in ratios],
        selector=_named(kind),
        coverage=0.0 if kind in ("random", "uniform") else coverage,
        merge=merge,
        seed=seed_of_selection,
    )
    return select_tokens(pictures, grids, config)


def _named(kind: str) -> str | Selector:
    """A name where selectors/registry.py has the kind too, else the function."""
    return kind if kind in SELECTORS else DROPS[kind]
