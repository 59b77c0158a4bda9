"""A user's masks: what they cover is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import cv2
import numpy as np

from .cells import Grid, cell_means, check_picture

DROP, NEITHER, KEEP = 0, 128, 255
"""What a painted mask holds for each pixel: a mask that also says what to drop."""


@runtime_checkable
class PillowImage(Protocol):
    """A picture of Pillow, which selecting does without unless a mask comes as one."""

    mode: str

    def convert(self, mode: str) -> PillowImage: ...


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
        image = check_picture(image, "mask")
        if image.shape[2] != 4:
            raise ValueError(
                "The selector 'mask' found neither a mask nor an alpha channel on this reference: "
                "pass selector=mask([...]) with one mask per reference, or an RGBA picture."
            )
        return np.clip(cell_means(cv2.extractChannel(image, 3), grid) / 255, 0, 1)


def mask(masks: Sequence[object]) -> Mask:
    """A selector from a user's masks, one per reference, in order: `selector=mask([first, None])`.

    Each is a PIL image or an array (H, W) of the size of its reference picture: bool, float in [0, 1], or integers in
    [0, 255] (a mask that holds only 0 and 1 is read as bool). None stands for that reference's alpha channel. Raises
    ValueError for anything else.
    """
    if isinstance(masks, PillowImage) or getattr(masks, "ndim", None) == 2 or not isinstance(masks, Iterable):
        raise ValueError("mask() takes a list with one mask per reference: write mask([m]) for a single one.")
    return Mask([None if values is None else _as_mask(values, i) for i, values in enumerate(masks)])


def _as_mask(mask: object, i: int) -> np.ndarray:
    """The mask of reference `i` as uint8 (H, W), 0 to 255."""
    if isinstance(mask, PillowImage) and mask.mode[0] not in "FI":  # which would be clipped to 255 on the way
        mask = mask.convert("L")
    values = as_array(mask)
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


def as_array(values: object) -> np.ndarray:
    """An array from one, from lists, or from a tensor of any device and type, with a gradient or without."""
    torch = sys.modules.get("torch")  # without it nothing is a tensor
    if torch is not None and isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        values = tensor.float() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
    return np.asarray(values)
