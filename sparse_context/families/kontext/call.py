"""How FLUX.1 Kontext and LongCat are handed their image."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

AREA = 1024 * 1024
"""Pixels that every reference is scaled to, about."""


def arguments(
    pipe: Any, images: Sequence[Image.Image], mask: Image.Image | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """One image. Kontext scales the size that it is asked for to `max_area` pixels, so that has to be its own area."""
    image = images[0] if images else None
    if height is None and width is None:
        return {"image": image, "mask_image": mask}
    default = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = height or default, width or default
    return {"image": image, "mask_image": mask, "height": height, "width": width, "max_area": height * width}
