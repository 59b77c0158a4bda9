"""How FLUX.1 Kontext and LongCat are handed their image."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

AREA = 1024 * 1024
"""Pixels that every reference is scaled to, about."""


def arguments(
    pipe: Any, images: Sequence[Image.Image], mask: Image.Image | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """One image. Kontext scales the size that it is asked for to `max_area` pixels, so that has to be its own area.

    Raises ValueError for an image of less than a token, whose shape Kontext cannot tell.
    """
    image, token = images[0] if images else None, 2 * pipe.vae_scale_factor
    if image is not None and min(image.size) < token:
        raise ValueError(
            f"The reference is {image.width}x{image.height}: this model takes {token} pixels a side or more."
        )
    if height is None and width is None:
        return {"image": image, "mask_image": mask}
    default = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = height or default, width or default
    return {"image": image, "mask_image": mask, "height": height, "width": width, "max_area": height * width}


def fit(pipe: Any, picture: Image.Image, count: int) -> Image.Image:
    """A reference in the size that the model sees it in: Kontext's nearest shape, or LongCat's own rule."""
    if "LongCat" in type(pipe).__name__:
        from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit

        width, height = pipeline_longcat_image_edit.calculate_dimensions(AREA, picture.width / picture.height)
    else:
        from diffusers.pipelines.flux import pipeline_flux_kontext

        token = 2 * pipe.vae_scale_factor
        tall, wide = pipe.image_processor.get_default_height_width(picture)
        shapes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
        _, width, height = min((abs(wide / tall - w / h), w, h) for w, h in shapes)
        width, height = width // token * token, height // token * token
    return pipe.image_processor.resize(picture, height, width)
