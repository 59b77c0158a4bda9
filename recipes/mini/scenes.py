"""Procedural scenes: references, a prompt, and the picture that follows from them.

Edits are functions `(assets, rng) -> Scene`: one reference of the output's size, aligned with it. Subjects are
functions `(assets, rng, side, reach) -> Scene`: larger references with clutter, from which objects move to a named
place, at most `reach` tokens across and down. The truth follows from the references and the prompt alone: the place is
named, the output scale is fixed, the object keeps the orientation that it has in its reference. So a score against the
truth means something. Everything random is drawn from the one generator given, so a seed is a scene.

Subjects move by whole tokens (`subject_scale` excepted), so that a small model can copy them: it need not resample.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import cv2
import numpy as np

from .data import OBJECT_SIZE, Assets

SIZE = 128  # side of outputs and of an edit's reference, in pixels
REFERENCE = 192  # side of a subject's reference
TOKEN = 8  # side of what one token stands for
FAR = REFERENCE // TOKEN  # tokens: no object can move farther
SHOWS = 0.02  # share of a token from which on it shows an object: what is there of an outline counts
OBJECT = 72  # side of an object placed alone
PAIR = 56  # side of each of two objects placed side by side, and of those in quarters

COLOURS = {
    "red": (214, 48, 49),
    "orange": (235, 137, 41),
    "yellow": (244, 211, 74),
    "green": (60, 158, 78),
    "teal": (42, 157, 160),
    "blue": (52, 103, 212),
    "purple": (126, 72, 178),
    "pink": (238, 140, 180),
    "brown": (121, 80, 52),
    "white": (248, 248, 248),
    "grey": (132, 134, 138),
    "black": (24, 24, 28),
}
PLACES = {
    "top left": (38, 38),
    "top": (64, 38),
    "top right": (90, 38),
    "left": (38, 64),
    "centre": (64, 64),
    "right": (90, 64),
    "bottom left": (38, 90),
    "bottom": (64, 90),
    "bottom right": (90, 90),
}
HALVES = (("left", "right"), ("top", "bottom"))  # of a picture, along x and along y
QUARTERS = {"top left": (34, 34), "top right": (94, 34), "bottom left": (34, 94), "bottom right": (94, 94)}


@dataclass(frozen=True)
class Scene:
    """One sample.

    references: uint8 (S, S, 3) each, S being 128 for edits and backgrounds, and the side asked for else.
    target: uint8 (128, 128, 3), the truth.
    mask: float32 (128, 128) in [0, 1], where the objects are in the target.
    reference_masks: the same, in each reference.
    distractors: where the objects are that the prompt does not ask for, in each reference; empty where there are none.
    source: int64 (16, 16), for each token of the target the reference token that shows the same, or the same part of
        an object, counted through all references row by row; -1 where there is none.
    """

    task: str
    prompt: str
    references: tuple[np.ndarray, ...]
    target: np.ndarray
    mask: np.ndarray
    reference_masks: tuple[np.ndarray, ...]
    source: np.ndarray
    distractors: tuple[np.ndarray, ...] = ()

    @property
    def focus(self) -> np.ndarray:
        """The objects' share of each token of the target, float32 (16, 16); 0 where the whole picture is edited."""
        return _tokens(self.mask) * (self.task.removeprefix("edit_") not in GLOBAL_EDITS)


def draw_object(assets: Assets, rng: np.random.Generator) -> np.ndarray:
    """A random object, premultiplied, float32 (128, 128, 4): turned by up to 12 degrees, maybe flipped or feathered."""
    rgba = assets.objects[rng.integers(len(assets.objects))].astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    if rng.random() < 0.5:
        rgba = rgba[:, ::-1]
    centre = (OBJECT_SIZE - 1) / 2
    turn = cv2.getRotationMatrix2D((centre, centre), rng.uniform(-12, 12), 0.92)
    rgba = cv2.warpAffine(np.ascontiguousarray(rgba), turn, (OBJECT_SIZE, OBJECT_SIZE), flags=cv2.INTER_LINEAR)
    return cv2.GaussianBlur(rgba, (0, 0), rng.uniform(0.5, 1.5)) if rng.random() < 0.25 else rgba


