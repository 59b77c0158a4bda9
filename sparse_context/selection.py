"""Selection: from the pictures of a call to the tokens that are kept of them, and a report of it.

This is the whole idea in one call, without a host: `select_tokens(images, grids, config)`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .budget import check_budget, choose_tokens, keeps_all, merge_rest
from .selectors import Selector, find_mask, name_of, prepare, resolve, user_mask

TASKS = ("auto", "edit", "global", "subject")
BELOW_ALL = np.float32(-1e-9)  # a selector's lowest score is 0; this adds nothing to the mass that "auto" measures


def task_defaults(task: str, references: int) -> tuple[str | dict[str, float], float]:
    """The rule by which a task decides (selector, coverage) where the user did not.

    - "edit", an edit that keeps the picture's layout: edges and saliency, half each, with a tenth of the tokens spread
      evenly, because flat regions are blind otherwise. (The paper, arXiv 2606.23682, takes edges alone, and names that
      limitation. Whatever the edit spares is looked at closest where it is salient.)
    - "global", an edit of the whole picture, such as a colour tone or a style: tokens spread evenly, since every region
      is asked for. No selector knows better, and the embedded model breaks such an edit with the first tokens that it
      goes without (docs/quality.md): keep="auto" keeps all.
    - "subject", a subject put into a new scene: the selector of that name, saliency with the subject's outline and rim,
      and nothing for the background.
    - "auto": one reference is taken for an edit, several for subjects. (The shape of the output cannot tell: by default
      it is the first reference's.)
    """
    if task == "global":
        return "uniform", 0.0
    if task == "edit" or (task == "auto" and references == 1):
        return {"edges": 0.5, "saliency": 0.5}, 0.1
    return "subject", 0.0


@dataclass(frozen=True)
class SparseContextConfig:
    """What to keep of the references. `keep` is the dial; all else has a default that serves.

    The important ones:

    - `keep`: a ratio in (0, 1], a count of at least 2 tokens over all references, or "auto" (for each reference the
      fewest tokens that hold the share `mass` of its scores; all for a global edit). One value, or one per reference.
      1 keeps all.
    - `selector`: what makes a token matter: a name of `selectors.SELECTORS`, a mapping of names to weights (a blend), a
      function (image, grid, generator) -> scores, or `mask([...])`. One, or a list with one per reference. None: the
      task decides.
    - `task`: "edit", "global", "subject" or "auto", one or one per reference: see `task_defaults`.

    To tinker with:

    - `coverage`: the share of kept tokens, in [0, 1], that is spread evenly over the pictures. None: the task decides;
      but a selector that you name under the task "auto" is taken at its word, with no coverage.
    - `share`: "equal" (each reference keeps the same ratio) or "joint" (tokens of all references compete: for scores
      that may be compared, such as those of one selector; else one reference starves the others).
    - `floor`: the least number of tokens of each reference; with 0, one may end up with none.
    - `multiple_of`: round the total up to a multiple, for compilers and context parallelism.
    - `merge`: the share of the budget, in [0, 1], that goes to averages of the rest, each over a block of tokens: as
      many tokens in all, fewer of them sharp, and no region is lost. 0, or a share under half a token: what is not kept
      is dropped.
    - `mass`: in (0, 1], for keep="auto".
    - `seed`: of the selectors' own random numbers, which the image's noise never shares.

    Raises ValueError that names the field and its value. `budget.choose_tokens` has the details of the budget.
    """

    keep: float | str | Sequence[float | str] = 0.2
    selector: str | Mapping | Selector | Sequence | None = None
    task: str | Sequence[str] = "auto"

    coverage: float | None = None
    share: str = "equal"
    floor: int = 1
    multiple_of: int = 1
    merge: float = 0.0
    mass: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):  # arrays cannot be compared, and one without a dimension is a number
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                object.__setattr__(self, field.name, tuple(value.tolist()) if value.ndim else value.item())
        if self.coverage is not None and np.ndim(self.coverage):
            raise ValueError(f"coverage is {self.coverage!r}: pass one share from 0 to 1, or None.")
        coverage = 0.0 if self.coverage is None else self.coverage
        check_budget(self.keep, self.share, self.floor, coverage, self.multiple_of, self.mass, self.merge)
        for name, value in (("task", self.task), ("selector", self.selector)):
            if isinstance(value, (list, tuple)) and not value:
                raise ValueError(f"{name} is {value!r}: pass one value, or one per reference.")
        for task in self.task if isinstance(self.task, (list, tuple)) else [self.task]:
            if task not in TASKS:
                raise ValueError(f"task is {task!r}: choose one of {', '.join(TASKS)}.")
        selectors: Any = self.selector
        for selector in selectors if isinstance(selectors, (list, tuple)) else [selectors]:
            if selector is not None:
                resolve(selector)
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}: pass a whole number, 0 or more.")

    @property
    def keeps_all(self) -> bool:
        """Whether all tokens of any references are kept: by a ratio of 1, or by "auto" where the task is "global"."""
        count = max(1 if isinstance(own, str) else np.size(own) for own in (self.keep, self.task))
        pairs = zip(per_reference("keep", self.keep, count), per_reference("task", self.task, count), strict=True)
        return all(task == "global" if keep == "auto" else keep == 1 for keep, task in pairs)


@dataclass(frozen=True, eq=False)
class Kept:
    """What was kept of one reference.

    `grid` is (rows, columns). `index` holds the kept tokens, sorted flat int64 indices into the grid, row by row.
    `into`, where the rest is averaged, names for each token the kept one that stands for it (`budget.merge_rest`).
    `scores` is float32 (rows, columns), all 1 where every token is kept and none was scored. `selector` is its label.
    `picture` is what the selector saw, uint8 (H, W, 3 or 4), or None where the host had only latents. `task` is the
    reference's own.
    """

    grid: tuple[int, int]
    index: np.ndarray
    scores: np.ndarray
    selector: str
    picture: np.ndarray | None
    into: np.ndarray | None = None
    task: str = "auto"

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

    `seconds` is the wall time of scoring and choosing, without what is read once.
    """

    references: tuple[Kept, ...]
    task: str
    coverage: tuple[float, ...]
    seconds: float

    @property
    def index(self) -> np.ndarray:
        """The kept tokens of all references, sorted int64 indices into their tokens one after another."""
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
            own = kept.stands_for
            parts.append(np.where(own < 0, -1, own + start))
            start += kept.scores.size
        return np.concatenate(parts)

    @property
    def kept(self) -> int:
        return sum(len(kept.index) for kept in self.references)

    @property
    def total(self) -> int:
        return sum(kept.scores.size for kept in self.references)

    def to_dict(self) -> dict:
        """Counts, selectors and cost, for JSON. The arrays stay here."""
        return {
            "task": self.task,
            "kept": self.kept,
            "total": self.total,
            "seconds": self.seconds,
            "references": [
                {
                    "grid": list(kept.grid),
                    "kept": len(kept.index),
                    "total": kept.scores.size,
                    "selector": kept.selector,
                    "coverage": coverage,
                    "averages": len(kept.averages),
                }
                for kept, coverage in zip(self.references, self.coverage, strict=True)
            ],
        }

    def __str__(self) -> str:
        lines = []
        for i, (kept, coverage) in enumerate(zip(self.references, self.coverage, strict=True), start=1):
            spread = f", {coverage:.0%} of them spread evenly".replace("%", " %") if coverage else ""
            how = f" by {kept.selector}{spread}" if len(kept.index) < kept.scores.size else ""
            how += f", {len(kept.averages)} of them averages of the rest" if len(kept.averages) else ""
            lines.append(f"reference {i}: {_tokens(len(kept.index), kept.scores.size)}{how}")
        lines.append(f"total: {_tokens(self.kept, self.total)}, task {self.task}, in {1000 * self.seconds:.1f} ms")
        if any(kept.task == "global" and len(kept.index) < kept.scores.size for kept in self.references):
            lines.append("an edit of the whole picture loses by every token that is dropped: keep all, or keep='auto'")
        for i, kept in enumerate(self.references, start=1):
            if kept.selector == "mask" and not kept.scores.any():
                lines.append(f"the mask of reference {i} marks nothing, so its tokens are spread evenly")
        return "\n".join(lines)


def _tokens(kept: int, total: int) -> str:
    return f"{kept} of {total} tokens ({kept / max(total, 1):.0%})".replace("%", " %")


def score_tokens(selector: Any, image: np.ndarray | None, grid: tuple[int, int], seed: Sequence[int]) -> np.ndarray:
    """The scores (rows, columns) of one picture, by anything that a config takes as selector."""
    return resolve(selector)[1](image, grid, np.random.default_rng(seed))


def select_tokens(
    images: Sequence[np.ndarray | Sequence[np.ndarray] | None],
    grids: Sequence[tuple[int, int]],
    config: SparseContextConfig,
    shown: Sequence[np.ndarray | None] | None = None,
    score: Callable[..., np.ndarray] = score_tokens,
) -> Selection:
    """Score the references of a call and choose the tokens to keep.

    `images` has each reference's pixels as the VAE sees them, uint8 (H, W, 3) or (H, W, 4) with a mask or alpha channel
    last, or None where there are only latents. Where each item of a batch has another picture, it is a list of these:
    the batch shares one index, so their scores are averaged. `grids` has each reference's token grid (rows, columns).
    `shown`, where a host pads, has bool (rows, columns) for each reference, or None for all True: a token that shows
    nothing but padding is scored below all others. Reference i draws its random numbers from the seed and i alone.
    Where all tokens are kept, nothing is scored. `score` stands for `score_tokens`, for a cache that remembers scores;
    several threads call it at once, unless a selector is a function of the user's own.

    Raises ValueError, in one sentence, for values that do not fit these references.
    """
    start = time.perf_counter()
    count = len(grids)
    if len(images) != count:
        raise ValueError(f"There are {len(images)} pictures for {count} token grids: pass one grid per picture.")
    grids = [(int(rows), int(columns)) for rows, columns in grids]
    sizes = [rows * columns for rows, columns in grids]
    for i, (image, grid) in enumerate(zip(images, grids, strict=True), start=1):
        if min(grid) < 1:
            raise ValueError(f"The token grid of reference {i} is {grid}: a reference has at least one token.")
        for one in image if isinstance(image, (list, tuple)) else [image]:
            if one is not None and not isinstance(one, np.ndarray):
                raise ValueError(f"Reference {i} is {one!r}: pass its pixels, a uint8 array (H, W, 3), or None.")
    pictures: list[Any] = [[image] if isinstance(image, np.ndarray) else image for image in images]
    check_budget(config.keep, references=count)
    tasks = per_reference("task", config.task, count)
    selectors = per_reference("selector", config.selector, count)
    for i in range(count):
        user_mask(config.selector, i)  # raises where there are too few
    given = find_mask(config.selector)
    if given is not None and len(given.masks) > count:
        raise ValueError(
            f"The selector holds {len(given.masks)} masks for {count} references: pass one mask per reference "
            "(None for its own alpha channel)."
        )

    keep, keeps = config.keep, per_reference("keep", config.keep, count)
    if "global" in tasks and "auto" in keeps:
        keep = keeps = [1.0 if pair == ("auto", "global") else pair[0] for pair in zip(keeps, tasks, strict=True)]
    everything = keeps_all(keep, sizes)
    apart = isinstance(keep, (list, tuple, np.ndarray)) and config.multiple_of == 1
    labels, coverages = [], []
    to_score: list[Any] = []  # the selector of each reference, None where all of it is kept
    for i in range(count):
        selector, coverage = task_defaults(tasks[i], count)
        if selectors[i] is not None:
            selector, coverage = selectors[i], 0.0 if tasks[i] == "auto" else coverage
        coverages.append(coverage if config.coverage is None else float(config.coverage))
        whole = everything or (apart and keeps_all(keeps[i], [sizes[i]]))
        labels.append("all" if whole else resolve(selector)[0])
        to_score.append(None if whole else selector)

    waited = time.perf_counter()
    for selector in to_score:
        if selector is not None:
            prepare(selector)
    start += time.perf_counter() - waited

    def scores_of(i: int) -> np.ndarray:
        if to_score[i] is None:
            return np.ones(grids[i], np.float32)
        parts = [score(to_score[i], image, grids[i], (config.seed, i)) for image in pictures[i] or [None]]
        part = parts[0] if len(parts) == 1 else np.stack(parts).mean(axis=0, dtype=np.float32)
        inside = None if shown is None else shown[i]
        return part if inside is None else np.where(inside, part, BELOW_ALL)

    # Side by side, unless a function of the user's own is asked, which need not be safe for threads
    scored = [selector for selector in to_score if selector is not None]
    if len(scored) > 1 and all(name_of(selector) is not None for selector in scored):
        with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
            scores = list(pool.map(scores_of, range(count)))
    else:
        scores = [scores_of(i) for i in range(count)]

    index = choose_tokens(
        scores,
        keep,
        share=config.share,
        floor=config.floor,
        coverage=coverages,
        multiple_of=config.multiple_of,
        mass=config.mass,
    )
    firsts = [batch[0] if batch else None for batch in pictures]
    into: list[np.ndarray | None] = [None] * count
    for i, part in enumerate(scores):
        # Half an average is none, and where all that is shown is kept there is nothing to average
        if round(config.merge * len(index[i])) and len(index[i]) < np.count_nonzero(part >= 0):
            into[i] = own = merge_rest(part, len(index[i]), config.merge, coverages[i])
            index[i] = np.unique(own[own >= 0])
    kept = tuple(Kept(*each) for each in zip(grids, index, scores, labels, firsts, into, tasks, strict=True))
    task = config.task if isinstance(config.task, str) else ", ".join(dict.fromkeys(tasks))
    return Selection(kept, task, tuple(coverages), time.perf_counter() - start)


def per_reference(name: str, value, count: int) -> list:
    """One value for each reference, from one for all or a sequence with one each."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} values for {count} references: pass one value, or one per reference."
        )
    return list(value)
