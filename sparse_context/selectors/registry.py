"""Selectors by name, blends of them, and a user's own functions."""

from __future__ import annotations

import difflib
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from ..layers import explain_missing_packages
from .cells import Grid, Selector
from .classical import detail, edges, random, uniform
from .contrast import contrast
from .masks import Mask, as_array, mask
from .matting import Matting
from .residual import Residual, residual
from .subject import saliency, subject
from .text import Text

SelectorLike = str | Selector | Mapping[str, float] | Mapping[str | Selector, float]
"""What scores one reference: a name of `SELECTORS`, a function, or a mapping of these to weights (a blend)."""

SelectorsLike = SelectorLike | Sequence[SelectorLike | None] | None
"""What a config takes: one for all references, or one for each. None: the task decides."""

MaskChange = Callable[[int, np.ndarray], np.ndarray]
"""From the place of a reference and the user's mask of it, uint8 (H, W), to another mask."""


SELECTORS: dict[str, Selector] = {
    "random": random,
    "uniform": uniform,
    "edges": edges,
    "detail": detail,
    "saliency": saliency,
    "subject": subject,
    "contrast": contrast,
    "residual": residual,
    "mask": Mask(),
    "text": Text(),
}


def parts_of(selector: SelectorLike) -> Sequence[tuple[str | Selector, float]]:
    """The selectors that a blend or a mapping averages, with their weights; none of any other selector."""
    if isinstance(selector, Blend):
        return selector.parts
    return [*selector.items()] if isinstance(selector, Mapping) else []


def leaves_of(selector: SelectorLike) -> Iterator[SelectorLike]:
    """The selectors that score by themselves: those in a blend or mapping, at any depth, or the selector itself."""
    parts = parts_of(selector)
    if not parts:
        yield selector
    for part, _ in parts:
        yield from leaves_of(part)


def find_mask(selector: SelectorLike) -> Mask | None:
    """The `Mask` with a user's masks in a selector, or None."""
    return next((leaf for leaf in leaves_of(selector) if isinstance(leaf, Mask) and leaf.masks), None)


def find_text(selector: SelectorLike) -> Text | None:
    """The `Text` in a selector, or None."""
    leaves = (SELECTORS.get(leaf) if isinstance(leaf, str) else leaf for leaf in leaves_of(selector))
    return next((leaf for leaf in leaves if isinstance(leaf, Text)), None)


def reads_phrases(selector: SelectorLike | None) -> bool:
    """Whether a phrase changes what is kept by a selector; None: that of a task."""
    return selector is None or find_text(selector) is not None


def find_masks(selectors: SelectorsLike) -> Mask | None:
    """The `Mask` with a user's masks for all references; None where there is none, or one for each reference."""
    single = _one_each(selectors) is None and selectors is not None
    return find_mask(cast("SelectorLike", selectors)) if single else None


def user_mask(selectors: SelectorsLike, i: int) -> np.ndarray | None:
    """The user's mask of reference `i` (from 0) in `selectors`: uint8 (H, W), or None where the user gave none.

    In a sequence of one selector per reference, each has the mask of its own reference and no other:
    `["edges", mask([m])]`. Raises ValueError if there are too few masks.
    """
    each = _one_each(selectors)
    if each is not None and i >= len(each):
        raise ValueError(f"There is a reference {i + 1}, but only {len(each)} selectors: pass one per reference.")
    selector = cast("SelectorLike | None", selectors) if each is None else each[i]
    found = None if selector is None else find_mask(selector)
    if found is None:
        return None
    if each is not None and len(found.masks) != 1:
        raise ValueError(
            f"The selector of reference {i + 1} holds {len(found.masks)} masks: in a list of selectors, one per "
            "reference, each takes one mask."
        )
    if each is None and i >= len(found.masks):
        raise ValueError(
            f"There is a reference {i + 1}, but only {len(found.masks)} masks: pass one mask per reference "
            "(None for its own alpha channel)."
        )
    return found.masks[i if each is None else 0]


def map_masks(selectors: SelectorsLike, change: MaskChange) -> SelectorsLike:
    """`selectors` with `change(i, mask)` in the place of each of the user's masks, uint8 (H, W), of reference i."""

    def at_reference(i: int) -> MaskChange:
        return lambda _, mask: change(i, mask)

    each = _one_each(selectors)
    if each is not None:
        return [None if selector is None else _map_masks(selector, at_reference(i)) for i, selector in enumerate(each)]
    return None if selectors is None else _map_masks(cast("SelectorLike", selectors), change)


def use_masks(selectors: SelectorsLike, masks: Sequence[object]) -> SelectorsLike:
    """`selectors` with a user's masks, one for each reference (`masks.mask`), in the place of the name "mask".

    No selector at all stands for "mask" alone. Raises ValueError where another one does not use them.
    """

    def put(selector: SelectorLike | None, user_mask: Mask) -> SelectorLike:
        if selector is None or selector == "mask":
            return user_mask
        if isinstance(selector, Mapping) and "mask" in selector:
            return {user_mask if part == "mask" else part: weight for part, weight in selector.items()}
        raise ValueError(
            f"There are masks of what to keep, but selector is {selector!r}, which does not use them: name mask there, "
            "or leave one of the two out."
        )

    each = _one_each(selectors)
    if each is None:
        return put(cast("SelectorLike | None", selectors), mask(masks))
    if len(each) != len(masks):
        raise ValueError(f"There are {len(masks)} masks for {len(each)} selectors: pass one of each per reference.")
    return [put(selector, mask([own])) for selector, own in zip(each, masks, strict=True)]


PAINT_WEIGHT = 2.1
"""Of a painted mask beside a selector of weight 1: what is painted to be kept then goes before all that is not painted,
and that before what is painted to be dropped, whatever the selector says; it decides among equals. (`NEITHER` is not
quite in the middle, so with 2 the best of what is not painted would go before the least of what is to be kept.)"""


def beside_painted(painted: Any, selector: SelectorLike) -> list[tuple[Any, float]]:
    """The parts of a blend of a painted mask (`masks.KEEP`, `NEITHER`, `DROP`) and a selector, with their weights.

    painted: the mask as a selector, or what stands for it.
    """
    others: Mapping[Any, float] = selector if isinstance(selector, Mapping) else {selector: 1.0}
    total = sum(others.values())
    return [(painted, PAINT_WEIGHT), *((part, weight / total) for part, weight in others.items())]


def _map_masks(selector: SelectorLike, change: MaskChange) -> SelectorLike:
    def changed(part: str | Selector) -> str | Selector:
        if isinstance(part, Mask):
            return Mask([None if mask is None else change(i, mask) for i, mask in enumerate(part.masks)])
        return part

    return map_leaves(selector, changed)


def beside_overview(selector: SelectorLike, factor: int) -> SelectorLike:
    """`selector` where there is an overview by `factor`, which its residual is then measured against."""

    def changed(part: str | Selector) -> str | Selector:
        is_residual = isinstance(part, Residual) or (isinstance(part, str) and SELECTORS.get(part) is residual)
        return Residual(factor) if is_residual else part

    return map_leaves(selector, changed)


def put_text(selector: SelectorLike, text: Text | None) -> SelectorLike | None:
    """`selector` with `text` in the place of its `Text`. Where that is None its part is left out, and None is returned
    where no other is left."""
    parts = parts_of(selector)
    if not parts:
        return selector if find_text(selector) is None else text
    left = [(cast("Selector", put), weight) for part, weight in parts if (put := put_text(part, text)) is not None]
    total = sum(weight for _, weight in left)
    return Blend([(part, weight / total) for part, weight in left]) if left else None


def map_leaves(selector: SelectorLike, change: Callable[[str | Selector], str | Selector]) -> SelectorLike:
    """`selector` with `change` of each selector that scores by itself (`leaves_of`)."""

    def walk(part: str | Selector) -> str | Selector:
        return (
            Blend([(walk(inner), weight) for inner, weight in part.parts]) if isinstance(part, Blend) else change(part)
        )

    if isinstance(selector, Mapping):
        return {walk(part): weight for part, weight in selector.items()}
    return walk(selector)


def _one_each(selectors: SelectorsLike) -> Sequence[SelectorLike | None] | None:
    """The selectors of a config that has one for each reference; None where it has one for all."""
    return selectors if isinstance(selectors, (list, tuple)) else None


def each_selector(selectors: SelectorsLike, count: int) -> list[SelectorLike | None]:
    """One selector for each of `count` references, or as many as a config has."""
    each = _one_each(selectors)
    return [cast("SelectorLike | None", selectors)] * count if each is None else list(each)


