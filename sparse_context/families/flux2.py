"""FLUX.2: dev, klein, klein-KV and klein inpaint.

All of them hand the references' pixels to `prepare_image_latents`, once a call, and get tokens (B, N, C) and position ids
(B, N, 4) back. The KV pipeline takes the number of reference tokens from that shape. Inpaint hands over the *latents* of
its source picture, so the pixels behind them are taken one step earlier, in `prepare_latents`.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..tokens import ReferenceTokens

if TYPE_CHECKING:
    from ..sparsify import SparseContext

MAX_AREA = 1024 * 1024  # larger pictures are scaled down to this many pixels before they are preprocessed


def attach(pipe: Any, context: "SparseContext") -> None:
    """Cut the reference tokens that `pipe.prepare_image_latents` returns, on this instance only."""
    made_from = WeakIdKeyDictionary()  # a preprocessed tensor -> the picture behind it and how it was preprocessed
    stands_for = WeakIdKeyDictionary()  # the latents of a preprocessed tensor -> that tensor
    preprocess, check_inputs = pipe.image_processor.preprocess, pipe.check_inputs
    prepare_image_latents = pipe.prepare_image_latents

    def start_call(*args, **kwargs):
        context.selection = None
        return check_inputs(*args, **kwargs)

    def remember_source(image, *args, **kwargs):
        tensor = preprocess(image, *args, **kwargs)
        made_from[tensor] = (image, args, kwargs)
        return tensor

    def keep_essentials(images, batch_size, *args, **kwargs):
        tokens = ReferenceTokens(*prepare_image_latents(images, batch_size, *args, **kwargs))
        channels = pipe.transformer.config.in_channels
        grids, pictures = [], []
        for image in images:
            pixels = stands_for.get(image, image)
            side = 1 if image.shape[1] == channels else 2 * pipe.vae_scale_factor
            # A batch is one reference that shows each output another picture, or as many references of one size.
            one = image.shape[0] in (1, batch_size)
            for rows in [slice(None)] if one else [slice(i, i + 1) for i in range(image.shape[0])]:
                grids.append((image.shape[2] // side, image.shape[3] // side))
                pictures.append(None if pixels.shape[1] == channels else (pixels, rows))

        def picture(i: int, mask: np.ndarray | None) -> list[np.ndarray] | None:
            if pictures[i] is None:
                return None
            pixels, rows = pictures[i]
            shown = _to_uint8(pixels[rows])
            alpha = _alpha(preprocess, made_from.get(pixels), mask, rows, i)
            return list(shown if alpha is None else np.concatenate([shown, alpha], axis=-1))

        kept = tokens.keep(context.select(grids, picture))
        return kept.latents, kept.ids

    context.override(pipe, "check_inputs", start_call)
    context.override(pipe.image_processor, "preprocess", remember_source)
    context.override(pipe, "prepare_image_latents", keep_essentials)

    if hasattr(pipe, "prepare_mask_latents"):  # inpaint
        prepare_latents = pipe.prepare_latents

        def remember_pixels(image, *args, **kwargs):
            prepared = prepare_latents(image, *args, **kwargs)
            stands_for[prepared[3]] = image
            return prepared

        context.override(pipe, "prepare_latents", remember_pixels)


def _to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C)."""
    return ((pixels.permute(0, 2, 3, 1).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _alpha(
    preprocess: Callable, source: tuple | None, mask: np.ndarray | None, rows: slice, reference: int
) -> np.ndarray | None:
    """The user's mask of a reference, or else its alpha channel, through the pipeline's own resize and crop.

    Returns uint8 (B, H, W, 1), or None where there is neither. Raises ValueError for a mask of another size.
    """
    if source is None:
        return None
    image, args, kwargs = source
    originals = list(image) if isinstance(image, list) else [image]
    masks = []
    for original in originals[rows] if len(originals) > 1 else originals:
        if mask is not None:
            masks.append(_as_large_as(original, PIL.Image.fromarray(mask), reference))
        elif isinstance(original, PIL.Image.Image) and "A" in original.getbands():
            masks.append(original.getchannel("A"))
        else:
            return None
    kinds = [_like(original, m) for original, m in zip(originals, masks, strict=False)]
    return _to_uint8(preprocess(kinds if len(kinds) > 1 else kinds[0], *args, **kwargs))[..., :1]


def _as_large_as(original: Any, mask: PIL.Image.Image, reference: int) -> PIL.Image.Image:
    """The mask in the size that `original` has after the pipeline's limit on the area."""
    size = original.size if isinstance(original, PIL.Image.Image) else _array_size(original)
    limit = math.sqrt(MAX_AREA / (mask.width * mask.height))
    if mask.size == size:
        return mask
    if limit < 1 and (int(mask.width * limit), int(mask.height * limit)) == size:
        return mask.resize(size, PIL.Image.Resampling.LANCZOS)
    raise ValueError(
        f"the mask of reference {reference + 1} is {mask.width}x{mask.height}, but its picture is {size[0]}x{size[1]}: "
        "pass a mask of the picture's own size"
    )


def _array_size(original: Any) -> tuple[int, int]:
    """(width, height) of a tensor (..., H, W) or an array (..., H, W, C)."""
    height, width = original.shape[-2:] if isinstance(original, torch.Tensor) else original.shape[-3:-1]
    return width, height


def _like(original: Any, mask: PIL.Image.Image) -> Any:
    """The mask as a picture of the kind that the user passed, so that it takes the same way through the host."""
    if isinstance(original, PIL.Image.Image):
        return mask
    values = np.repeat(np.asarray(mask, np.float32)[..., None] / 255, 3, axis=-1)
    return torch.from_numpy(values).permute(2, 0, 1)[None] if isinstance(original, torch.Tensor) else values[None]
