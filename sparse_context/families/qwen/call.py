"""How Qwen-Image-Edit pipelines are handed their images."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from .. import family_of

AREA = 1024 * 1024
"""Pixels that every reference is scaled to, about."""


def arguments(
    pipe: Any, images: Sequence[Image.Image], mask: Image.Image | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """One image, or a list for the Plus pipeline."""
    return {"image": images[0] if family_of(pipe).most == 1 else list(images), "mask_image": mask}


def fit(pipe: Any, picture: Image.Image, count: int) -> Image.Image:
    """A reference in the size that the model sees it in."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(AREA, picture.width / picture.height)
    return pipe.image_processor.resize(picture, height, width)
