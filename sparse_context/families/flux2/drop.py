"""FLUX.2: dev, klein, klein-KV and klein inpaint.

All of them hand the references' pixels to `prepare_image_latents`, once a call, and get tokens (B, N, C) and position
ids (B, N, 4) back. The KV pipeline takes the number of reference tokens from that shape. Inpaint hands over the
*latents* of its source picture, so the pixels behind them are taken one step earlier, in `prepare_latents`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from ...budget import keeps_all
from ...overview import Overview, shrink, spread_ids
from ...preview import MAX_AREA
from ...selectors.cells import Grid
from ...tokens import ReferenceTokens
from ..pictures import Pictures
from ..pixels import LazyPixels, source_of

if TYPE_CHECKING:
    from ...context import Call


APART = 10  # from one reference to the next, on the axis of T
MARK = (0, 1.0)  # of overviews, in the place that this leaves


def attach(pipe: Any, call: "Call") -> None:
    """Cut the reference tokens that `pipe.prepare_image_latents` returns."""
    paints = hasattr(pipe, "prepare_mask_latents")
    pictures = Pictures(MAX_AREA, lazily=not paints)
    stands_for = WeakIdKeyDictionary()  # the latents of a preprocessed tensor -> that tensor
    together = Together()

    def keep_essentials(prepare_image_latents, images, batch_size, *args, **kwargs):
        channels = pipe.transformer.config.in_channels
        grids, seen = [], []
        for image in images:
            pixels = stands_for.get(image, image)
            side = 1 if image.shape[1] == channels else 2 * pipe.vae_scale_factor
            # A batch is one reference that shows each output another picture, or as many references of one size.
            is_shared = image.shape[0] in (1, batch_size)
            for rows in [slice(None)] if is_shared else [slice(i, i + 1) for i in range(image.shape[0])]:
                grids.append((image.shape[2] // side, image.shape[3] // side))
                seen.append((pixels, rows))

        def make(images: Sequence[torch.Tensor] = images) -> ReferenceTokens:
            sizes = [rows * columns for rows, columns in grids]
            if call.context.together and not keeps_all(call.context.config.keep, sizes):
                together.expect(images)
            return ReferenceTokens(*prepare_image_latents(images, batch_size, *args, **kwargs))

        def picture(i: int, mask: np.ndarray | None) -> list[np.ndarray] | None:
            pixels, rows = seen[i]
            return None if pixels.shape[1] == channels else pictures.show(pixels, mask, i, rows)

        def encode_overviews(overviews: Mapping[int, Overview], tokens: ReferenceTokens) -> ReferenceTokens:
            small = []
            for i, each in overviews.items():
                pixels, rows = seen[i]
                small.append(LazyPixels.of_floats(shrink(pixels[rows], grids[i], each.factor)))
            return place_overviews(make(small), tokens.ids, grids, overviews)

        def enlarge(i, shown, max_pixels):
            def encode(parts):
                return prepare_image_latents(parts, batch_size, *args, **kwargs)[0]

            return pictures.enlarge(seen[i][0], shown, grids[i], max_pixels, encode)

        # An inpainting source is blended back into what is made, and so has one size
        large = None if paints else enlarge
        kept = call.keep(make, grids, picture, encode_overviews=encode_overviews, enlarge=large)
        return kept.latents, kept.ids

    def encode_once(encode, image, generator):  # which draws nothing from the generator: it takes the mode
        source = source_of(image)
        image = image.floats if isinstance(image, LazyPixels) else image
        if "_encode_vae_image" in vars(pipe):  # the user's own function, known by no name, for one picture at a time
            return encode(image=image, generator=generator)
        own = partial(encode, generator=generator)
        if call.context.cache is None:
            return together.encode(image, source, own)
        # Named by what the VAE gets, so that no order of calls can put one picture's name on another's latents
        content = image if source is None else source.shown or source.floats
        return call.context.cache.encode(content, image, pipe.vae, partial(own, image=image))

    def remember_pixels(prepare_latents, image, *args, **kwargs):
        prepared = prepare_latents(image, *args, **kwargs)
        stands_for[prepared[3]] = image
        return prepared

    call.replace("image_processor", pictures.watch)
    call.around("prepare_image_latents", keep_essentials)
    call.around("_encode_vae_image", encode_once)
    if paints:
        call.around("prepare_latents", remember_pixels)


class Together:
    """Pictures of one size, which the host hands to its VAE one by one, and which are encoded as one batch.

    At most as many as have `MAX_AREA` pixels together, so that no batch takes more memory than one large picture.
    """

    def __init__(self) -> None:
        self._groups: list[list[LazyPixels]] = []
        self._encoded = WeakIdKeyDictionary()  # pixels -> their latents, until these are asked for

    def expect(self, images: Sequence[torch.Tensor]) -> None:
        """These come next."""
        sizes: dict[torch.Size, list[LazyPixels]] = {}
        for image in images:
            if isinstance(image, LazyPixels) and image.shape[0] == 1:
                sizes.setdefault(image.shape, []).append(image)
        self._groups = []
        for shape, alike in sizes.items():
            most = max(1, MAX_AREA // (shape[2] * shape[3]))
            self._groups += [alike[start : start + most] for start in range(0, len(alike), most)]

    def encode(
        self, image: torch.Tensor, source: LazyPixels | None, encode: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """The latents of `image`, where it is `source` that was moved to the VAE, with those that came with it."""
        group = next((group for group in self._groups if any(each is source for each in group)), [])
        if len(group) > 1:
            self._groups = [each for each in self._groups if each is not group]
            batch = torch.cat([image if each is source else each.to(image.device, image.dtype) for each in group])
            for each, latents in zip(group, encode(image=batch).split(1), strict=True):
                self._encoded[each] = latents
        latents = None if source is None else self._encoded.pop(source, None)
        return encode(image=image) if latents is None else latents


def place_overviews(
    made: ReferenceTokens, ids: torch.Tensor, grids: Sequence[Grid], overviews: Mapping[int, Overview]
) -> ReferenceTokens:
    """The tokens of overviews at their places.

    made: as the host has them where they are all the references that there are. ids: (B, N, 4) of the whole references.
    """
    if {each.layout for each in overviews.values()} == {"spread"}:
        return ReferenceTokens(made.latents, spread_ids(ids, grids, overviews, MARK))
    behind = made.ids.clone()
    behind[..., 0] += APART * len(grids)
    return ReferenceTokens(made.latents, behind)
