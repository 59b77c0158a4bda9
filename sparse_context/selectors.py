"""Selectors: functions that say which tokens of a reference matter.

    (image, grid, generator) -> scores

- `image`: uint8 (H, W, 3) or (H, W, 4), RGB or RGBA: the pixels that the VAE sees, after the pipeline's resize and
  crop. None when the host was given latents and has no pixels.
- `grid`: (rows, columns) of the reference's tokens.
- `generator`: a numpy generator of the reference's own, never the one that draws the image's noise.
- `scores`: float32 (rows, columns) in [0, 1], higher kept first. A score means the same in every image, so scores are
  never stretched to the range of their own image: that is what lets several references compete for one budget.

A selector scores and does not choose: how many tokens are kept is the business of budget.py. To add one, write a
function and give it a line in `SELECTORS`.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

import cv2
import numpy as np

from .contrast import contrast_map

Grid = tuple[int, int]
Selector = Callable[[np.ndarray | None, Grid, np.random.Generator], np.ndarray]


# The order in which ties are broken, and what "evenly spread" means here ----------------------------------------------


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


# From pixels to cells -------------------------------------------------------------------------------------------------


def _picture(image: np.ndarray | None, name: str) -> np.ndarray:
    """`image` itself, or the reason why the selector `name` cannot work with it."""
    if image is None:
        raise ValueError(
            f"The selector {name!r} needs the picture's pixels, but this reference was passed as latents: "
            "use 'uniform' or 'random', or pass the picture."
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or image.size == 0:
        raise ValueError(
            f"The selector {name!r} got a picture of shape {image.shape} and type {image.dtype}: "
            "pass uint8 (H, W, 3) or (H, W, 4)."
        )
    return image


def _rgb(image: np.ndarray | None, name: str) -> np.ndarray:
    image = _picture(image, name)
    return image if image.shape[2] == 3 else cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)


def _luma(image: np.ndarray | None, name: str) -> np.ndarray:
    return cv2.cvtColor(_rgb(image, name), cv2.COLOR_RGB2GRAY)


def _cell_means(values: np.ndarray, grid: Grid) -> np.ndarray:
    """Mean of `values` (H, W) over each cell of the grid, float32 (rows, columns). Cells may split pixels."""
    rows, columns = grid
    height, width = values.shape
    size = min(columns, width), min(rows, height)  # OpenCV averages over areas only where it shrinks along both axes
    means = cv2.resize(values.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    if means.shape != (rows, columns):  # more tokens than pixels along an axis
        means = cv2.resize(means, (columns, rows), interpolation=cv2.INTER_NEAREST)
    return means


def _saturate(amount: np.ndarray) -> np.ndarray:
    """Amounts from 0 up, in some fixed unit, as scores: 0 -> 0, 1 -> 0.63, 3 -> 0.95. Strictly rising: it ties none."""
    return -np.expm1(-amount)


# The selectors --------------------------------------------------------------------------------------------------------


def random(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """Chance: independent scores, uniform on [0, 1). What Sparse Context trains with (arXiv 2606.23682)."""
    return generator.random(grid, dtype=np.float32)


def uniform(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """Evenly spread, whatever the picture shows: 1 - rank / N by `uniform_order`. The kept sets are nested."""
    order = uniform_order(grid)
    return (1 - order / order.size).astype(np.float32)


def edges(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """Outlines: the length of Canny edges in each cell, in cell sides. One straight edge across a cell scores 0.63.

    For edits that keep the layout. Canny (1986), as OpenCV has it, on the blurred luma; the upper threshold is Otsu's
    (1979) over the picture's gradients, held between a step of 13 and one of 100 grey levels, so that noise on a flat
    picture is no edge and a strong edge does not hide a fair one; the lower threshold is 0.4 of it. The paper
    (arXiv 2606.23682) names Canny edges for editing and leaves the rest open.
    """
    luma = cv2.GaussianBlur(_luma(image, "edges"), (5, 5), 0)
    across, down = cv2.spatialGradient(luma)  # int16, 2.5 per grey level of a sharp step
    steepness = (np.abs(across[::4, ::4]) + np.abs(down[::4, ::4])) // 2  # a sample is enough for a threshold
    otsu, _ = cv2.threshold(np.minimum(steepness, 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    upper = min(max(2 * otsu, 32), 256)
    lines = cv2.Canny(across, down, 0.4 * upper, upper)  # 255 on a line one pixel wide
    side = math.sqrt(lines.size / (grid[0] * grid[1]))  # of a cell, in pixels
    return _saturate(_cell_means(lines, grid) * (side / 255))


def detail(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """Local contrast: the standard deviation of luma in each cell; 32 of 255 grey levels score 0.63.

    The textbook measure of texture (RMS contrast; Peli 1990). Half a grey level is rounding and counts as none.
    """
    luma = _luma(image, "detail").astype(np.float32)
    variance = _cell_means(luma * luma, grid) - _cell_means(luma, grid) ** 2
    return _saturate(np.sqrt(np.maximum(variance - 0.25, 0)) / 32)


def saliency(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """The subject, by a small trained net and by contrast, half each. For subjects put into a new scene.

    See saliency.py. A picture without a subject scores low all over.
    """
    from .saliency import saliency_map  # imports torch, which the other selectors can do without

    return np.clip(_cell_means(saliency_map(_rgb(image, "saliency")), grid), 0, 1)


def contrast(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """What stands out from the picture's border in colour: saliency with nothing learned. See contrast.py."""
    return np.clip(_cell_means(contrast_map(_rgb(image, "contrast")), grid), 0, 1)


def subject(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """The subject, its outline and its rim. For subjects put into a new scene; what the task of that name takes.

    Three quarters saliency and one quarter edges, as far as these lie on or beside something salient; and of that each
    token has 0.4 itself, and 0.3 each from the best token of the 3x3 and of the 5x5 around it. A hole in a subject
    costs a picture more than a token of background gains it, and a subject that is moved or turned no longer lies on
    the grid, so that its border takes the tokens beside it. Chosen on the embedded model's scenes; see docs/quality.md.
    """
    image = _rgb(image, "subject")
    found = saliency(image, grid, generator)
    scores = 0.75 * found + 0.25 * edges(image, grid, generator) * _best_around(found)
    near = _best_around(scores)
    return np.clip(0.4 * scores + 0.3 * near + 0.3 * _best_around(near), 0, 1)


def _best_around(scores: np.ndarray) -> np.ndarray:
    """Of each cell the highest score in the 3x3 around it."""
    return cv2.dilate(scores, np.ones((3, 3), np.uint8))


class Mask:
    """A selector that keeps what a mask covers: each cell's score is the share of it that is covered.

    `masks` holds one mask per reference, uint8 (H, W) from 0 to 255, or None for that reference's own alpha channel;
    empty, it stands for the alpha channel of every reference. A mask is drawn on the picture as the user has it, so it
    must go through the same resize and crop: whoever prepares the pixels asks `user_mask` for it, carries it along and
    hands it over as the image's fourth channel. That channel is all that a call reads.
    """

    def __init__(self, masks: Sequence[np.ndarray | None] = ()) -> None:
        self.masks = tuple(masks)

    def __call__(self, image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
        image = _picture(image, "mask")
        if image.shape[2] != 4:
            raise ValueError(
                "The selector 'mask' found neither a mask nor an alpha channel on this reference: "
                "pass selector=mask([...]) with one mask per reference, or an RGBA picture."
            )
        return np.clip(_cell_means(cv2.extractChannel(image, 3), grid) / 255, 0, 1)


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


# A user's masks -------------------------------------------------------------------------------------------------------


def mask(masks: Sequence) -> Mask:
    """A selector from a user's masks, one per reference, in order: `selector=mask([first, None])`.

    Each is a PIL image or an array (H, W) of the size of its reference picture: bool, float in [0, 1], or integers in
    [0, 255] (a mask that holds only 0 and 1 is read as bool). None stands for that reference's alpha channel. Raises
    ValueError for anything else.
    """
    if hasattr(masks, "convert") or getattr(masks, "ndim", None) == 2 or not isinstance(masks, Iterable):
        raise ValueError("mask() takes a list with one mask per reference: write mask([m]) for a single one.")
    return Mask([None if given is None else _as_mask(given, i) for i, given in enumerate(masks)])


def _as_mask(given, i: int) -> np.ndarray:
    """The mask of reference `i` as uint8 (H, W), 0 to 255."""
    if hasattr(given, "convert") and given.mode[0] not in "FI":  # which would be clipped to 255 on the way
        given = given.convert("L")
    values = _as_array(given)
    kind = values.dtype.kind
    if values.ndim != 2 or values.size == 0 or kind not in "buif":
        raise ValueError(
            f"The mask of reference {i + 1} has shape {values.shape} and type {values.dtype}: "
            "pass an array (H, W) of bool, uint8 or float, or a PIL image."
        )
    top = 1 if kind == "f" else 255
    if not (values.min() >= 0 and values.max() <= top):
        raise ValueError(
            f"The mask of reference {i + 1} runs from {values.min():g} to {values.max():g}: "
            f"{'a float' if kind == 'f' else 'an integer'} mask lies in [0, {top}]."
        )
    if kind == "f" or values.max() <= 1:
        values = np.rint(values.astype(np.float32) * 255)
    return values.astype(np.uint8)


def _as_array(values) -> np.ndarray:
    """An array from one, from lists, or from a tensor of any device and type, with a gradient or without."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy has no bfloat16
    return np.asarray(values)


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


# Names, blends and a user's own functions -----------------------------------------------------------------------------


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
    """Whether it is of this file, and so needs no check."""
    return getattr(selector, "__module__", None) == __name__


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
