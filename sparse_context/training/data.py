"""What a training step is made of: opened samples, which of them a batch holds, and what encoders made of them before.

Which samples a batch holds follows from (seed, batch number) alone, so nothing has to be stored to resume.
"""

import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from ..images import PictureError
from ..preview import MAX_AREA, fit_reference
from ..samples import ManifestError, Sample


@dataclass(frozen=True)
class Example:
    """A sample with its pictures open, RGB, in the sizes that they are trained at.

    masks: mode L, of the size of its reference, white on the object; one for each reference, None where there is none.
    mask: the same of the image to be made. source: where it is known, as in scenes that were composed, the reference
    token that each of its tokens shows, int64 (rows, columns), counted over all references; -1: none. aligned: whether,
    where nothing says so, each shows the place of the first reference that it lies at.
    """

    prompt: str
    references: tuple[Image.Image, ...]
    image: Image.Image
    masks: tuple[Image.Image | None, ...]
    mask: Image.Image | None = None
    source: np.ndarray | None = None
    aligned: bool = False


def open_example(sample: Sample, resolution: int, reference_resolution: int) -> Example:
    """Open a sample; what has more than `resolution`**2 pixels is scaled down to that, and nothing is scaled up.

    (But no side stays under 64 pixels, which the pipelines refuse, and references are scaled down to a megapixel as
    the pipelines do it, whatever `reference_resolution` allows.) Raises `ManifestError` that names the sample.
    """
    try:
        image, mask = sample.open_image(), sample.open_mask()
        references, masks = sample.open_references(), sample.open_reference_masks()
    except PictureError as error:
        raise ManifestError(f"The sample {sample.name} cannot be used: {error}.") from error
    if image is None:
        raise ManifestError(f"The sample {sample.name} has no image to be made: training needs one.")
    reference_resolution = min(reference_resolution, math.isqrt(MAX_AREA))
    return Example(
        sample.prompt,
        tuple(_fit(reference, reference_resolution) for reference in references),
        _fit(image, resolution),
        tuple(None if each is None else _fit(each, reference_resolution) for each in masks),
        None if mask is None else _fit(mask, resolution),
        aligned=sample.aligned,
    )


def _fit(picture: Image.Image, resolution: int) -> Image.Image:
    area = picture.width * picture.height
    # Without a side, what is above a megapixel would be scaled down to that
    side = min(resolution, math.sqrt(area)) if area > min(resolution**2, MAX_AREA) else None
    fitted = fit_reference(picture, side)
    return fitted if fitted.mode == "L" else fitted.convert("RGB")


def alike(examples: Sequence[Example]) -> list[Example]:
    """A batch of one shape: pictures of other sizes than the first example's are cropped to those, centred."""
    first = examples[0]

    def crop(example: Example) -> Example:
        pairs = list(zip(example.references, example.masks, first.references, strict=True))
        return replace(
            example,
            references=tuple(_crop(reference, model.size) for reference, _, model in pairs),
            image=_crop(example.image, first.image.size),
            masks=tuple(None if mask is None else _crop(mask, model.size) for _, mask, model in pairs),
            mask=None if example.mask is None else _crop(example.mask, first.image.size),
            source=example.source if _sizes(example) == _sizes(first) else None,
        )

    return [first, *map(crop, examples[1:])]


def _sizes(example: Example) -> list[tuple[int, int]]:
    return [picture.size for picture in (example.image, *example.references)]


def _crop(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


class Batches:
    """`batches(number)` -> the examples of a batch: every sample once an epoch, in an order drawn from (seed, epoch).

    The samples of a batch have the same number of references; where that leaves a batch short, it takes some twice.
    """

    def __init__(self, samples: Sequence[Sample], size: int, seed: int, resolution: int, reference_resolution: int):
        self._samples, self._size, self._seed = samples, size, seed
        self._resolutions = resolution, reference_resolution
        self._groups = [np.arange(len(samples))]
        if size > 1:  # or nobody needs to know, and a large data set need not be read first
            counts = np.array([len(sample.references) for sample in samples])
            self._groups = [np.flatnonzero(counts == count) for count in np.unique(counts)]
        self._epoch = -1
        self._order: list[np.ndarray] = []

    def __len__(self) -> int:
        """Batches in an epoch."""
        return sum(-(-len(group) // self._size) for group in self._groups)

    def indices(self, number: int) -> np.ndarray:
        """Which samples batch `number` holds, int64 (size,)."""
        epoch, place = divmod(number, len(self))
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, 1, epoch])
            parts = []
            for group in self._groups:
                count = -(-len(group) // self._size)
                shuffled = np.resize(rng.permutation(group), count * self._size)
                parts += list(shuffled.reshape(count, self._size))
            self._epoch, self._order = epoch, [parts[i] for i in rng.permutation(len(parts))]
        return self._order[place]

    def __call__(self, number: int) -> list[Example]:
        return alike([open_example(self._samples[int(i)], *self._resolutions) for i in self.indices(number)])


def check_workers(workers: int) -> None:
    """Raise ValueError for processes where they cannot be forked. macOS can, but its libraries crash in what is."""
    if workers and (sys.platform == "darwin" or "fork" not in multiprocessing.get_all_start_methods()):
        raise ValueError(f"The number of processes is {workers}, which this system cannot fork: pass 0, for a thread.")


class Ahead:
    """`make(number)`, for numbers that follow each other, with the next ones being made meanwhile.

    In a thread, one ahead; or by `workers` processes, two each, for a device that is faster than one thread composes.
    Then `make` must touch no accelerator, and what it returns is best in tensors, which are shared and not copied.
    Raises ValueError for processes where the system cannot fork.
    """

    def __init__(self, make: Callable[[int], Any], workers: int = 0) -> None:
        check_workers(workers)
        self._make, self._workers = make, workers
        self._made: Iterator[Any] = iter(())
        self._next: int | None = None

    def __call__(self, number: int) -> Any:
        if number != self._next:
            self._made = self._by_processes(number) if self._workers else self._by_a_thread(number)
        self._next = None  # should this one fail
        result = next(self._made)
        if isinstance(result, Exception):
            raise result
        self._next = number + 1
        return result

    def _by_a_thread(self, first: int) -> Iterator[Any]:
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._make, first)
            for number in itertools.count(first + 1):
                ready, ahead = ahead, pool.submit(self._make, number)
                yield ready.result()

    def _by_processes(self, first: int) -> Iterator[Any]:
        # Each has one core; and a thread pool of OpenCV's, which a fork leaves behind, would be waited for without end
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        numbers = cast(Dataset, range(first, sys.maxsize))
        # The loader draws seeds for its processes, which nothing here uses: without a generator, from the user's
        batches = iter(
            DataLoader(
                numbers,
                batch_size=None,
                num_workers=self._workers,
                generator=torch.Generator(),
                collate_fn=partial(_or_error, self._make),
                multiprocessing_context="fork",
                pin_memory=torch.cuda.is_available(),
            )
        )
        cv2.setNumThreads(threads)
        return batches


def _or_error(make: Callable[[int], Any], number: int) -> Any:
    """What is made, or what is wrong with the data: the loader would add a stack trace to its sentence."""
    try:
        return make(number)
    except (ValueError, OSError) as error:
        return error