def place(
    canvas: np.ndarray, rgba: np.ndarray, centre: tuple[float, float], size: float, shadow: float = 0.0
) -> np.ndarray:
    """Paint an object onto `canvas` (float32 (S, S, 3), changed in place) and return its mask, float32 (S, S).

    The object is scaled to a square of `size` pixels around `centre` (x, y); what lies outside the canvas is cut off.
    `shadow` in [0, 1] darkens the canvas below and right of the object before it is painted.
    """
    side = max(4, round(size))
    small = cv2.resize(rgba, (side, side), interpolation=cv2.INTER_AREA)
    left, top = centre[0] - side / 2, centre[1] - side / 2
    shift = np.array([[1, 0, left], [0, 1, top]], np.float32)
    painted = cv2.warpAffine(small, shift, (canvas.shape[1], canvas.shape[0]), flags=cv2.INTER_LINEAR)
    mask = painted[..., 3]
    if shadow:
        moved = cv2.warpAffine(mask, np.array([[1, 0, 3], [0, 1, 5]], np.float32), mask.shape[::-1])
        canvas *= 1 - shadow * cv2.GaussianBlur(moved, (0, 0), 3)[..., None]
    canvas *= 1 - mask[..., None]
    canvas += painted[..., :3]
    return mask


def photograph(assets: Assets, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """A random crop of a random photograph, float32 (size, size, 3) in [0, 1]."""
    photo = assets.photos[rng.integers(len(assets.photos))]
    side = int(rng.integers(size, photo.shape[0] + 1))
    top, left = rng.integers(photo.shape[0] - side + 1, size=2)
    crop = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return np.clip(crop * rng.uniform(0.75, 1.15) + rng.uniform(-0.05, 0.1), 0, 1)


def texture(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """A procedural texture between two or three colours, float32 (size, size, 3) in [0, 1]."""
    a, b, c = (rng.random((3, 3)) * 0.9 + 0.05).astype(np.float32)
    kind = rng.integers(5)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == 0:  # gradient
        weight = (along - along.min()) / (along.max() - along.min())
    elif kind == 1:  # stripes
        weight = 0.5 + 0.5 * np.sin(along * rng.uniform(15, 70))
    elif kind == 2:  # checks
        n = int(rng.integers(4, 14))
        weight = ((np.floor(x * n) + np.floor(y * n)) % 2).astype(np.float32)
    else:  # noise of two octaves, coarse or fine
        n = int(rng.integers(3, 9)) if kind == 3 else int(rng.integers(16, 40))
        weight = cv2.resize(rng.random((n, n)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        finer = cv2.resize(rng.random((2 * n, 2 * n)).astype(np.float32), (size, size))
        weight = np.clip(weight + 0.3 * (finer - 0.5), 0, 1)
    out = a + (b - a) * weight[..., None]
    if rng.random() < 0.3:  # a second, coarse layer
        n = int(rng.integers(2, 5))
        layer = cv2.resize(rng.random((n, n)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        out = out + (c - out) * np.clip(layer, 0, 1)[..., None] * 0.6
    return np.ascontiguousarray(np.clip(out, 0, 1))


def background(assets: Assets, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """A photograph, as often as the assets say (three times out of five), else a texture: float32 (size, size, 3)."""
    return photograph(assets, rng, size) if rng.random() < assets.photographs else texture(rng, size)


def _picture(canvas: np.ndarray) -> np.ndarray:
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _say(rng: np.random.Generator, *wordings: str, **words: str) -> str:
    return wordings[rng.integers(len(wordings))].format(**words)


def _colour(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    name = list(COLOURS)[rng.integers(len(COLOURS))]
    return name, np.array(COLOURS[name], np.float32) / 255


def _plain(colour: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(colour, (SIZE, SIZE, 3)).astype(np.float32))


def _backdrop(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """The background that a prompt can name, (words, float32 (128, 128, 3)): plain, or graded from top to bottom."""
    name, colour = _colour(rng)
    if rng.random() < 0.75:
        return name, _plain(colour)
    other, below = _colour(rng)
    weight = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    return f"{name} to {other}", np.ascontiguousarray(_plain(colour) * (1 - weight) + below * weight)


def _tokens(mask: np.ndarray) -> np.ndarray:
    """The mean of a mask over each token, (rows, columns)."""
    rows, columns = (side // TOKEN for side in mask.shape)
    return mask.reshape(rows, TOKEN, columns, TOKEN).mean((1, 3))


def _aligned(shown: np.ndarray | None = None, first: int = 0) -> np.ndarray:
    """`Scene.source` of a reference of the output's size, whose tokens count from `first`: where `shown`, or all."""
    source = first + np.arange((SIZE // TOKEN) ** 2).reshape(SIZE // TOKEN, -1)
    return source if shown is None else np.where(shown, source, -1)


def _moved(mask: np.ndarray, moves: tuple[int, int], side: int, first: int = 0) -> np.ndarray:
    """`Scene.source` of an object that lies in `mask` of the target, and `moves` (across, down) tokens from there in a
    reference of `side` pixels whose tokens count from `first`. Where it covers less than `SHOWS` of a token: -1."""
    rows, columns = np.mgrid[: SIZE // TOKEN, : SIZE // TOKEN]
    source = first + (rows + moves[1]) * (side // TOKEN) + columns + moves[0]
    return np.where(_tokens(mask) >= SHOWS, source, -1)


def _luma(canvas: np.ndarray) -> np.ndarray:
    return (canvas @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


def _subject(
    assets: Assets,
    rng: np.random.Generator,
    side: int,
    reach: int,
    size: float,
    target: tuple[int, int],
    spread: float = 0.0,
):
    """An object in a busy reference of `side` pixels: (the object, the reference as float, the object's mask there, by
    how many tokens across and down it lies elsewhere than in the output; None where it has another scale).

    Without `spread` it is as large as it will be at `target` (x, y) of the output, and up to `reach` whole tokens away
    from there, across and down.
    """
    rgba = draw_object(assets, rng)
    size = min(size * np.exp(rng.uniform(-spread, spread)), side - 4)
    margin = size / 2 + 2
    centre, moves = rng.uniform(margin, side - margin, 2), None
    if not spread:
        least = np.maximum(np.ceil((margin - np.array(target)) / TOKEN), -reach)
        most = np.minimum(np.floor((side - margin - np.array(target)) / TOKEN), reach)
        moves = rng.integers(least, np.maximum(most, least), endpoint=True)
        centre = np.add(target, TOKEN * moves, dtype=float)
    canvas = background(assets, rng, side)
    mask = place(canvas, rgba, tuple(centre), size, shadow=rng.uniform(0, 0.5))
    return rgba, canvas, mask, moves


def _edited(assets: Assets, rng: np.random.Generator):
    """The picture to be edited: an object of any size anywhere, (the canvas, the object's mask, the object alone)."""
    rgba = draw_object(assets, rng)
    canvas = background(assets, rng)
    centre, size, shadow = rng.uniform(40, SIZE - 40, 2), rng.uniform(56, 112), rng.uniform(0, 0.5)
    mask = place(canvas, rgba, tuple(centre), size, shadow)
    alone = np.zeros_like(canvas)
    place(alone, rgba, tuple(centre), size)
    return canvas, mask, alone


def edit_background(assets: Assets, rng: np.random.Generator) -> Scene:
    """The background becomes one plain named colour; the object stays, pixel for pixel."""
    canvas, mask, alone = _edited(assets, rng)
    name, colour = _colour(rng)
    target = _plain(colour) * (1 - mask[..., None]) + alone
    prompt = _say(
        rng,
        "Make the background plain {c}.",
        "Replace the background with {c}.",
        "Put the object on a plain {c} background.",
        "Change the background to {c}, keep the object.",
        c=name,
    )
    return Scene(
        "edit_background",
        prompt,
        (_picture(canvas),),
        _picture(target),
        mask,
        (mask,),
        _aligned(_tokens(mask) >= SHOWS),
    )


def edit_object(assets: Assets, rng: np.random.Generator) -> Scene:
    """The object is tinted in a named colour, with its shading; the background stays."""
    canvas, mask, alone = _edited(assets, rng)
    name, colour = _colour(rng)
    tinted = colour * (0.25 + _luma(alone)) * mask[..., None]
    target = canvas - alone + np.minimum(tinted, mask[..., None])
    prompt = _say(
        rng, "Make the object {c}.", "Recolour the object in {c}.", "Turn the object {c}, keep the background.", c=name
    )
    return Scene("edit_object", prompt, (_picture(canvas),), _picture(target), mask, (mask,), _aligned())


def edit_named(assets: Assets, rng: np.random.Generator) -> Scene:
    """Of two objects, left and right or top and bottom, the named one stays, pixel for pixel; all else becomes one
    plain named colour. Each lies anywhere in its half, of a size of its own, and no shadow reaches the other."""
    axis, named = int(rng.integers(2)), int(rng.integers(2))
    canvas, objects, masks = background(assets, rng), [], []
    for half in range(2):
        size = int(rng.integers(PAIR - 20, PAIR, endpoint=True))
        margin = size / 2 + 4
        centre = rng.uniform(margin, SIZE - margin, 2)
        centre[axis] = half * SIZE / 2 + rng.uniform(margin, SIZE / 2 - margin)
        objects.append((draw_object(assets, rng), tuple(centre), size))
        masks.append(place(canvas, *objects[-1], shadow=rng.uniform(0, 0.5)))
    name, colour = _colour(rng)
    target = _plain(colour)
    mask = place(target, *objects[named])
    prompt = _say(
        rng,
        "Put the {p} object on a plain {c} background.",
        "The {p} object on a plain {c} background.",
        "Make the background plain {c}, keep the {p} object.",
        "Change the background to {c}, keep the object at the {p}.",
        p=HALVES[axis][named],
        c=name,
    )
    return Scene(
        "edit_named",
        prompt,
        (_picture(canvas),),
        _picture(target),
        mask,
        (mask,),
        _aligned(_tokens(mask) >= SHOWS),
        (masks[1 - named],),
    )


GLOBAL_EDITS: Mapping[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...]]] = {
    "grey": (
        lambda x: np.repeat(_luma(x), 3, -1),
        ("Turn the picture grey.", "Make it black and white.", "Remove all colour."),
    ),
    "sepia": (
        lambda x: _luma(x) * np.array([1.07, 0.86, 0.64], np.float32),
        ("Turn the picture sepia.", "Give it an old sepia tone."),
    ),
    "negative": (
        lambda x: 1 - x,
        ("Turn the picture into its negative.", "Invert all colours.", "Make a negative of it."),
    ),
    "warmer": (
        lambda x: x * np.array([1.2, 1.0, 0.72], np.float32),
        ("Make the colours warmer.", "Give the picture a warmer light."),
    ),
    "posterise": (
        lambda x: np.round(x * 3) / 3,
        ("Posterise the picture.", "Reduce it to a few flat colours."),
    ),
}


def edit_global(assets: Assets, rng: np.random.Generator) -> Scene:
    """The whole picture through one of `GLOBAL_EDITS`."""
    canvas, mask, _ = _edited(assets, rng)
    name = list(GLOBAL_EDITS)[rng.integers(len(GLOBAL_EDITS))]
    edit, wordings = GLOBAL_EDITS[name]
    prompt, target = _say(rng, *wordings), _picture(edit(canvas))
    return Scene(f"edit_{name}", prompt, (_picture(canvas),), target, mask, (mask,), _aligned())


def edit_remove(assets: Assets, rng: np.random.Generator) -> Scene:
    """The object disappears. What was behind it can only be guessed, so this is looked at and not scored.

    No token is named as the source of another: what fills the gap may come from anywhere around it.
    """
    rgba, canvas = draw_object(assets, rng), background(assets, rng)
    target = _picture(canvas)
    mask = place(canvas, rgba, tuple(rng.uniform(40, SIZE - 40, 2)), rng.uniform(40, 80), rng.uniform(0, 0.5))
    prompt = _say(rng, "Remove the object.", "Take the object away.", "Leave only the background.")
    return Scene("edit_remove", prompt, (_picture(canvas),), target, mask, (mask,), np.full_like(_aligned(), -1))


def subject_place(
    assets: Assets, rng: np.random.Generator, side: int = REFERENCE, reach: int = FAR, spread: float = 0.0
) -> Scene:
    """The object of image 1 on a plain or graded background at a named place, 72 px large, turned as in the reference.

    `spread` is the natural logarithm of the largest change of scale between reference and output.
    """
    where = list(PLACES)[rng.integers(len(PLACES))]
    rgba, canvas, reference_mask, moves = _subject(assets, rng, side, reach, OBJECT, PLACES[where], spread)
    words, target = _backdrop(rng)
    mask = place(target, rgba, PLACES[where], OBJECT)
    prompt = _say(
        rng,
        "The object of image 1 on a plain {c} background, {p}.",
        "Place the object at the {p} on {c}.",
        "Put the object of image 1 on {c}, at the {p}.",
        "{c} background, the object of image 1 at the {p}.",
        c=words,
        p=where,
    )
    source = np.full_like(_aligned(), -1) if moves is None else _moved(mask, moves, side)
    return Scene("subject_place", prompt, (_picture(canvas),), _picture(target), mask, (reference_mask,), source)


def subject_scale(assets: Assets, rng: np.random.Generator, side: int = REFERENCE, reach: int = FAR) -> Scene:
    """As `subject_place`, with the object anywhere in the reference and up to 1.6 times larger or smaller there."""
    return replace(subject_place(assets, rng, side, reach, spread=0.47), task="subject_scale")


def subject_pair(assets: Assets, rng: np.random.Generator, side: int = REFERENCE, reach: int = FAR) -> Scene:
    """The objects of images 1 and 2 side by side, 56 px each, on a plain or graded background: that of image 1 is
    the left one, whether the prompt says so or not."""
    left, right = (34, 64), (94, 64)
    a, ref_a, mask_a, moves_a = _subject(assets, rng, side, reach, PAIR, left)
    b, ref_b, mask_b, moves_b = _subject(assets, rng, side, reach, PAIR, right)
    words, target = _backdrop(rng)
    placed_a, placed_b = place(target, a, left, PAIR), place(target, b, right, PAIR)
    source = np.maximum(_moved(placed_a, moves_a, side), _moved(placed_b, moves_b, side, (side // TOKEN) ** 2))
    prompt = _say(
        rng,
        "The objects of image 1 and image 2 side by side on {c}.",
        "Image 1's object on the left, image 2's on the right, {c} background.",
        "Both objects next to each other on a plain {c} background.",
        c=words,
    )
    return Scene(
        "subject_pair",
        prompt,
        (_picture(ref_a), _picture(ref_b)),
        _picture(target),
        np.maximum(placed_a, placed_b),
        (mask_a, mask_b),
        source,
    )


def subject_scene(assets: Assets, rng: np.random.Generator, side: int = REFERENCE, reach: int = FAR) -> Scene:
    """The object of image 1 in the middle of the picture of image 2, which has the output's size."""
    rgba, canvas, reference_mask, moves = _subject(assets, rng, side, reach, OBJECT, PLACES["centre"])
    scene = background(assets, rng)
    target = scene.copy()
    mask = place(target, rgba, PLACES["centre"], OBJECT)
    prompt = _say(
        rng,
        "The object of image 1 in front of image 2.",
        "Put the object of image 1 into image 2.",
        "Image 2 with the object of image 1 in its centre.",
    )
    source = _moved(mask, moves, side)
    source = np.where(_tokens(mask) < 0.5, _aligned(first=(side // TOKEN) ** 2), source)  # that which covers more
    return Scene(
        "subject_scene",
        prompt,
        (_picture(canvas), _picture(scene)),
        _picture(target),
        mask,
        (reference_mask, np.ones((SIZE, SIZE), np.float32)),
        source,
    )


def subject_quarters(assets: Assets, rng: np.random.Generator, side: int = REFERENCE, reach: int = FAR) -> Scene:
    """Three or four objects, one reference each, in named quarters of a plain background."""
    places = [list(QUARTERS)[i] for i in rng.permutation(4)[: rng.integers(3, 5)]]
    subjects = [_subject(assets, rng, side, reach, PAIR, QUARTERS[where]) for where in places]
    name, colour = _colour(rng)
    target, mask, source = _plain(colour), np.zeros((SIZE, SIZE), np.float32), np.full_like(_aligned(), -1)
    for i, ((rgba, _, _, moves), where) in enumerate(zip(subjects, places, strict=True)):
        placed = place(target, rgba, QUARTERS[where], PAIR)
        mask = np.maximum(mask, placed)
        source = np.maximum(source, _moved(placed, moves, side, i * (side // TOKEN) ** 2))
    listing = ", ".join(f"{i + 1} {where}" for i, where in enumerate(places))
    prompt = _say(rng, "Objects on {c}: {l}.", "On {c}, the objects {l}.", c=name, l=listing)
    return Scene(
        "subject_quarters",
        prompt,
        tuple(_picture(s[1]) for s in subjects),
        _picture(target),
        mask,
        tuple(s[2] for s in subjects),
        source,
    )


EDITS: Mapping[str, Callable[[Assets, np.random.Generator], Scene]] = {
    "edit_background": edit_background,
    "edit_object": edit_object,
    "edit_named": edit_named,
    "edit_global": edit_global,
    "edit_remove": edit_remove,
}
SUBJECTS: Mapping[str, Callable[[Assets, np.random.Generator, int, int], Scene]] = {
    "subject_place": subject_place,
    "subject_scale": subject_scale,
    "subject_pair": subject_pair,
    "subject_scene": subject_scene,
    "subject_quarters": subject_quarters,
}
TASKS = (*EDITS, *SUBJECTS)


def draw_scene(assets: Assets, task: str, rng: np.random.Generator, side: int = REFERENCE, reach: int = FAR) -> Scene:
    """One scene of `task`; `side` is that of a subject's references, in pixels, and `reach` how far objects move."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, and has to be one of {', '.join(TASKS)}")
    return EDITS[task](assets, rng) if task in EDITS else SUBJECTS[task](assets, rng, side, reach)


def make_scene(assets: Assets, task: str, seed: int, side: int = REFERENCE) -> Scene:
    """The scene that `seed` stands for; the same on every machine for the same assets."""
    return draw_scene(assets, task, np.random.default_rng(seed), side)
