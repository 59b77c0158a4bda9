"""What FLUX.3 makes of its references; how they are handed over, modular pipelines share (modular.py)."""

from typing import Any

from PIL import Image

from ..pictures import to_uint8


def fit(pipe: Any, picture: Image.Image, count: int) -> Image.Image:
    """A reference in the size that the model sees it in: a lone one padded to whole tokens, up to four megapixels, and
    several cropped to them, up to one."""
    pixels, _ = pipe.image_processor.preprocess(picture, resize_mode="fill" if count == 1 else "crop")
    return Image.fromarray(to_uint8(pixels)[0]).convert(picture.mode)
