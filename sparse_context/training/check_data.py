"""A look at data before a training: a sheet of samples with the tokens that batches keep, and what two sets share."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from ..images import PictureError
from ..preview import column, draw_selection, label, side_by_side
from ..samples import Sample
from ..samples.progress import progress
from ..samples.sample import open_any
from .data import open_example
from .dropping import Dropping
from .dropping import draw_selection as draw_kept

SHOWN = 6
"""Samples on a sheet, the first ones, and `DRAWS` batches of each."""

DRAWS = 3
HEIGHT = 192  # of a picture on the sheet, in pixels

THUMBNAIL = 16  # pixels a side
SAME = 3.0
"""How far the thumbnails of two pictures may be apart to count as one picture, in grey levels of 255, as the root mean
square: another file format, another size and light retouching stay below it."""


def draw_sheet(
    samples: Sequence[Sample],
    dropping: Dropping,
    *,
    resolution: int,
    reference_resolution: int,
    token: int,
    seed: int = 0,
) -> Image.Image:
    """The first samples: the image to be made, and its references with what some batches keep of them.

    token: the side of a token in pixels. Raises `ManifestError` for a sample that cannot be used.
    """
    rows = []
    for i, sample in enumerate(samples[:SHOWN]):
        example = open_example(sample, resolution, reference_resolution)
        pictures, grids = [], []
        for reference, mask in zip(example.references, example.masks, strict=True):
            grid = max(1, reference.height // token), max(1, reference.width // token)
            pixels = np.asarray(reference if mask is None else _with_alpha(reference, mask))
            pictures.append(pixels[: grid[0] * token, : grid[1] * token])
            grids.append(grid)
        drawn = [draw_selection(draw_kept(dropping, pictures, grids, [seed, i, n]), HEIGHT) for n in range(DRAWS)]
        width = max(1, round(example.image.width * HEIGHT / example.image.height))
        made = label(example.image.resize((width, HEIGHT), Image.Resampling.LANCZOS), "image to be made")
        rows.append(label(side_by_side([made, *drawn], gap=16), f"{sample.name}: {sample.prompt}"))
    return column(rows, gap=20)


def _with_alpha(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture with its mask as selectors want it."""
    cut = picture.convert("RGB")
    cut.putalpha(mask)
    return cut


def find_duplicates(training: Sequence[Sample], validation: Sequence[Sample]) -> list[str]:
    """A sentence for each image to be made in `validation` that `training` holds too, as an image or as a reference.

    Pictures are told by thumbnails (`SAME`), so a copy in another size or format is found, and one that is mirrored,
    cropped or painted over is not. Shows a progress bar. Pictures that cannot be read are left out.
    """
    held_out = [(sample.name, sample.image) for sample in validation if sample.image is not None]
    found = np.array([_thumbnail(image) for _, image in held_out]).reshape(len(held_out), -1)
    said: dict[int, str] = {}
    for i in progress(len(training), "duplicates", "sample"):
        sample = training[i]
        for kind, picture in [("the image", sample.image), *(("a reference", each) for each in sample.references)]:
            if picture is None or not len(found):
                continue
            distance = np.sqrt(np.square(found - _thumbnail(picture)).mean(1))
            for n in np.flatnonzero(distance <= SAME).tolist():
                said.setdefault(n, f"{held_out[n][0]} is also {kind} of the sample {sample.name}.")
    return [f"The image of the validation sample {said[n]}" for n in sorted(said)]


def _thumbnail(picture: object) -> np.ndarray:
    """float32 (`THUMBNAIL`**2 * 3,), in grey levels; nan, which is near to nothing, for a picture that is damaged."""
    try:
        rgb = np.asarray(open_any(picture).convert("RGB"))  # type: ignore[arg-type]
    except PictureError:
        return np.full(THUMBNAIL**2 * 3, np.nan, np.float32)
    return cv2.resize(rgb, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
