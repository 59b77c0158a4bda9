"""FLUX.2: dev, klein, klein-KV and klein inpaint.

All of them hand the references' pixels to `prepare_image_latents`, once a call, and get tokens (B, N, C) and position
ids (B, N, 4) back. The KV pipeline takes the number of reference tokens from that shape. Inpaint hands over the
*latents* of its source picture, so the pixels behind them are taken one step earlier, in `prepare_latents`.
"""

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.weak import WeakIdKeyDictionary

from ..tokens import ReferenceTokens
from .pictures import Pictures

if TYPE_CHECKING:
    from ..sparsify import SparseContext

MAX_AREA = 1024 * 1024  # larger pictures are scaled down to this many pixels before they are preprocessed


def attach(pipe: Any, context: "SparseContext") -> None:
    """Cut the reference tokens that `pipe.prepare_image_latents` returns, on this instance only."""
    pictures = Pictures(context, pipe.image_processor, MAX_AREA)
    stands_for = WeakIdKeyDictionary()  # the latents of a preprocessed tensor -> that tensor
    check_inputs, prepare_image_latents = pipe.check_inputs, pipe.prepare_image_latents
    to_encode: deque = deque()  # the pixels of this call's references, still on the CPU

    def start_call(*args, **kwargs):
        context.selection = None
        return check_inputs(*args, **kwargs)

    def keep_essentials(images, batch_size, *args, **kwargs):
        channels = pipe.transformer.config.in_channels
        to_encode.extend(image for image in images if image.shape[1] != channels)
        try:
            tokens = ReferenceTokens(*prepare_image_latents(images, batch_size, *args, **kwargs))
        finally:
            to_encode.clear()
        grids, seen = [], []
        for image in images:
            pixels = stands_for.get(image, image)
            side = 1 if image.shape[1] == channels else 2 * pipe.vae_scale_factor
            # A batch is one reference that shows each output another picture, or as many references of one size.
            one = image.shape[0] in (1, batch_size)
            for rows in [slice(None)] if one else [slice(i, i + 1) for i in range(image.shape[0])]:
                grids.append((image.shape[2] // side, image.shape[3] // side))
                seen.append((pixels, rows))

        def picture(i: int, mask: np.ndarray | None) -> list[np.ndarray] | None:
            pixels, rows = seen[i]
            return None if pixels.shape[1] == channels else pictures.show(pixels, mask, i, rows)

        kept = context.keep(tokens, grids, picture)
        return kept.latents, kept.ids

    context.override(pipe, "check_inputs", start_call)
    context.override(pipe, "prepare_image_latents", keep_essentials)

    if context.cache is not None:
        cache, encode = context.cache, pipe._encode_vae_image

        def encode_once(image, generator):  # which draws nothing from the generator: it takes the mode
            pixels = to_encode.popleft() if to_encode else image
            return cache.encode(pixels, image, pipe.vae, partial(encode, image=image, generator=generator))

        context.override(pipe, "_encode_vae_image", encode_once)

    if hasattr(pipe, "prepare_mask_latents"):  # inpaint
        prepare_latents = pipe.prepare_latents

        def remember_pixels(image, *args, **kwargs):
            prepared = prepare_latents(image, *args, **kwargs)
            stands_for[prepared[3]] = image
            return prepared

        context.override(pipe, "prepare_latents", remember_pixels)
