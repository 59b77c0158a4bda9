"""Selection: from the pictures of a call to the tokens that are kept of them, and a report of it.

This is the whole idea in one call, without a host: `select_tokens(images, grids, config)`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .budget import choose_tokens, rank_tokens, spread_out
from .config import TASKS, SparseContextConfig, task_defaults
from .merge import merge_rest
from .overview import Overview, count_for, psnr_of, residual
from .plan import Plan, enlarge_plan, plan_selection
from .selectors.cells import Grid, rgb_pixels, whole_cells
from .selectors.registry import SelectorLike, find_text, name_of, prepare, put_text, resolve
from .selectors.text import CPU, WHERE, Place
from .trained import Trained

if TYPE_CHECKING:
    from .large import Large

Pixels = np.ndarray | Sequence[np.ndarray] | None
"""A reference as its VAE sees it: uint8 (H, W, 3), or (H, W, 4) with a mask or alpha channel last; one for each item of
a batch; None where there are only latents."""

BELOW_ALL = np.float32(-1e-9)  # a selector's lowest score is 0; this adds nothing to the mass that "auto" measures


@dataclass(frozen=True, eq=False)
class Kept:
    """What was kept of one reference.

    `grid` is (rows, columns). `index` holds the kept tokens, sorted flat int64 indices into the grid, row by row.
    `into`, where the rest is averaged, names for each token the kept one that stands for it (`merge.merge_rest`).
    `scores` is float32 (rows, columns), all 1 where every token is kept and none was scored. `selector` is its label.
    `picture` is what the selector saw, uint8 (H, W, 3 or 4), or None where the host had only latents. `task` is the
    reference's own. `overview` is the small copy beside the sharp tokens, if any, and `psnr` the dB to which both show
    the picture, where keep was "auto". `usual` is the grid that the host has of it, where the sharp tokens are of a
    larger picture. `phrase` is what was looked for, and `found` how much each token shows of it, float32 (rows,
    columns) in [0, 1]; None where no phrase was read.
    """

    grid: Grid
    index: np.ndarray
    scores: np.ndarray
    selector: str
    picture: np.ndarray | None
    into: np.ndarray | None = None
    task: str = "auto"
    overview: Overview | None = None
    psnr: float | None = None
    usual: Grid | None = None
    phrase: str | None = None
    found: np.ndarray | None = None

    @property
    def total(self) -> int:
        """How many tokens the host makes of it."""
        return math.prod(self.usual or self.grid)

    @property
    def cells(self) -> int | None:
        """How many cells of `grid` a token of the overview covers a side."""
        return None if self.overview is None else self.overview.cells(self.usual or self.grid, self.grid)

    @property
    def count(self) -> int:
        """How many tokens are kept: the sharp ones of `index`, and those of the overview."""
        return len(self.index) + (self.overview.tokens if self.overview else 0)

    @property
    def mask(self) -> np.ndarray:
        """Bool (rows, columns): True where the token is kept."""
        mask = np.zeros(self.scores.size, bool)
        mask[self.index] = True
        return mask.reshape(self.grid)

    @property
    def averages(self) -> np.ndarray:
        """Those of `index` that are the mean of several tokens."""
        places, members = np.unique(self.stands_for, return_counts=True)
        return places[(members > 1) & (places >= 0)]

    @property
    def stands_for(self) -> np.ndarray:
        """Int64 (rows * columns,): `into`, or where the rest is dropped -1 for what is not kept."""
        if self.into is not None:
            return self.into
        return np.where(self.mask.ravel(), np.arange(self.scores.size), -1)


@dataclass(frozen=True, eq=False)
class Selection:
    """What was kept in one call: of each reference, by which task and coverage (one per reference), and what it cost.

    `seconds` is the wall time of scoring and choosing, without what is read once. `notes` is what the plan says of
    overviews that nobody asked for so, and of phrases: `remarks` has them.
    """

    references: tuple[Kept, ...]
    task: str
    coverage: tuple[float, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def index(self) -> np.ndarray:
        """The kept tokens of all references, sorted int64 indices into their tokens one after another: the sharp ones,
        where there are overviews, of larger pictures, where there are those."""
        starts = np.cumsum([0] + [kept.scores.size for kept in self.references])
        parts = [kept.index + start for kept, start in zip(self.references, starts, strict=False)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    @property
    def into(self) -> np.ndarray | None:
        """For each token of all references the kept one that stands for it, as in `Kept`; None: the rest is dropped."""
        if all(kept.into is None for kept in self.references):
            return None
        parts, start = [], 0
        for kept in self.references:
            stands_for = kept.stands_for
            parts.append(np.where(stands_for < 0, -1, stands_for + start))
            start += kept.scores.size
        return np.concatenate(parts)

    @property
    def kept(self) -> int:
        """How many tokens were kept, of all references, with those of their overviews."""
        return sum(kept.count for kept in self.references)

    @property
    def overviews(self) -> dict[int, Overview]:
        """The overviews, by the number of their reference, from 0."""
        return {i: kept.overview for i, kept in enumerate(self.references) if kept.overview}

    @property
    def total(self) -> int:
        """How many tokens there were, of all references."""
        return sum(kept.total for kept in self.references)

    def to_dict(self) -> dict[str, object]:
        """Counts, selectors, cost and `remarks`, for JSON. The arrays stay here."""
        return {
            "task": self.task,
            "kept": self.kept,
            "total": self.total,
            "seconds": self.seconds,
            "remarks": self.remarks,
            "references": [
                {
                    "grid": list(kept.usual or kept.grid),
                    "kept": kept.count,
                    "total": kept.total,
                    "selector": kept.selector,
                    "coverage": coverage,
                    "averages": len(kept.averages),
                    "overview": _overview_record(kept),
                    **({"large_grid": list(kept.grid)} if kept.usual else {}),
                    **({} if kept.found is None else {"phrase": kept.phrase, "found": bool(kept.found.any())}),
                }
                for kept, coverage in zip(self.references, self.coverage, strict=True)
            ],
        }

    def __str__(self) -> str:
        lines = []
        for i, (kept, coverage) in enumerate(zip(self.references, self.coverage, strict=True), start=1):
            spread = f", {coverage:.0%} of them spread evenly".replace("%", " %") if coverage else ""
            how = f" by {kept.selector}{spread}" if kept.count < kept.total or kept.overview else ""
            how += f", {len(kept.averages)} of them averages of the rest" if len(kept.averages) else ""
            if kept.overview:
                of = f" of {kept.scores.size} in a larger picture" if kept.usual else ""
                sharp = f", {len(kept.index)} sharp{of}{how}" if len(kept.index) else ""
                how = f": {kept.overview.tokens} of an overview by {kept.overview.factor}{sharp}"
                how += "" if kept.psnr is None else f", together {kept.psnr:.1f} dB"
            lines.append(f"reference {i}: {_tokens(kept.count, kept.total)}{how}")
        lines.append(f"total: {_tokens(self.kept, self.total)}, task {self.task}, in {1000 * self.seconds:.1f} ms")
        return "\n".join([*lines, *self.remarks])

    @property
    def remarks(self) -> list[str]:
        """What the report says besides the counts, where the user may have meant something else: a sentence each."""
        lines = []
        if any(k.task == "global" and k.count < k.total and not k.overview for k in self.references):
            lines.append("a global edit loses quality with every dropped token: keep all, or use keep='auto'")
        for i, kept in enumerate(self.references, start=1):
            if kept.selector == "mask" and not kept.scores.any():
                lines.append(f"the mask of reference {i} marks nothing, so its tokens are spread evenly")
            if kept.found is not None and not kept.found.any():
                blended = " + " in kept.selector.replace(repr(kept.phrase), "")
                then = "the other parts of its selector decide" if blended else "its tokens are spread evenly"
                lines.append(f"{kept.phrase!r} is nowhere in reference {i}, so {then}")
        return [*lines, *self.notes]


def _overview_record(kept: Kept) -> dict[str, object] | None:
    if kept.overview is None:
        return None
    return {
        "factor": kept.overview.factor,
        "layout": kept.overview.layout,
        "grid": list(kept.overview.grid),
        "kept": kept.overview.tokens,
        "psnr": kept.psnr,
    }


def _tokens(kept: int, total: int) -> str:
    return f"{kept} of {total} tokens ({kept / max(total, 1):.0%})".replace("%", " %")


class Score(Protocol):
    """How `select_tokens` scores one picture: `score_tokens`, or a cache that remembers what it gave."""

    def __call__(
        self, selector: SelectorLike, image: np.ndarray | None, grid: Grid, seed: Sequence[int], /
    ) -> np.ndarray: ...


def score_tokens(selector: SelectorLike, image: np.ndarray | None, grid: Grid, seed: Sequence[int]) -> np.ndarray:
    """The scores (rows, columns) of one picture, by anything that a config takes for a reference."""
    return resolve(selector)[1](image, grid, np.random.default_rng(seed))


def select_tokens(
    images: Sequence[Pixels],
    grids: Sequence[Grid],
    config: SparseContextConfig,
    shows_picture: Sequence[np.ndarray | None] | None = None,
    score: Score = score_tokens,
    trained: Trained | None = None,
    large: Callable[[int], Large | None] | None = None,
    place: Place = CPU,
) -> Selection:
    """Score the references of a call and choose the tokens to keep.

    `images` has each reference's pixels as the VAE sees them, uint8 (H, W, 3) or (H, W, 4) with a mask or alpha channel
    last, or None where there are only latents. Where each item of a batch has another picture, it is a list of these:
    the batch shares one index, so their scores are averaged. `grids` has each reference's token grid (rows, columns).
    `shows_picture`, where a host pads, has bool (rows, columns) for each reference, or None for all True: a token that
    shows nothing but padding is scored below all others. Reference i draws its random numbers from the seed and i
    alone. Where all tokens are kept, nothing is scored. `score` stands for `score_tokens`, for a cache that remembers
    scores; several threads call it at once, unless a selector is a function of the user's own. `trained` is what the
    weights that will see the tokens were trained for; None: for no overviews. `large(i)` is reference i in the larger
    size that the config asks for, or None where it has none; it is asked for those with an overview. `place` is where a
    model that finds phrases runs.

    Raises ValueError, in one sentence, for values that do not fit these references.
    """
    start = time.perf_counter()
    batches = _check_pictures(images, grids)
    plan = plan_selection(config, grids, [len(batch) > 0 for batch in batches], trained, place)
    plan, batches = _enlarge(plan, batches, config, large)
    reading = _prepare_selectors(plan.selectors)  # a net, once, which is not what choosing costs
    scores, found = score_references(plan, batches, config.seed, shows_picture, score)
    overviews, enough, errors = _enough(plan, batches, scores, config.psnr)
    index = choose_tokens(
        scores,
        plan.keep,
        share=config.share,
        floor=config.floor,
        coverage=plan.coverages,
        multiple_of=config.multiple_of,
        mass=config.mass,
        reserved=[overview.tokens if overview else 0 for overview in overviews],
        enough=enough,
        sizes=plan.sizes,
    )
    index, into = _merge(scores, index, config.merge, plan.coverages)
    pictures = [batch[0] if batch else None for batch in batches]
    reached = [None if error is None else psnr_of(error, sharp) for error, sharp in zip(errors, index, strict=True)]
    usual = [None if each == grid else each for each, grid in zip(plan.usual, plan.grids, strict=True)]
    texts = [None if selector is None else find_text(selector) for selector in plan.selectors]
    phrases = [None if text is None else text.phrases for text in texts]
    columns = index, scores, plan.labels, pictures, into, plan.tasks, overviews, reached, usual, phrases, found
    kept = tuple(map(Kept, plan.grids, *columns))
    task = config.task if isinstance(config.task, str) else ", ".join(dict.fromkeys(plan.tasks))
    least, most = trained.keep if trained is not None and trained.keep else (0.0, 1.0)
    count, total = sum(each.count for each in kept), sum(plan.sizes)
    if count < math.floor(least * total):
        plan.notes.append(f"the weights were trained with {100 * least:g} % of the tokens and more")
    elif math.ceil(most * total) < count < total:
        plan.notes.append(f"the weights were trained with {100 * most:g} % of the tokens and fewer")
    seconds = time.perf_counter() - start - reading
    return Selection(kept, task, tuple(plan.coverages), seconds, tuple(plan.notes))


def _enlarge(
    plan: Plan,
    batches: list[list[np.ndarray]],
    config: SparseContextConfig,
    large: Callable[[int], Large | None] | None,
) -> tuple[Plan, list[list[np.ndarray]]]:
    """The plan and the pictures, with those of larger references in their place where the config asks for them."""
    pixels = config.reference_max_pixels
    if pixels is None:
        return plan, batches
    if large is None:
        raise ValueError(f"reference_max_pixels is {pixels}, but there are no larger pictures here: leave it out.")
    found = {i: large(i) for i, overview in enumerate(plan.overviews) if overview is not None}
    plan = enlarge_plan(plan, {i: each.grid for i, each in found.items() if each is not None}, pixels, config.merge > 0)
    larger = [found.get(i) for i in range(len(batches))]
    return plan, [batch if each is None else [*each.picture] for batch, each in zip(batches, larger, strict=True)]


def _enough(
    plan: Plan, batches: Sequence[Sequence[np.ndarray]], scores: Sequence[np.ndarray], psnr: float
) -> tuple[list[Overview | None], list[int | None], list[np.ndarray | None]]:
    """What "auto" comes to beside overviews: of each reference its overview, how many tokens are enough for `psnr` dB,
    and what the overview lacks of each picture (`count_for`); the latter two are None where "auto" has another meaning.

    Where an overview and sharp tokens would be as many as all tokens, these are kept in their place; but of a larger
    picture so many are enough.
    """
    overviews, enough = list(plan.overviews), list[int | None]([None] * len(scores))
    errors = list[np.ndarray | None]([None] * len(scores))
    for i, (keep, overview) in enumerate(zip(spread_out(plan.keep, len(scores)), plan.overviews, strict=True)):
        if overview is None or not isinstance(keep, str):
            continue
        pictures = [whole_cells(rgb_pixels(picture, "residual"), plan.grids[i]) for picture in batches[i]]
        cells = overview.cells(plan.usual[i], plan.grids[i])
        error = np.stack([residual(picture, plan.grids[i], cells).ravel() ** 2 for picture in pictures])
        error[:, scores[i].ravel() < 0] = np.nan  # padding
        count = overview.tokens + count_for(error, rank_tokens([scores[i]], plan.coverages[i]), psnr)
        if count < plan.sizes[i] or plan.usual[i] != plan.grids[i]:
            enough[i], errors[i] = min(count, plan.sizes[i]), error
        else:
            enough[i], overviews[i] = plan.sizes[i], None
            plan.notes.append(f"reference {i + 1} has no overview, because {psnr:g} dB take all of its tokens")
    return overviews, enough, errors


def _check_pictures(images: Sequence[Pixels], grids: Sequence[Grid]) -> list[list[np.ndarray]]:
    """The pictures of each reference, one for each item of a batch: none where there are only latents."""
    if len(images) != len(grids):
        raise ValueError(f"There are {len(images)} pictures for {len(grids)} token grids: pass one grid per picture.")
    batches = []
    for i, (image, grid) in enumerate(zip(images, grids, strict=True), start=1):
        if min(grid) < 1:
            raise ValueError(f"The token grid of reference {i} is {tuple(grid)}: a reference has at least one token.")
        batch = image if isinstance(image, (list, tuple)) else [image]
        for picture in batch:
            if picture is not None and not isinstance(picture, np.ndarray):
                raise ValueError(f"Reference {i} is {picture!r}: pass its pixels, a uint8 array (H, W, 3), or None.")
        batches.append([] if image is None else [*batch])
    return batches


def _prepare_selectors(selectors: Sequence[SelectorLike | None]) -> float:
    """Read what selectors read once; returns the seconds that it took."""
    start = time.perf_counter()
    for selector in selectors:
        if selector is not None:
            prepare(selector)
    return time.perf_counter() - start


def score_references(
    plan: Plan,
    batches: Sequence[Sequence[np.ndarray]],
    seed: int,
    shows_picture: Sequence[np.ndarray | None] | None = None,
    score: Score = score_tokens,
) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """The scores of each reference, float32 (rows, columns), and how much each token shows of what its phrase names,
    None without one. The arguments are those of `select_tokens`."""

    def score_reference(i: int) -> tuple[np.ndarray, np.ndarray | None]:
        selector, grid = plan.selectors[i], plan.grids[i]
        if selector is None:
            return np.ones(grid, np.float32), None
        pictures: list[np.ndarray | None] = [*batches[i]] or [None]
        scores, found = [], []
        for picture in pictures:
            scorer, text = selector, find_text(selector)
            if text is not None:  # asked apart, for the report, and so once
                found.append(score(replace(text, role=WHERE), picture, grid, (seed, i)))
                scorer = put_text(selector, replace(text, found=found[-1])) or selector
            scores.append(score(scorer, picture, grid, (seed, i)))
        inside = None if shows_picture is None else shows_picture[i]
        mean = _mean(scores)
        return mean if inside is None else np.where(inside, mean, BELOW_ALL), _mean(found) if found else None

    # Side by side, unless a function of the user's own is asked, which need not be safe for threads. A reference takes
    # two cores: a net's threads, and thousands of small NumPy calls, which wait for each other beside those of another
    count = min(len(plan.grids), max(1, (os.cpu_count() or 1) // 2))
    asked = [selector for selector in plan.selectors if selector is not None]
    references = range(len(plan.grids))
    if len(asked) > 1 and all(name_of(selector) is not None for selector in asked):
        with ThreadPoolExecutor(count) as pool:
            made = list(pool.map(score_reference, references))
    else:
        made = [score_reference(i) for i in references]
    return [scores for scores, _ in made], [found for _, found in made]


def _mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.stack(parts).mean(axis=0, dtype=np.float32)


def _merge(
    scores: Sequence[np.ndarray], index: list[np.ndarray], merge: float, coverages: Sequence[float]
) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """The kept tokens of each reference once a share of them are averages, and what each token goes into."""
    index, into = list(index), list[np.ndarray | None]([None] * len(index))
    for i, part in enumerate(scores):
        # Half an average is none, and where all that shows the picture is kept there is nothing to average
        if round(merge * len(index[i])) and len(index[i]) < np.count_nonzero(part >= 0):
            stands_for = into[i] = merge_rest(part, len(index[i]), merge, coverages[i])
            index[i] = np.unique(stands_for[stands_for >= 0])
    return index, into


def selection_version() -> str:
    """What the tasks choose by: a digest of the saliency net's weights and of the rule of every task."""
    from .selectors.saliency import WEIGHTS  # imports torch, which choosing without the net can do without

    rules = [(task, count, task_defaults(task, count)) for task in TASKS for count in (1, 2)]
    weights = WEIGHTS.read_bytes() if WEIGHTS.is_file() else b""
    return hashlib.sha256(repr(rules).encode() + weights).hexdigest()[:12]


def version_beside() -> str:
    """What the tasks choose by beside an overview or a phrase: a digest of those rules."""
    ways = itertools.product(TASKS, (1, 2), (False, True), (False, True))
    rules = [(*way, task_defaults(*way)) for way in ways]
    return hashlib.sha256(repr(rules).encode()).hexdigest()[:12]
