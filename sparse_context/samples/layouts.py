"""Data as other trainers keep it, read as the rows of a manifest. Each layout has a file of its own:

- pairs.py: `cat_start.png`, `cat_end.png`, `cat.txt`, as hosted trainers take them, in a folder or a .zip.
- ai_toolkit.py: a folder of images with captions beside folders of controls, or the .yaml of a training.
- musubi.py: the .toml of data sets of musubi-tuner.
- shards.py: WebDataset's .tar files.

To add one, write its two functions and give it a line in `LAYOUTS`.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from . import ai_toolkit, musubi, pairs, shards
from .layout import Layout


class Kind(NamedTuple):
    """A layout: whether a source has it, and what reads that. columns: the source's own names of a sample's fields."""

    fits: Callable[[str], bool]
    read: Callable[[str, Mapping[str, str]], Layout]


LAYOUTS = {
    "musubi-tuner": Kind(musubi.fits, musubi.read),
    "ai-toolkit": Kind(ai_toolkit.fits, ai_toolkit.read),
    "pairs": Kind(pairs.fits, pairs.read),
    "shards": Kind(shards.fits, shards.read),
}
"""In the order in which a source is tried."""


def find_layout(source: str | Path) -> Kind | None:
    """The layout of a source; None for a manifest, and for what the `datasets` library reads."""
    path = Path(source)
    if os.path.isdir(source) and any(path.glob("metadata.*")):  # of a folder of images, as that library has it
        return None
    return next((kind for kind in LAYOUTS.values() if kind.fits(str(source))), None)
