"""What was kept, drawn over the picture."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from .selection import Kept, Selection


def draw_kept(picture: np.ndarray, kept: Kept, dim: float = 0.82) -> Image.Image:
    """A reference with the dropped tokens faded to grey and the kept ones in their own colours.

    picture: uint8 (H, W, 3 or 4), the pixels that the selector saw. dim: how far a dropped token fades, 0 to 1.
    Each kept token gets a thin frame where it borders on a dropped one.
    """
    height, width = picture.shape[:2]
    rgb = picture[..., :3].astype(np.float32)
    mask = cv2.resize(kept.mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
    grey = np.repeat(cv2.cvtColor(picture[..., :3].copy(), cv2.COLOR_RGB2GRAY)[..., None], 3, -1).astype(np.float32)
    faded = grey * (1 - dim) + 244 * dim
    drawn = np.where(mask > 0, rgb, faded)
    if len(kept.index) < kept.mask.size:
        outline, _ = cv2.findContours(mask[..., 0], cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        drawn = np.ascontiguousarray(drawn.astype(np.uint8))
        cv2.drawContours(drawn, outline, -1, (226, 76, 60), max(1, round(max(height, width) / 512)))
    return Image.fromarray(drawn.astype(np.uint8))


def draw_selection(pictures: Sequence[np.ndarray], selection: Selection, height: int = 384) -> Image.Image:
    """All references of a call side by side, each `height` pixels high, as `draw_kept` draws them."""
    drawn = []
    for picture, kept in zip(pictures, selection.references, strict=True):
        scale = height / picture.shape[0]
        size = (max(1, round(picture.shape[1] * scale)), height)
        enlarged = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
        drawn.append(draw_kept(enlarged, kept))
    return side_by_side(drawn)


def side_by_side(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures in one row on white, top-aligned, `gap` pixels apart."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet
