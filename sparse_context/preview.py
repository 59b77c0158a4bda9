"""What is kept of pictures, drawn over them; with no model loaded, and so without torch."""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .config import SparseContextConfig
from .images import MAX_PIXELS
from .overview import enlarge, shrink_picture
from .selection import Kept, Score, Selection, score_tokens, select_tokens
from .selectors.cells import rgb_pixels, whole_cells
from .selectors.registry import SelectorsLike, user_mask
from .selectors.text import CPU, Place
from .trained import Trained

MAX_AREA = 1024 * 1024  # the FLUX.2 pipelines scale a larger reference down to this many pixels, and preprocess it then
MAX_ASPECT = 8  # they refuse anything wider or taller
MIN_SIDE = 64  # and anything smaller, in pixels

KEPT_COLOUR = (226, 76, 60)  # of the frame around kept tokens
PHRASE_COLOUR = (30, 96, 200)  # and around what a phrase names


def fit_reference(
    picture: Image.Image, side: float | None = None, narrow: bool = True, max_area: int = MAX_AREA
) -> Image.Image:
    """A reference in a size that its pipeline takes as it is: RGB, RGBA, or L for a mask.

    What is longer than 8:1 is padded to that, centred, with white (a mask with 0). The result then has about `side`**2
    pixels; without `side` it keeps its size, unless it is above `max_area` pixels, one megapixel: that is scaled down
    as the FLUX.2 pipelines themselves do it. No side is below 64 pixels. Transparent parts are laid on white; their
    alpha stays, as a mask. A pipeline that is not `narrow` takes every size, so where `side` is None too, the size is
    kept. Raises ValueError for a strip that would have more than `MAX_PIXELS` once it is padded.
    """
    if picture.mode == "RGBA":  # its parts apart, because Pillow blackens what is transparent when it scales
        white = Image.new("RGBA", picture.size, "white")
        fitted = fit_reference(Image.alpha_composite(white, picture).convert("RGB"), side, narrow, max_area)
        fitted.putalpha(fit_reference(picture.getchannel("A"), side, narrow, max_area))
        return fitted
    if side is None and not narrow:
        return picture
    width, height = picture.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        size = max(width, math.ceil(height / MAX_ASPECT)), max(height, math.ceil(width / MAX_ASPECT))
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(
                f"A reference has {width}x{height} pixels, too long a strip to be padded to {MAX_ASPECT}:1: crop it, "
                "or scale it down."
            )
        padded = Image.new(picture.mode, size, 0 if picture.mode == "L" else "white")
        padded.paste(picture, ((size[0] - width) // 2, (size[1] - height) // 2))
        picture, (width, height) = padded, size
    if side is None and width * height > max_area:
        scale = math.sqrt(max_area / (width * height))
        wide, high = int(width * scale), int(height * scale)  # rounded as the pipelines do
    else:
        scale = max(1.0 if side is None else side / math.sqrt(width * height), MIN_SIDE / min(width, height))
        wide, high = round(width * scale), round(height * scale)
    if scale == 1:
        return picture
    size = min(wide, MAX_ASPECT * high), min(high, MAX_ASPECT * wide)  # rounding may have gone beyond 8:1
    return picture.resize(size, Image.Resampling.LANCZOS)


def reference_mask(selectors: SelectorsLike, i: int, picture: Image.Image) -> Image.Image | None:
    """The user's mask of reference `i` in `selectors`, mode L, or None. Raises ValueError for one of another size."""
    pixels = user_mask(selectors, i)
    if pixels is None:
        return None
    mask = Image.fromarray(pixels)
    if mask.size != picture.size:
        raise ValueError(
            f"The mask of reference {i + 1} is {mask.width}x{mask.height}, but its picture is "
            f"{picture.width}x{picture.height}: pass a mask of the picture's own size."
        )
    return mask


def draw_kept(picture: np.ndarray, kept: Kept, dim: float = 0.82) -> Image.Image:
    """A reference with the dropped tokens faded to grey and the kept ones in their own colours.

    picture: uint8 (H, W, 3 or 4), the pixels that the selector saw. dim: how far a dropped token fades, 0 to 1.
    A token that is kept as it is gets a thin frame where it borders on others. Where a mean of tokens is kept, they
    show its colour. With an overview, nothing fades: beside the sharp tokens stands what it shows, enlarged. Where a
    phrase was looked for, it stands in a corner, and what it names has a frame of another colour.
    """
    height, width = picture.shape[:2]
    rgb = picture[..., :3].astype(np.float32)
    grey = np.repeat(cv2.cvtColor(picture[..., :3].copy(), cv2.COLOR_RGB2GRAY)[..., None], 3, -1).astype(np.float32)
    others = grey * (1 - dim) + 244 * dim
    if kept.cells is not None:
        others = cv2.resize(_blurred(kept, kept.cells), (width, height), interpolation=cv2.INTER_LINEAR)
    sharp = kept.mask
    if len(kept.averages):
        sharp[np.unravel_index(kept.averages, kept.grid)] = False
        mosaic, shows = (
            cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST) for part in _mean_colours(rgb, kept)
        )
        others = np.where(shows[..., None] > 0, mosaic, others)
    mask = cv2.resize(sharp.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    drawn = np.ascontiguousarray(np.where(mask[..., None] > 0, rgb, others).astype(np.uint8))
    line = max(1, round(max(height, width) / 512))
    if not sharp.all():
        _frame(drawn, mask, KEPT_COLOUR, line)
    if kept.found is None or kept.phrase is None:
        return Image.fromarray(drawn)
    found = cv2.resize(kept.found, (width, height), interpolation=cv2.INTER_LINEAR)
    shows = (found >= found.max() / 2) & (found > 0)
    _frame(drawn, shows.astype(np.uint8), PHRASE_COLOUR, 2 * line)
    return _with_tag(Image.fromarray(drawn), kept.phrase if shows.any() else f"{kept.phrase}: nowhere")


def _frame(drawn: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], line: int) -> None:
    """Draw the outline of a mask, uint8 (H, W), into a picture (H, W, 3), `line` pixels wide."""
    outline, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(drawn, outline, -1, colour, line)


def _with_tag(picture: Image.Image, text: str) -> Image.Image:
    """A picture with a text in its upper left corner, as large as fits, on a ground of the phrase's colour."""
    font = ImageFont.load_default(_fitting(text, picture.width - 6, max(10, min(22, picture.width // 16))))
    draw = ImageDraw.Draw(picture)
    _, _, right, bottom = draw.textbbox((3, 2), text, font=font)
    draw.rectangle((0, 0, right + 3, bottom + 3), fill=PHRASE_COLOUR)
    draw.text((3, 2), text, fill="white", font=font)
    return picture


def _blurred(kept: Kept, cells: int) -> np.ndarray:
    """What the overview of a reference shows of it, float32 (H, W, 3) in grey levels: a token for so many cells a
    side."""
    picture = whole_cells(rgb_pixels(kept.picture, "residual"), kept.grid)
    return enlarge(shrink_picture(picture, kept.grid, cells), picture.shape[:2], cells)


def _mean_colours(rgb: np.ndarray, kept: Kept) -> tuple[np.ndarray, np.ndarray]:
    """For each token of which a mean is kept the colour of that mean, float32 (rows, columns, 3), and where, uint8."""
    rows, columns = kept.grid
    into = kept.stands_for
    averaged = np.flatnonzero(np.isin(into, kept.averages))
    cells = cv2.resize(rgb, (columns, rows), interpolation=cv2.INTER_AREA).reshape(-1, 3)
    sums = np.zeros(cells.shape)
    np.add.at(sums, into[averaged], cells[averaged])
    members = np.bincount(into[averaged], minlength=len(cells))
    colours, shows = np.zeros((rows * columns, 3), np.float32), np.zeros(rows * columns, np.uint8)
    colours[averaged] = (sums / np.maximum(members, 1)[:, None])[into[averaged]]
    shows[averaged] = 1
    return colours.reshape(rows, columns, 3), shows.reshape(rows, columns)


def draw_selection(selection: Selection, height: int = 384) -> Image.Image:
    """All references of a call side by side, each `height` pixels high, as `draw_kept` draws them.

    Raises ValueError where a reference has no pixels to draw on, because it reached the host as latents.
    """
    drawn = []
    for i, kept in enumerate(selection.references):
        if kept.picture is None:
            raise ValueError(f"Reference {i + 1} reached the pipeline as latents: there is no picture to draw on.")
        scale = height / kept.picture.shape[0]
        size = (max(1, round(kept.picture.shape[1] * scale)), height)
        enlarged = cv2.resize(kept.picture, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
        overview = f", overview by {kept.overview.factor}" if kept.overview else ""
        text = f"{kept.count} of {kept.total} tokens{overview}, {kept.selector}"
        drawn.append(label(draw_kept(enlarged, kept), text))
    return side_by_side(drawn)


def select_pictures(
    pictures: Sequence[Image.Image],
    config: SparseContextConfig,
    token: int = 16,
    trained: Trained | None = None,
    score: Score = score_tokens,
    place: Place = CPU,
    fit: Callable[[Image.Image], Image.Image] = fit_reference,
) -> Selection:
    """What would be kept of pictures (RGB or RGBA) by a model whose tokens are `token` pixels wide, without that model.

    The pictures and their masks go through `fit`, which is what the FLUX.2 pipelines do, and are cropped to whole
    tokens. `trained`, `score` and `place` are those of `select_tokens`.
    """
    seen, grids = [], []
    for i, picture in enumerate(pictures):
        mask = reference_mask(config.selector, i, picture)
        picture = fit(picture)
        if mask is not None:
            picture = picture.convert("RGB")
            picture.putalpha(fit(mask))
        columns, rows = picture.width // token, picture.height // token
        if not rows or not columns:
            raise ValueError(
                f"Picture {i + 1} is {picture.width}x{picture.height}, less than one token of {token} pixels: "
                "pass a larger picture or a smaller token."
            )
        left, top = (picture.width - columns * token) // 2, (picture.height - rows * token) // 2
        seen.append(np.asarray(picture.crop((left, top, left + columns * token, top + rows * token))))
        grids.append((rows, columns))
    return select_tokens(seen, grids, config, score=score, trained=trained, place=place)


def label(picture: Image.Image, text: str) -> Image.Image:
    """A picture with a line of text below it on white. Line ends in the text, as prompts may have, become spaces."""
    text = " ".join(text.split())
    height = _fitting(text, picture.width, max(12, min(22, picture.width // 16)))
    font = ImageFont.load_default(height)
    sheet = Image.new("RGB", (picture.width, picture.height + round(height * 1.6)), "white")
    sheet.paste(picture, (0, 0))
    ImageDraw.Draw(sheet).text((picture.width / 2, picture.height + 2), text, fill=(40, 40, 40), font=font, anchor="ma")
    return sheet


def _fitting(text: str, width: int, height: int) -> int:
    """The height of a font in pixels: `height`, or less where the text would be wider than `width`."""
    while height > 6 and ImageFont.load_default(height).getlength(text) > width:
        height -= 1
    return height


def side_by_side(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures in one row on white, top-aligned, `gap` pixels apart."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def column(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures in one column on white, left-aligned, `gap` pixels apart."""
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (max(p.width for p in pictures), height), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet
