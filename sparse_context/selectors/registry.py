"""Selectors by name, blends of them, and a user's own functions."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence

import numpy as np

from ..layers import explain_missing_packages
from .cells import Grid, Selector
from .classical import detail, edges, random, uniform
from .contrast import contrast
from .masks import Mask, _as_array
from .subject import saliency, subject

NETS = ("saliency", "subject")  # those by the net


SELECTORS: dict[str, Selector] = {
    "random": random,
    "uniform": uniform,
    "edges": edges,
    "detail": detail,
    "saliency": saliency,
    "subject": subject,
    "contrast": contrast,
    "mask": Mask(),
}


def find_mask(selector) -> Mask | None:
    """The `Mask` with a user's masks in a selector, blend or mapping, or None."""
    if isinstance(selector, Mask):
        return selector if selector.masks else None
    parts = selector if isinstance(selector, Mapping) else []
    if isinstance(selector, Blend):
        parts = [part for part, _ in selector.parts]
    return next((found for part in parts if (found := find_mask(part)) is not None), None)


def user_mask(selector, i: int) -> np.ndarray | None:
    """The user's mask of reference `i` (from 0) in a selector: uint8 (H, W), or None where the user gave none.

    `selector` is anything that a config takes. In a sequence of one selector per reference, each has the mask of its
    own reference and no other: `["edges", mask([m])]`. Raises ValueError if there are too few masks.
    """
    own = isinstance(selector, (list, tuple))
    if own and i >= len(selector):
        raise ValueError(f"There is a reference {i + 1}, but only {len(selector)} selectors: pass one per reference.")
    found = find_mask(selector[i] if own else selector)
    if found is None:
        return None
    if own and len(found.masks) != 1:
        raise ValueError(
            f"The selector of reference {i + 1} holds {len(found.masks)} masks: in a list of selectors, one per "
            "reference, each takes one mask."
        )
    if not own and i >= len(found.masks):
        raise ValueError(
            f"There is a reference {i + 1}, but only {len(found.masks)} masks: pass one mask per reference "
            "(None for its own alpha channel)."
        )
    return found.masks[0 if own else i]


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


def blend(weights: Mapping[str | Selector, float]) -> Blend:
    """The weighted average of selectors: `blend({"saliency": 0.7, "edges": 0.3})`.

    Keys are names, functions or a `mask([...])`; weights are above 0 and are divided by their sum. Raises ValueError.
    """
    if not weights:
        raise ValueError("A blend of no selectors cannot score: name at least one, such as {'edges': 1.0}.")
    for selector, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 < weight < math.inf:
            raise ValueError(f"The weight of {_label(selector)!r} in the blend is {weight!r}: pass a number above 0.")
    if sum(find_mask(selector) is not None for selector in weights) > 1:
        raise ValueError("A blend holds one mask([...]): combine several masks into one before you pass them.")
    total = sum(weights.values())
    if not total < math.inf:
        raise ValueError(f"The weights of the blend add up to {total}: pass smaller ones, for only their shares count.")
    return Blend([(selector, weight / total) for selector, weight in weights.items()])


def _label(selector) -> str:
    if isinstance(selector, str):
        return selector
    if isinstance(selector, Mask):
        return "mask"
    return getattr(selector, "label", None) or getattr(selector, "__name__", None) or type(selector).__name__


def resolve(selector: str | Mapping | Selector) -> tuple[str, Selector]:
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
        return selector, named if _is_own(named) else _checked(selector, named)
    if isinstance(selector, Mapping):
        selector = blend(selector)
    if not callable(selector):
        raise ValueError(
            f"{selector!r} is no selector: pass one of {', '.join(SELECTORS)}, a mapping of names to weights, "
            "or a function (image, grid, generator) -> scores."
        )
    label = _label(selector)
    return label, selector if _is_own(selector) else _checked(label, selector)


def _is_own(selector) -> bool:
    """Whether it is of this package, and so needs no check."""
    return str(getattr(selector, "__module__", None)).startswith(__package__ + ".")


def _checked(label: str, function: Selector) -> Selector:
    """`function`, with what it returns brought to float32 and held to the rules of a selector."""

    def scored(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
        given = function(image, grid, generator)
        try:
            scores = np.array(_as_array(given), dtype=np.float32)  # its own: the function may fill the same array again
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The selector {label!r} returned {type(given).__name__!r} that is no array of numbers: "
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


def prepare(selector: str | Mapping | Selector) -> None:
    """Read what a selector reads once, the saliency net, so that the time of the first choice is that of any other."""
    if isinstance(selector, (Mapping, Blend)):
        for part in selector if isinstance(selector, Mapping) else [part for part, _ in selector.parts]:
            prepare(part)
    elif selector is saliency or selector is subject or (isinstance(selector, str) and selector in NETS):
        with explain_missing_packages():
            from .saliency import load_net

        load_net()


def name_of(selector: str | Mapping | Selector) -> str | None:
    """A name that means the same scores for the same picture, or None where only the function itself knows."""
    if isinstance(selector, Mask):
        return "mask"  # whose pixels are the picture's fourth channel
    if isinstance(selector, str):
        return selector if _is_own(SELECTORS.get(selector)) else None
    if isinstance(selector, (Mapping, Blend)):
        parts = selector.items() if isinstance(selector, Mapping) else selector.parts
        names = [(name_of(part), weight) for part, weight in parts]
        return None if any(name is None for name, _ in names) else repr(names)
    return None


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
