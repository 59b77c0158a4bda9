"""What a phrase such as "the red car" names in a picture, as scores.

A model finds it (finders.py), and the task says what that means: a subject keeps what the phrase names, with its rim;
the source of an edit keeps what must survive the edit, which is everything else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..layers import explain_missing_packages
from .cells import Grid, cell_means, rgb_pixels
from .classical import edges
from .subject import with_rim

if TYPE_CHECKING:
    from .finders import Finder

INSIDE, OUTSIDE, WHERE, IGNORED = "inside", "outside", "where", "ignored"
"""What a `Text` scores: what a phrase names with its rim, everything else, how much of a cell shows it, or nothing."""


class Place(NamedTuple):
    """Where a model runs: a torch device, and the name of a torch type."""

    device: str = "cpu"
    dtype: str = "float32"


CPU = Place()


@dataclass(frozen=True)
class Text:
    """A selector by a phrase. `text` makes one; the name "text" stands for `Text()`, whose phrase is the config's.

    phrases: one for all references, or one for each, None for a reference without one. model: see `text`. role: what is
    scored, `INSIDE`, `OUTSIDE`, `WHERE` or `IGNORED`; the task of a reference decides (`phrases.ROLES`). place: where
    the model runs: as the pipeline does. found: the scores of `WHERE`, where they are known; None: the model is asked.
    """

    phrases: str | tuple[str | None, ...] | None = None
    model: str | None = None
    role: str = INSIDE
    place: Place = CPU
    found: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        """For people: phrase 'the red car', or outside 'the red car'."""
        if not isinstance(self.phrases, str):
            return "text"
        return f"{'outside' if self.role == OUTSIDE else 'phrase'} {self.phrases!r}"

    @property
    def name(self) -> str:
        """Equal where the scores of the same picture are: the phrase, the model's files, and how it runs."""
        _, about = self._locate()
        return repr(("text", self.phrases, self.role, about, *self.place))

    def finder(self) -> Finder:
        """The model, loaded once in a process for each device and type. Raises ValueError where it cannot be had."""
        folder, about = self._locate()
        with explain_missing_packages():
            from .finders import load_finder
        return load_finder(folder, about, *self.place)

    def prepare(self) -> None:
        """Load the model."""
        self.finder()

    def __call__(self, image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
        found = self._find(rgb_pixels(image, "text"), grid) if self.found is None else self.found
        if self.role == WHERE:
            return found
        if self.role == OUTSIDE:
            return 1 - found
        return with_rim(found, edges(image, grid, generator))

    def _locate(self) -> tuple[str, str]:
        with explain_missing_packages():
            from .finders import locate
        return locate(self.model)

    def _find(self, image: np.ndarray, grid: Grid) -> np.ndarray:
        if not isinstance(self.phrases, str):
            raise ValueError(
                "The selector 'text' looks for what a phrase names, and there is none: write one, such as the red car."
            )
        finder = self.finder()
        found = np.clip(cell_means(finder(image, self.phrases), grid), 0, 1)
        return found if found.max() >= finder.least else np.zeros_like(found)


def text(phrases: str | Sequence[str | None] | None = None, model: str | os.PathLike[str] | None = None) -> Text:
    """A selector of what a phrase names: `selector=text("the red car")`.

    phrases: one for all references, or a list with one for each, in order; None in it is a reference without one, whose
    task then decides alone. model: a folder, or a hub id, which is downloaded if need be, of a CLIPSeg, OWLv2,
    Grounding DINO or SAM 3 as transformers has them. None: `finders.DEFAULT`, which has to be in the hub's cache.

    A subject keeps what the phrase names, with its outline and rim. The source of an edit keeps everything else, for
    that must survive. An edit of the whole picture ignores the phrase. By itself, it scores by the rule that its task
    has for a phrase (`config.task_defaults`); in a blend, by the phrase alone. Where the picture does not show what is
    named, all tokens score alike, and the report says so.

    Raises ValueError for phrases that are none. What is wrong with the model is said when it is loaded.
    """
    check_phrases("text", phrases)
    if model is not None and (not isinstance(model, (str, os.PathLike)) or not os.fspath(model)):
        raise ValueError(f"The model of text is {model!r}: pass a folder or a hub id, or None.")
    several = None if phrases is None or isinstance(phrases, str) else tuple(phrases)
    return Text(phrases if isinstance(phrases, str) else several, None if model is None else os.fspath(model))


def check_phrases(name: str, phrases: object) -> None:
    """Raise ValueError unless these are one phrase, None, or a list of both, as the setting `name` takes them."""
    if isinstance(phrases, (list, tuple)) and not phrases:
        raise ValueError(f"{name} is {phrases!r}: pass one phrase, or one per reference.")
    for phrase in phrases if isinstance(phrases, (list, tuple)) else [phrases]:
        if phrase is not None and not (isinstance(phrase, str) and phrase.strip()):
            raise ValueError(f"{name} is {phrase!r}: write what to look for, such as 'the red car', or None.")
        if phrase is not None and not phrase.isprintable():  # as half of a character, which no tokenizer takes
            raise ValueError(f"{name} is {phrase!r}: write it in printable characters, on one line.")
