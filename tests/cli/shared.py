"""Helpers for the tests of the command."""

import sys

import numpy as np
from PIL import Image
from tiny import picture

COMMAND = [sys.executable, "-m", "sparse_context"]


EDGE = 384 // 8  # pixels of a token in a drawing of 8 x 8 tokens


def colourful(seed=0):
    """64 x 64 pixels whose 8-pixel tokens each have a strong colour of their own."""
    generator = np.random.default_rng(seed)
    cells = generator.permuted(np.tile(np.array([20, 110, 240], np.uint8), (8, 8, 1)), axis=-1)
    return Image.fromarray(cells.repeat(8, 0).repeat(8, 1))


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def odd_pictures(folder):
    rgb = picture(96, 64)
    grey = np.linspace(0, 65535, 96 * 64).reshape(64, 96)
    alpha = np.zeros((64, 96), np.uint8)
    alpha[16:48, 24:72] = 255
    cut_out = rgb.copy()
    cut_out.putalpha(Image.fromarray(alpha))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    cut_out.save(folder / "rgba.png")
    Image.fromarray(grey.astype(np.uint16)).save(folder / "16 bit.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.quantize(16).save(folder / "palette.png")
    rgb.save(folder / "animated.gif", save_all=True, append_images=[picture(96, 64, 5)])
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.convert("1").save(folder / "one bit.png")
    picture(5, 5).save(folder / "tiny.png")
    picture(2000, 20).save(folder / "very wide.png")
    picture(20, 2000).save(folder / "very tall.png")
    rgb.save(folder / "Кот, 猫 und Käse 😀.png")
    return sorted(path for path in folder.iterdir())


def coloured_cells(path, references=1):
    """Which of the 8 x 8 tokens of each reference are drawn in their own colours."""
    drawn = pixels(path)[:384].astype(int)
    assert drawn.shape[1] == 384 * references + 8 * (references - 1)
    cells = []
    for left in range(0, drawn.shape[1], 392):
        centres = drawn[EDGE // 2 :: EDGE, left + EDGE // 2 : left + 384 : EDGE]
        cells.append(np.flatnonzero(np.ptp(centres, -1) > 60))
    return cells
