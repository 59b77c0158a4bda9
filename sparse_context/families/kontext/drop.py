"""FLUX.1 Kontext, Kontext inpaint and LongCat image edit.

`prepare_latents` has the reference's pixels and returns its tokens (B, N, C) beside position ids (N, 3), once a call.
There is one reference; a list of pictures shows each output another one. All three scale it to about a megapixel.
"""

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...tokens import ReferenceTokens
from ..pictures import Pictures

if TYPE_CHECKING:
    from ...context import Call


def attach(pipe: Any, call: "Call") -> None:
    """Cut the reference tokens that `pipe.prepare_latents` returns."""
    pictures = Pictures()

    def keep(image: torch.Tensor, latents: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        is_latents = image.shape[1] == pipe.vae.config.latent_channels
        side = 2 if is_latents else 2 * pipe.vae_scale_factor
        grid = (image.shape[2] // side, image.shape[3] // side)

        def picture(i: int, mask: np.ndarray | None) -> list[np.ndarray] | None:
            return None if is_latents else pictures.show(image, mask, i)

        kept = call.keep(ReferenceTokens(latents, ids), [grid], picture)
        return kept.latents, kept.ids

    def keep_essentials(prepare_latents, *args, **kwargs):
        arguments = inspect.signature(type(pipe).prepare_latents).bind(pipe, *args, **kwargs).arguments
        if "image_reference" not in arguments:
            latents, image_latents, latent_ids, image_ids = prepare_latents(*args, **kwargs)
            if image_latents is not None:
                image_latents, image_ids = keep(arguments["image"], image_latents, image_ids)
            return latents, image_latents, latent_ids, image_ids

        # Inpaint: what it paints over is blended back at every step, so the source's own latents have to stay whole. A
        # reference goes to the transformer in the source's place, and the source's kept tokens go there as one.
        latents, source, reference, latent_ids, source_ids, reference_ids, noise = prepare_latents(*args, **kwargs)
        if reference is None:
            reference, reference_ids = keep(arguments["image"], source, source_ids)
        else:
            reference, reference_ids = keep(arguments["image_reference"], reference, reference_ids)
        return latents, source, reference, latent_ids, source_ids, reference_ids, noise

    call.replace("image_processor", pictures.watch)
    call.around("prepare_latents", keep_essentials)
