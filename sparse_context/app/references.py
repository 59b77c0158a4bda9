"""Pictures that a page loads, and masks that are painted on them."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ..images import PictureError, open_picture
from .scene import DROP, KEEP, NEITHER
from .sessions import Loaded

CANVAS = 768  # pixels of the longer side of what is painted on
COLOURS = {KEEP: (46, 160, 90), DROP: (214, 62, 62)}
"""Of the two brushes, by what they paint."""
LEAST_PAINT = 96  # of 255: a stroke's soft edge that covers less is none


def load_files(paths: Sequence[str]) -> tuple[list[Loaded], list[str]]:
    """The pictures in files that were uploaded, which are deleted, and a sentence for each that is none."""
    loaded, problems = [], []
    for path in map(Path, paths):
        try:
            loaded.append(Loaded(path.name, open_picture(path)))
        except PictureError as error:
            problems.append(str(error).replace(repr(os.fspath(path)), repr(path.name)) + ".")
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                path.parent.rmdir()  # which Gradio makes for each file
    return loaded, problems


def to_canvas(loaded: Loaded) -> dict[str, Any]:
    """A picture and what is painted on it, as Gradio's editor takes them: no larger than `CANVAS`."""
    background = Image.new("RGB", loaded.picture.size, "white")
    background.paste(loaded.picture, mask=loaded.picture if loaded.picture.mode == "RGBA" else None)
    background.thumbnail((CANVAS, CANVAS))
    layer = np.zeros((background.height, background.width, 4), np.uint8)
    if loaded.painted is not None:
        painted = cv2.resize(loaded.painted, background.size, interpolation=cv2.INTER_NEAREST)
        for value, colour in COLOURS.items():
            layer[painted == value] = (*colour, 255)
    over = Image.fromarray(layer)
    composite = Image.alpha_composite(background.convert("RGBA"), over)
    return {"background": background, "layers": [over], "composite": composite}


def from_canvas(value: Mapping[str, Any] | None, size: tuple[int, int]) -> np.ndarray | None:
    """What is painted, uint8 (H, W) as `scene.Reference` has it, for a picture of this (width, height); None where
    nothing is. Of strokes over one another, the last one counts."""
    painted = np.full((size[1], size[0]), NEITHER, np.uint8)
    for layer in (value or {}).get("layers") or []:
        strokes = np.asarray(layer.convert("RGBA"))
        strokes = cv2.resize(strokes, size, interpolation=cv2.INTER_NEAREST)
        covered, keep = strokes[..., 3] >= LEAST_PAINT, strokes[..., 1] > strokes[..., 0]
        painted[covered & keep], painted[covered & ~keep] = KEEP, DROP
    return None if (painted == NEITHER).all() else painted
