"""A sentence as a picture, for a node that has nothing else to show. It needs Pillow alone."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont


def card(sentence: str, width: int = 512) -> Image.Image:
    """A sentence on a white picture, `width` pixels wide."""
    font = ImageFont.load_default(20)
    text = "\n".join(textwrap.wrap(sentence, 48))
    _, _, _, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font, spacing=8)
    picture = Image.new("RGB", (width, int(bottom) + 40), "white")
    ImageDraw.Draw(picture).multiline_text((20, 20), text, fill=(40, 40, 40), font=font, spacing=8)
    return picture
