"""What to keep of the references: from what a user set in the node to a selection for the latents of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sparse_context import Selection, SparseContextConfig, mask, select_tokens
from sparse_context.config import meaning_of, task_defaults
from sparse_context.selectors.cells import Grid
from sparse_context.selectors.registry import SelectorLike, beside_painted
from sparse_context.texts import read_keep
from sparse_context.trained import Trained

BLIND = ("auto", "uniform", "random", "detail")
"""Selectors that do without pictures; "auto" and "detail" then look at the latents."""

SPREAD = 0.1  # of the tokens, by default, where only the latents are known: as the task "edit" has it
ASPECT = 0.04  # how far a picture's aspect may be from that of its reference: models crop to whole tokens


@dataclass(frozen=True)
class Settings:
    """What a user sets in the node.

    keep: a ratio for all references. keep_each: text with one value for each reference; empty: `keep` for all. task and
    overview: as in `SparseContextConfig`. selector: a name, or "auto". coverage: a share, or None where the task
    decides. seed: of the selector "random". phrases: what is meant in the references, one line for each, the word none
    for one without; one line is for all. text_model: what finds it, as `SparseContextConfig` has it; empty: the usual.
    """

    keep: float = 0.2
    keep_each: str = ""
    task: str = "auto"
    selector: str = "auto"
    coverage: float | None = None
    overview: str | int | None = "trained"
    seed: int = 0
    phrases: str = ""
    text_model: str = ""

    def budget(self) -> float | list[float | int | str]:
        """One ratio, or a list with one ratio, count or "auto" for each reference. Raises ValueError."""
        if not self.keep_each.strip():
            return self.keep
        values = []
        for part in self.keep_each.split(","):
            try:
                values.append(read_keep(part.strip()))
            except ValueError:
                raise ValueError(
                    f"keep_each has {part.strip()!r}: write one value for each reference, such as 0.5, 0.1. A value is "
                    "a share, a number of tokens, or auto."
                ) from None
        return values

    def each_phrase(self) -> str | list[str | None] | None:
        """The phrase for all references, or a list with one, or None, for each."""
        lines = [None if line.strip() == "none" else line.strip() for line in self.phrases.splitlines() if line.strip()]
        return lines if len(lines) > 1 else lines[0] if lines else None


@dataclass(frozen=True, eq=False)
class References:
    """What a user connected.

    pictures: of each reference uint8 (H, W, 3), one for each item of a batch; empty where the latents are all there is.
    painted: by the number of a reference, from 0, uint8 (H, W): what to keep and to drop of it (`masks.KEEP`, `DROP`).
    """

    pictures: Sequence[Sequence[np.ndarray]] = ()
    painted: Mapping[int, np.ndarray] = field(default_factory=dict)

    def check_against(self, grids: Sequence[Grid]) -> None:
        """Raise ValueError where the references of a run, by their token grids, are not those that are connected."""
        if self.pictures and len(self.pictures) != len(grids):
            raise ValueError(
                f"You connected {_count(len(self.pictures), 'image')}, but the model got "
                f"{_count(len(grids), 'reference')}: connect one image for each reference, in the same order, or "
                "none at all."
            )
        for i, (rows, columns) in enumerate(grids):
            sizes = [picture.shape[:2] for picture in self.pictures[i]] if self.pictures else []
            sizes += [self.painted[i].shape] if i in self.painted else []
            for height, width in sizes:
                if abs(math.log(height / width * columns / rows)) > ASPECT + 1 / min(rows, columns):
                    raise ValueError(
                        f"The image or mask of reference {i + 1} is {width}x{height} pixels, but the reference has "
                        f"{columns}x{rows} tokens, which is another shape: connect the very image that is encoded, "
                        "after any crop."
                    )
        if any(i >= len(grids) for i in self.painted):
            raise ValueError(
                f"A mask is for reference {max(self.painted) + 1}, but the model got "
                f"{_count(len(grids), 'reference')}: change the number in Sparse Context Mask."
            )

    def shown(self, grids: Sequence[Grid]) -> list[list[np.ndarray] | np.ndarray]:
        """What selectors see of each reference: its pictures, or black for none; a mask is a fourth channel."""
        seen: list[list[np.ndarray] | np.ndarray] = []
        for i, (rows, columns) in enumerate(grids):
            painted = self.painted.get(i)
            size = (16 * rows, 16 * columns) if painted is None else painted.shape
            batch = [*self.pictures[i]] if self.pictures else [np.zeros((*size, 3), np.uint8)]
            if painted is not None:
                batch = [np.dstack([picture, painted]) for picture in batch]
            seen.append(batch if len(batch) > 1 else batch[0])
        return seen


def choose(
    settings: Settings,
    references: References,
    grids: Sequence[Grid],
    details: Sequence[np.ndarray] | None = None,
    trained: Trained | None = None,
) -> Selection:
    """What to keep of references with these token grids.

    details: of each, scores by its latents (`latents.detail`), which are asked for where there are no pictures.
    trained: what the loaded weights were trained for. Raises ValueError, in one sentence, for what does not fit.
    """
    check(settings, references)
    budget = settings.budget()
    measures = budget != settings.keep and "auto" in budget and _has_overview(settings, trained, len(grids))
    if measures and not references.pictures:
        raise ValueError(
            "keep_each has auto, which measures an overview against images: connect them, or write numbers."
        )
    references.check_against(grids)
    config = SparseContextConfig(
        keep=settings.budget(),
        task=settings.task,
        selector=[_selector(settings, references, i, len(grids), details, trained) for i in range(len(grids))],
        overview=settings.overview,
        coverage=_coverage(settings, references, trained, len(grids)),
        seed=settings.seed,
        phrases=settings.each_phrase(),
        text_model=settings.text_model or None,
    )
    return select_tokens(references.shown(grids), grids, config, trained=trained)


def check(settings: Settings, references: References) -> None:
    """Raise ValueError for settings that fit no references at all."""
    phrases = settings.each_phrase()
    SparseContextConfig(
        keep=settings.budget(), task=settings.task, overview=settings.overview, seed=settings.seed, phrases=phrases
    )
    if phrases is not None and settings.selector not in ("auto", "text"):
        raise ValueError(
            f"phrases says what to look for, and the selector {settings.selector} does not read it: choose auto or "
            "text, or leave phrases empty."
        )
    if phrases is not None and not references.pictures:
        raise ValueError("phrases are looked for in images, and none is connected: connect one for each reference.")
    if phrases is None and settings.selector == "text":
        raise ValueError("The selector text needs a phrase: write what to look for into phrases, such as the red car.")
    if not references.pictures and settings.selector not in BLIND:
        raise ValueError(
            f"The selector {settings.selector} looks at images, and none is connected: connect one for each "
            f"reference, or choose {', '.join(BLIND[:-1])} or {BLIND[-1]}."
        )


def needs_details(settings: Settings, references: References) -> bool:
    """Whether tokens are chosen by their latents."""
    return not references.pictures and settings.selector in ("auto", "detail")


def _selector(
    settings: Settings,
    references: References,
    i: int,
    count: int,
    details: Sequence[np.ndarray] | None,
    trained: Trained | None,
) -> SelectorLike | None:
    selector: SelectorLike | None = None if settings.selector == "auto" else settings.selector
    if not references.pictures:
        if settings.selector == "auto" and settings.task == "global" and not _has_overview(settings, trained, count):
            selector = "uniform"
        elif needs_details(settings, references):
            assert details is not None
            selector = _LatentDetail(details[i])
    if i not in references.painted:
        return selector
    if selector is None:
        phrases = settings.each_phrase()
        meant = phrases[i] if isinstance(phrases, list) and i < len(phrases) else phrases
        selector, _ = task_defaults(settings.task, count, _has_overview(settings, trained, count), meant is not None)
    return dict(beside_painted(mask([references.painted[i]]), selector))


def _has_overview(settings: Settings, trained: Trained | None, count: int) -> bool:
    if settings.overview == "trained":
        return trained is not None and trained.shows(meaning_of(settings.task, count))
    return settings.overview is not None


def _coverage(settings: Settings, references: References, trained: Trained | None, count: int) -> float | None:
    if settings.coverage is not None:
        return settings.coverage
    if references.painted:  # tokens that are spread evenly would lie where nothing is to be kept
        return 0.0
    if not references.pictures and settings.selector == "auto":
        return 0.0 if settings.task == "global" or _has_overview(settings, trained, count) else SPREAD
    return None


class _LatentDetail:
    """A selector with scores that are known already."""

    label = "detail of the latents"

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def __call__(self, image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
        return self.scores


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
