"""How FLUX.2 pipelines are handed their images."""

from collections.abc import Sequence
from typing import Any

from PIL import Image


def arguments(
    pipe: Any, images: Sequence[Image.Image], mask: Image.Image | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """The inpainting pipeline takes the image that it paints into apart from further references; others one list."""
    if mask is None:
        return {"image": list(images) or None}
    return {"image": images[0], "mask_image": mask, "image_reference": list(images[1:]) or None}
