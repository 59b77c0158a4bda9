"""Pictures that a page loads, and masks that are painted on them."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import gradio as gr
import numpy as np
from gradio_client.utils import is_http_url_like
from PIL import Image, ImageOps

from ..images import PictureError, open_picture
from ..selectors.masks import DROP, KEEP, NEITHER
from .sessions import Loaded

CANVAS = 768  # pixels of the longer side of what is painted on, so that a brush is as wide on every picture
COLOURS = {KEEP: (46, 160, 90), DROP: (214, 62, 62)}
"""Of the two brushes, by what they paint."""
OPACITY = 0.6  # of a stroke, so that the picture is seen through it
LEAST_PAINT = 96  # of 255: a stroke's soft edge that covers less is none


def take_uploads_only(control: Any) -> None:
    """Let a page put nothing into a control but what it uploads. (Gradio would fetch an address that stands there.)

    The instance is changed, for Gradio writes a file beside the source of every class below its own. It is to get
    values alone, and no `gr.update`, which would make another instance.
    """
    move = control.async_move_resource_to_block_cache

    async def move_what_was_uploaded(path: Any) -> str | None:
        if is_http_url_like(str(path)):
            raise ValueError("Upload an image as a file: addresses are not fetched.")
        return await move(path)

    control.async_move_resource_to_block_cache = move_what_was_uploaded


def take_paths(files: gr.File) -> None:
    """Let a field for files hand over where they lie. (Its own way leaves an empty file behind for each.)"""

    def paths(payload: Any) -> list[str]:
        return [] if payload is None else [file.path for file in payload.root]

    files.preprocess = paths  # type: ignore[method-assign]


def load_files(paths: Sequence[str], room: int) -> tuple[list[Loaded], list[str], int]:
    """The pictures in files that were uploaded, which are deleted; a sentence for each that is none; and how many were
    not opened, because there was no room for more than `room`."""
    loaded: list[Loaded] = []
    problems: list[str] = []
    left = 0
    for path in map(Path, paths):
        try:
            if len(loaded) < room:
                loaded.append(Loaded(path.name, open_picture(path)))
            else:
                left += 1
        except PictureError as error:
            problems.append(str(error).replace(repr(os.fspath(path)), repr(path.name)) + ".")
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                path.parent.rmdir()  # which Gradio makes for each file
    return loaded, problems, left


def apart(pictures: Sequence[Loaded]) -> list[Loaded]:
    """Pictures whose names differ, for what is copied names files: of two that are image.png, the second becomes
    "image (2).png"."""
    taken: set[str] = set()
    for each in pictures:
        path, number = Path(each.name), 2
        while each.name in taken:
            each.name, number = str(path.with_name(f"{path.stem} ({number}){path.suffix}")), number + 1
        taken.add(each.name)
    return list(pictures)


def to_canvas(loaded: Loaded) -> dict[str, Any]:
    """A picture and what is painted on it, as Gradio's editor takes them, at the size of `CANVAS`."""
    background = Image.new("RGB", loaded.picture.size, "white")
    background.paste(loaded.picture, mask=loaded.picture if loaded.picture.mode == "RGBA" else None)
    background = ImageOps.contain(background, (CANVAS, CANVAS))
    layer = np.zeros((background.height, background.width, 4), np.uint8)
    if loaded.painted is not None:
        painted = cv2.resize(loaded.painted, background.size, interpolation=cv2.INTER_NEAREST_EXACT)
        for value, colour in COLOURS.items():
            layer[painted == value] = (*colour, round(255 * OPACITY))
    over = Image.fromarray(layer)
    composite = Image.alpha_composite(background.convert("RGBA"), over)
    return {"background": background, "layers": [over], "composite": composite}


def from_canvas(value: Mapping[str, Any] | None, size: tuple[int, int]) -> np.ndarray | None:
    """What is painted, uint8 (H, W) as `scene.Reference` has it, for a picture of this (width, height); None where
    nothing is. Of strokes over one another, the last one counts."""
    painted = np.full((size[1], size[0]), NEITHER, np.uint8)
    for layer in (value or {}).get("layers") or []:
        strokes = np.asarray(layer.convert("RGBA"))
        strokes = cv2.resize(strokes, size, interpolation=cv2.INTER_NEAREST_EXACT)
        covered, keep = strokes[..., 3] >= LEAST_PAINT, strokes[..., 1] > strokes[..., 0]
        painted[covered & keep], painted[covered & ~keep] = KEEP, DROP
    return None if (painted == NEITHER).all() else painted
