"""Sizes that batches have in common, so that nothing is cropped to a picture that it happens to meet in one."""

import math
from collections.abc import Sequence

import numpy as np

from ..images import PictureError
from ..preview import MAX_ASPECT, MIN_SIDE
from ..samples import ManifestError, Sample
from ..samples.progress import progress
from ..samples.sample import size_of

ASPECTS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 7 / 3, 3, 4, 6, 8)
"""The longer side by the shorter one. Those of cameras and screens are among them, so they lose no more than the rest
of a multiple of `MULTIPLE` pixels."""

MULTIPLE = 16  # pixels a side; the tokens of every model divide it

Size = tuple[int, int]


def bucket(size: Size, resolution: int) -> Size:
    """The width and height that a picture is scaled and cropped to: of the nearest of `ASPECTS`, and of as many pixels
    as `resolution`**2 or, for a smaller one, that halved until the picture need not be scaled up."""
    width, height = size
    ratio = max(width, height) / min(width, height)
    aspect = min(ASPECTS, key=lambda each: abs(math.log(each / ratio)))
    halvings = max(0, math.ceil(math.log2(resolution**2 / (width * height)) - 0.05))  # up by 2 % a side at most
    area = resolution**2 / 2**halvings
    long, short = (
        max(MIN_SIDE, int(side / MULTIPLE + 1e-6) * MULTIPLE)
        for side in (math.sqrt(area * aspect), math.sqrt(area / aspect))
    )
    long = min(long, MAX_ASPECT * short)  # rounding may have gone beyond what pipelines take
    return (long, short) if width >= height else (short, long)


def sizes_of(samples: Sequence[Sample], resolution: int, reference_resolution: int) -> list[tuple[Size, ...]]:
    """The bucket of each sample's image, and those of its references.

    The headers of all pictures are read, with a progress bar. Raises `ManifestError` for one that cannot be read.
    """
    found = []
    for i in progress(len(samples), "sizes", "sample"):
        sample = samples[i]
        if sample.image is None:
            raise ManifestError(f"The sample {sample.name} has no image to be made: training needs one.")
        try:
            references = [bucket(size_of(reference), reference_resolution) for reference in sample.references]
            found.append((bucket(size_of(sample.image), resolution), *references))
        except PictureError as error:
            raise ManifestError(f"The sample {sample.name} cannot be used: {error}.") from error
    return found


def grouped(sizes: Sequence[object]) -> list[np.ndarray]:
    """Which are equal: int64 indices of each group, in the order in which they are met."""
    groups: dict[object, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    return [np.array(group) for group in groups.values()]
