"""What a training step is made of: opened samples, which of them a batch holds, and what encoders made of them before.

Which samples a batch holds follows from (seed, batch number) alone, so nothing has to be stored to resume.
"""

import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from ..images import PictureError
from ..preview import MAX_AREA, fit_reference
from ..samples import ManifestError, Sample, Samples
from ..samples.archives import is_remote
from .buckets import Size, grouped, sizes_of


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


def open_example(
    sample: Sample, resolution: int, reference_resolution: int, sizes: Sequence[Size] | None = None
) -> Example:
    """Open a sample; what has more than `resolution`**2 pixels is scaled down to that, and nothing is scaled up.

    sizes: of the image and of each reference, which these are scaled and cropped to, centred; None: they keep their
    shape. (But no side stays under 64 pixels, which the pipelines refuse, and references are scaled down to a megapixel
    as the pipelines do it, whatever `reference_resolution` allows.) Raises `ManifestError` that names the sample.
    """
    try:
        image, mask = sample.open_image(), sample.open_mask()
        references, masks = sample.open_references(), sample.open_reference_masks()
    except PictureError as error:
        raise ManifestError(f"The sample {sample.name} cannot be used: {error}.") from error
    if image is None:
        raise ManifestError(f"The sample {sample.name} has no image to be made: training needs one.")
    reference_resolution = min(reference_resolution, math.isqrt(MAX_AREA))
    size, *others = cast(Sequence[Size | None], sizes or [None] * (1 + len(references)))
    try:
        return Example(
            sample.prompt,
            tuple(_fit(each, reference_resolution, other) for each, other in zip(references, others, strict=True)),
            _fit(image, resolution, size),
            tuple(
                None if each is None else _fit(each, reference_resolution, other)
                for each, other in zip(masks, others, strict=True)
            ),
            None if mask is None else _fit(mask, resolution, size),
            aligned=sample.aligned,
        )
    except ValueError as error:  # a strip that is too long
        raise ManifestError(f"The sample {sample.name} cannot be used: {error}") from error


def _fit(picture: Image.Image, resolution: int, size: Size | None) -> Image.Image:
    if size is not None:
        whole = fit_reference(picture, narrow=False)  # in its own size, but laid on white
        whole = whole if whole.mode == "L" else whole.convert("RGB")
        return whole if whole.size == size else ImageOps.fit(whole, size, Image.Resampling.LANCZOS)
    area = picture.width * picture.height
    # Without a side, what is above a megapixel would be scaled down to that
    side = min(resolution, math.sqrt(area)) if area > min(resolution**2, MAX_AREA) else None
    fitted = fit_reference(picture, side)
    return fitted if fitted.mode == "L" else fitted.convert("RGB")


class Batches:
    """`batches(number)` -> the examples of a batch: every sample once an epoch, in an order drawn from (seed, epoch).

    Samples of .tar shards come shard by shard, in an order that is drawn too. The samples of a batch have pictures of
    the same sizes, those of their buckets (`buckets.bucket`), and so the same number of references; where that leaves a
    batch short, it takes some twice. In batches of one, pictures keep their shape.

    Raises `ManifestError` for batches of several of pictures whose sizes cannot be read.
    """

    def __init__(self, samples: Sequence[Sample], size: int, seed: int, resolution: int, reference_resolution: int):
        self._samples, self._size, self._seed = samples, size, seed
        self._resolutions = resolution, min(reference_resolution, math.isqrt(MAX_AREA))
        shards = samples.shards if isinstance(samples, Samples) else None
        self._blocks = [[np.arange(len(samples))]] if shards is None else [[block] for block in grouped(shards)]
        self._sizes: list[tuple[Size, ...]] | None = None
        if size > 1:  # or nobody needs to know, and a large data set need not be read first
            if any(is_remote(shard) for shard in set(shards or ())):
                raise ManifestError(
                    f"train_batch_size is {size}, and the sizes of images in shards at a URL are not known before they "
                    "are fetched: pass 1, and gradient_accumulation_steps."
                )
            self._sizes = sizes = sizes_of(samples, *self._resolutions)
            self._blocks = [[block[group] for group in grouped([sizes[i] for i in block])] for (block,) in self._blocks]
        self._epoch = -1
        self._order: list[np.ndarray] = []

    def __len__(self) -> int:
        """Batches in an epoch."""
        return sum(-(-len(group) // self._size) for groups in self._blocks for group in groups)

    def indices(self, number: int) -> np.ndarray:
        """Which samples batch `number` holds, int64 (size,)."""
        epoch, place = divmod(number, len(self))
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, 1, epoch])
            order = rng.permutation(len(self._blocks)) if len(self._blocks) > 1 else [0]
            blocks = [self._blocks[i] for i in order]
            self._epoch, self._order = epoch, [batch for groups in blocks for batch in self._shuffled(groups, rng)]
        return self._order[place]

    def _shuffled(self, groups: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """The batches of groups of samples, in a drawn order."""
        parts = []
        for group in groups:
            count = -(-len(group) // self._size)
            shuffled = np.resize(rng.permutation(group), count * self._size)
            parts += list(shuffled.reshape(count, self._size))
        return [parts[i] for i in rng.permutation(len(parts))]

    def __call__(self, number: int) -> list[Example]:
        return [self.example(int(i)) for i in self.indices(number)]

    def example(self, index: int) -> Example:
        """A sample as batches have it."""
        return open_example(
            self._samples[index], *self._resolutions, None if self._sizes is None else self._sizes[index]
        )

    def taken(self, first: int, end: int) -> list[int]:
        """The samples of batches `first` to `end` - 1, each once, in the order of the data."""
        if end - first >= 2 * len(self):  # a whole epoch lies between
            return list(range(len(self._samples)))
        return sorted({int(i) for number in range(first, end) for i in self.indices(number)})


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
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, number: int) -> Any:
        if number != self._next:
            if self._pool:  # of the numbers before, of which none is made beside the new ones
                self._pool.shutdown()
            self._made = self._by_processes(number) if self._workers else self._by_a_thread(number)
        self._next = None  # should this one fail
        try:
            result = next(self._made)
        except RuntimeError as error:
            if not self._workers:
                raise
            raise OSError(
                f"A process that prepares batches died ({str(error).splitlines()[0]}): give it more memory (in a "
                "container also shared memory, /dev/shm), or pass fewer dataloader_num_workers."
            ) from error
        if isinstance(result, Exception):
            raise result
        self._next = number + 1
        return result

    def _by_a_thread(self, first: int) -> Iterator[Any]:
        pool = self._pool = ThreadPoolExecutor(1)
        try:
            ahead = pool.submit(self._make, first)
            for number in itertools.count(first + 1):
                ready, ahead = ahead, pool.submit(self._make, number)
                yield ready.result()
        finally:  # by the garbage collector maybe, in the middle of a thread's own start, where waiting never ends
            pool.shutdown(wait=False, cancel_futures=True)

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