class Blend:
    """A selector that averages others by weight. `parts` is ((selector, weight), ...); the weights sum to 1."""

    def __init__(self, parts: Sequence[tuple[str | Selector, float]]) -> None:
        self.parts = tuple(parts)
        resolved = [(*resolve(selector), weight) for selector, weight in self.parts]
        self.label = " + ".join(f"{weight:.2g} {label}" for label, _, weight in resolved)
        self._functions = [(function, weight) for _, function, weight in resolved]

    def __call__(self, image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
        total = sum(np.float32(weight) * function(image, grid, generator) for function, weight in self._functions)
        return np.clip(total, 0, 1)


def blend(weights: Mapping[str, float] | Mapping[str | Selector, float]) -> Blend:
    """The weighted average of selectors: `blend({"saliency": 0.7, "edges": 0.3})`.

    Keys are names, functions or a `mask([...])`; weights are above 0 and are divided by their sum. Raises ValueError.
    """
    if not weights:
        raise ValueError("A blend of no selectors cannot score: name at least one, such as {'edges': 1.0}.")
    for selector, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 < weight <= sys.float_info.max:
            raise ValueError(f"The weight of {_label(selector)!r} in the blend is {weight!r}: pass a number above 0.")
    if sum(find_mask(selector) is not None for selector in weights) > 1:
        raise ValueError("A blend holds one mask([...]): combine several masks into one before you pass them.")
    if sum(find_text(selector) is not None for selector in weights) > 1:
        raise ValueError("A blend reads one phrase for each reference: name text in it once.")
    total = sum(weights.values())
    if not total < math.inf:
        raise ValueError(f"The weights of the blend add up to {total}: pass smaller ones, for only their shares count.")
    return Blend([(selector, weight / total) for selector, weight in weights.items()])


def _label(selector: object) -> str:
    if isinstance(selector, str):
        return selector
    if isinstance(selector, Mask):
        return "mask"
    return getattr(selector, "label", None) or getattr(selector, "__name__", None) or type(selector).__name__


def resolve(selector: SelectorLike) -> tuple[str, Selector]:
    """A label for people and the function that scores, from a name, a mapping (a blend) or any callable.

    A function that is not of this file is wrapped, in `SELECTORS` too, so that what it returns is checked at each call.
    Raises ValueError that names the value and lists what is known.
    """
    if isinstance(selector, str):
        if selector not in SELECTORS:
            near = difflib.get_close_matches(selector, SELECTORS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"There is no selector {selector!r}: choose one of {', '.join(SELECTORS)}.{hint}")
        named = SELECTORS[selector]
        return selector, named if _is_ours(named) else _checked(selector, named)
    if isinstance(selector, Mapping):
        selector = blend(selector)
    if not callable(selector):
        raise ValueError(
            f"{selector!r} is no selector: pass one of {', '.join(SELECTORS)}, a mapping of names to weights, "
            "or a function (image, grid, generator) -> scores."
        )
    label = _label(selector)
    return label, selector if _is_ours(selector) else _checked(label, selector)


def _is_ours(selector: object) -> bool:
    """Whether it is of this package, and so needs no check."""
    return str(getattr(selector, "__module__", None)).startswith(__package__ + ".")


def _checked(label: str, function: Selector) -> Selector:
    """`function`, with what it returns brought to float32 and held to the rules of a selector."""

    def scored(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
        returned = function(image, grid, generator)
        try:
            scores = np.array(
                as_array(returned), dtype=np.float32
            )  # a copy: the function may fill the same array again
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The selector {label!r} returned {type(returned).__name__!r} that is no array of numbers: "
                f"the grid of this reference's tokens is {tuple(grid)}."
            ) from error
        if scores.shape != tuple(grid):
            raise ValueError(
                f"The selector {label!r} returned scores of shape {scores.shape}: "
                f"the grid of this reference's tokens is {tuple(grid)}."
            )
        if not (scores.min() >= 0 and scores.max() <= 1):  # NaN fails both
            raise ValueError(
                f"The selector {label!r} returned scores from {scores.min():g} to {scores.max():g}: "
                "scores lie in [0, 1], with one meaning in every image."
            )
        return scores

    return scored


def prepare(selector: SelectorLike) -> None:
    """Read the nets that a selector reads once, so that the time of the first choice is that of any other."""
    functions = [SELECTORS.get(leaf) if isinstance(leaf, str) else leaf for leaf in leaves_of(selector)]
    for function in functions:
        if isinstance(function, (Text, Matting)):
            function.prepare()
    if any(function is saliency or function is subject for function in functions):
        with explain_missing_packages():
            from .saliency import load_net

        load_net()


def name_of(selector: SelectorLike) -> str | None:
    """A name that means the same scores for the same picture, or None where only the function itself knows."""
    if isinstance(selector, Mask):
        return "mask"  # whose pixels are the picture's fourth channel
    if isinstance(selector, Residual):
        return f"residual by {selector.factor}"
    if isinstance(selector, (Text, Matting)):
        return selector.name
    if isinstance(selector, str):
        found = SELECTORS.get(selector)
        if isinstance(found, (Matting, Blend)):  # of the user's own, under a name that says nothing of its parts
            return None if selector in leaves_of(found) else name_of(found)
        return selector if _is_ours(found) else None
    names = [(name_of(part), weight) for part, weight in parts_of(selector)]
    return repr(names) if names and all(name is not None for name, _ in names) else None


def read_weights(name: str, text: str, example: str) -> dict[str, float]:
    """Named numbers: "random=0.5,blobs=0.5". Raises ValueError that quotes the text of the option `name`."""
    weights = {}
    for part in text.split(","):
        key, _, weight = (piece.strip() for piece in part.partition("="))
        try:
            if key in weights:
                raise ValueError
            weights[key] = float(weight)
        except ValueError:
            said = "write a blend as" if name == "selector" else "write it as"
            raise ValueError(f"{name} is {text!r}: {said} {example}.") from None
    return weights
