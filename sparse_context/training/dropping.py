"""Which reference tokens a training batch keeps: drawn anew for each, and the same for all its samples.

Random dropping alone may teach a model to fill every gap from its neighbours, so that clustered selections get worse
(docs/benchmarks/quality.md says where it did and where not). So a batch draws a kind of set from a mix: scattered, in
blobs, in bands, along edges, on the salient part, around an object. A kind is a selector like those of
selectors/registry.py and is cut by the same budget, so training and inference share one mechanism. To add one, write a
function and give it a line in `DROPS`.

A set may have an overview of each reference in it, which the same budget counts, as at inference.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config import SparseContextConfig
from ..overview import COARSEST, FINEST, LAYOUTS, overview_grid
from ..selection import Selection, select_tokens
from ..selectors.cells import Grid, Selector
from ..selectors.registry import SELECTORS
from ..trained import Trained


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
    "residual": SELECTORS["residual"],
    "inside": inside,
    "outside": outside,
}

MIX = {"random": 0.4, "blobs": 0.15, "bands": 0.05, "edges": 0.15, "saliency": 0.15, "outside": 0.1}
"""The default shares. Not tuned: random as in the paper, and more than that of clustered and selector-shaped sets."""

FEW = 0.15
"""Where overviews are trained, as many ratios lie below this as above: with them so few tokens are of use."""

FEWEST = 0.1
"""No rarer is either side of `FEW`, among the sets that may lie on both."""


@dataclass(frozen=True)
class Dropping:
    """How batches drop. Raises ValueError that names the field and its value.

    keep_min, keep_max: the range of the keep ratio, in (0, 1]; it is log-uniform, and each reference draws its own.
    dense: the share of batches, in [0, 1], that keep all tokens. mix: the share of each kind of `DROPS` among the
    others, any numbers of 0 or more. coverage: shares of evenly spread tokens, in [0, 1], of which a batch draws one.
    merge: the same for shares of averages, each as in `SparseContextConfig`.

    overview_factors: of overviews, of which a batch draws one; none: there are no overviews. overview_layout: where
    they lie, of `overview.LAYOUTS`. Of the batches that drop, overview_none is the share without an overview, and
    overview_alone that with nothing beside it; in the others there are sharp tokens too. overview_residual: the share
    of these whose sharp tokens are those that the overview shows worst; `mix` chooses the others. The keep ratio counts
    both parts, so it is at least what the overview takes; as many ratios lie below `FEW` as above, as far as overviews
    leave the choice (`few_share`), log-uniform on either side.
    """

    keep_min: float = 0.05
    keep_max: float = 1.0
    dense: float = 0.1
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))
    coverage: Sequence[float] = (0.0, 0.1)
    merge: Sequence[float] = (0.0,)
    overview_factors: Sequence[int] = ()
    overview_layout: str = "spread"
    overview_none: float = 0.1
    overview_alone: float = 0.25
    overview_residual: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep_min <= self.keep_max <= 1:
            raise ValueError(
                f"The keep ratio runs from {self.keep_min!r} to {self.keep_max!r}: pass two numbers above 0 and up to "
                "1, the smaller one first."
            )
        for name in ("dense", "overview_none", "overview_alone", "overview_residual"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: pass a share of batches, from 0 to 1.")
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
        self._check_overviews()

    def _check_overviews(self) -> None:
        if not all(type(factor) is int and FINEST <= factor <= COARSEST for factor in self.overview_factors):
            raise ValueError(
                f"overview_factors is {list(self.overview_factors)!r}: pass whole numbers from {FINEST} to {COARSEST}."
            )
        if self.overview_layout not in LAYOUTS:
            raise ValueError(f"overview_layout is {self.overview_layout!r}: choose one of {', '.join(LAYOUTS)}.")
        if self.overview_none + self.overview_alone > 1:
            raise ValueError(
                f"overview_none is {self.overview_none!r} and overview_alone {self.overview_alone!r}, which is more "
                "than all batches: pass smaller shares."
            )
        if self.overview_factors and any(self.merge):
            raise ValueError(
                f"merge is {list(self.merge)!r} and overview_factors {list(self.overview_factors)!r}: leave one of the "
                "two out, for either shows what is not kept."
            )
        for factor in self.overview_factors:
            if factor**-2 > self.keep_max:
                raise ValueError(
                    f"overview_factors has {factor}, which takes {factor**-2:g} of the tokens, and keep_max is "
                    f"{self.keep_max!r}: pass a larger one, or a larger factor."
                )

    @property
    def few_share(self) -> float:
        """How often a ratio that may lie on either side of `FEW` lies below, so that half of all do: an overview that
        takes more is above it with all its sets, and one that takes less is below it where it is alone. But no side is
        ever left out."""
        coarse = sum(factor**-2 < FEW for factor in self.overview_factors) / max(1, len(self.overview_factors))
        beside = 1 - self.overview_none - self.overview_alone
        either = self.overview_none + beside * coarse
        wanted = (0.5 - self.overview_alone * coarse) / either if either else 0.5
        return min(max(wanted, FEWEST), 1 - FEWEST)

    def trained(self, kv: bool = False) -> Trained:
        """What weights are trained for by this."""
        factors = tuple(self.overview_factors) if self.dense < 1 and self.overview_none < 1 else ()
        alone = [factor**-2 for factor in factors if self.overview_alone]
        keep = min([self.keep_min, *alone]), self.keep_max
        return Trained(factors, self.overview_layout if factors else "spread", kv, keep)


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
    places = rng.random(len(grids))
    seed_of_selection = int(rng.integers(2**31))
    drawn = rng.random()
    merge = float(rng.choice(np.asarray(dropping.merge, float)))
    factor, alone, wrong = _draw_overview(dropping, rng)
    pictures = [each[int(drawn * len(each))] if isinstance(each, Sequence) and each else each for each in pictures]
    if wrong:
        kind, coverage = "residual", 0.0
    config = SparseContextConfig(
        keep=1.0 if dense else _ratios(dropping, places, grids, factor, alone),
        selector=_named(kind),
        overview=factor,
        overview_layout=dropping.overview_layout,
        coverage=0.0 if kind in ("random", "uniform") else coverage,
        merge=merge,
        seed=seed_of_selection,
    )
    return select_tokens(pictures, grids, config)


def _draw_overview(dropping: Dropping, rng: np.random.Generator) -> tuple[int | None, bool, bool]:
    """The factor of a batch's overviews, or None; whether they are alone; whether sharp tokens are where they are
    wrong."""
    if not dropping.overview_factors:
        return None, False, False
    factor = int(rng.choice(np.asarray(dropping.overview_factors)))
    part, wrong = rng.random(), rng.random() < dropping.overview_residual
    if part < dropping.overview_none:
        return None, False, False
    return factor, part < dropping.overview_none + dropping.overview_alone, wrong


def _ratios(
    dropping: Dropping, places: np.ndarray, grids: Sequence[Grid], factor: int | None, alone: bool
) -> list[float]:
    """The keep ratio of each reference, at its place in [0, 1) among those that may be drawn: at least what its
    overview takes, or just that."""
    ratios = []
    for place, (rows, columns) in zip(places.tolist(), grids, strict=True):
        low, high = dropping.keep_min, dropping.keep_max
        if factor is not None:
            coarse = overview_grid((rows, columns), factor)
            takes = coarse[0] * coarse[1] / (rows * columns)  # more than 1 / factor**2 where the last cells are cut
            low, high = (takes, takes) if alone else (max(low, takes), max(high, takes))
        if dropping.overview_factors and low < FEW < high:
            few = dropping.few_share
            low, high, place = (low, FEW, place / few) if place < few else (FEW, high, (place - few) / (1 - few))
        ratio = math.exp(math.log(low) + (math.log(high) - math.log(low)) * place)
        ratios.append(min(max(ratio, low), high))
    return ratios


def _named(kind: str) -> str | Selector:
    """A name where selectors/registry.py has the kind too, else the function."""
    return kind if kind in SELECTORS else DROPS[kind]
