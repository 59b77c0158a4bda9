"""Pictures to evaluate on that nothing here was trained on: objects cut out of photographs, on photographs.

The held-out objects of data.py were drawn by the same hands as those that are trained on, and half of the backgrounds
are textures by the same function. Here all are of another kind. `python -m recipes.mini cutouts` fetches two packages
and writes `cutouts.safetensors` (about 20 MB), all of the split "test", for any of `runs/` that takes `--assets`.

| package | what is taken | licence |
|---|---|---|
| Debian `tuxpaint-stamps-default` 2022.06.04 | cut-outs of animals, plants, food, things | GPL-2 |
| Debian `lomiri-wallpapers-16.04` 20.04.0 | landscapes and patterns, behind the objects | CC BY 4.0, BY-SA 4.0, CC0 |

No picture of theirs is shipped: only the scores on them are published.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from .data import CUTOUTS, PHOTO_SIZE, SPLITS, Assets, crop_to_square, deb_files, fetch, save_assets

CUT_OUT = r"/stamps/(animals|food|hobbies|household|plants|sports|vehicles)/.*\.png$"
DRAWN = re.compile(r"/cartoon/|/(hedgehog|pizza)\.png$")
OBJECTS = re.compile(r"/(free|friends|greentock|Picture_..|Wine)_by_")  # which a prompt's "the object" could mean
SMALLEST = 128  # pixels of the longer side: smaller ones would be blurred


def build_cutouts(packages: Path, path: Path) -> Assets:
    """Fetch the packages into `packages` (those that are there already are used as they are) and write `path`."""
    stamps, wallpapers = (fetch(packages, file) for file in CUTOUTS)
    names, objects = zip(*_objects(stamps), strict=True)
    photos = np.stack(list(_photographs(wallpapers)))
    test = SPLITS.index("test")
    object_split, photo_split = (np.full(len(each), test, np.int64) for each in (objects, photos))
    assets = Assets(np.stack(objects), photos, list(names), object_split, photo_split, photographs=1.0)
    save_assets(assets, path)
    return assets


def _objects(stamps: Path) -> Iterator[tuple[str, np.ndarray]]:
    for path, data in sorted(deb_files(stamps, CUT_OUT)):
        picture = Image.open(io.BytesIO(data))
        if DRAWN.search(path) or max(picture.size) < SMALLEST:
            continue
        rgba = crop_to_square(np.asarray(picture.convert("RGBA")))
        if rgba is not None:
            yield Path(path).stem.replace("_", " "), rgba


def _photographs(wallpapers: Path) -> Iterator[np.ndarray]:
    """The squares at both ends of each photograph, uint8 (288, 288, 3)."""
    for path, data in sorted(deb_files(wallpapers, r"/backgrounds/.*\.jpg$")):
        if OBJECTS.search(path):
            continue
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        side = min(picture.size)
        for left, top in ((0, 0), (picture.width - side, picture.height - side)):
            square = np.asarray(picture.crop((left, top, left + side, top + side)))
            yield cv2.resize(square, (PHOTO_SIZE, PHOTO_SIZE), interpolation=cv2.INTER_AREA)
