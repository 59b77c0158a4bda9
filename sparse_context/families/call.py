"""How a call hands its images to a pipeline: `arguments` of the family's call.py, or what all modular ones share."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from PIL import Image

from . import family_of


def call_arguments(
    pipe: Any, images: Sequence[Image.Image], mask: Image.Image | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """The arguments of the pipeline's call that these images and this size come to.

    images: scaled for the model. mask: what to paint over in the first of them, or None. height, width: the pixels that
    were asked for, or None. An argument that is None is to be left out. Raises TypeError as `family_of` does.
    """
    family = family_of(pipe)
    module = "modular" if family.modular else f"{family.folder}.call"
    arguments: Callable[..., dict[str, Any]] = import_module(f".{module}", __package__).arguments
    return arguments(pipe, images, mask, height, width)
