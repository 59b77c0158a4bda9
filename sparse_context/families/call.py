"""How a call hands its images to a pipeline: `arguments` of the family's call.py, or what all modular ones share;
and how pictures are made of its latents, where a family says so."""

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from PIL import Image

from . import Family, family_of


def call_arguments(
    pipe: Any, images: Sequence[Image.Image], mask: Image.Image | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """The arguments of the pipeline's call that these images and this size come to.

    images: scaled for the model. mask: what to paint over in the first of them, or None. height, width: the pixels that
    were asked for, or None. An argument that is None is to be left out. Raises TypeError as `family_of` does.
    """
    family = family_of(pipe)
    arguments: Callable[..., dict[str, Any]] = _module(family).arguments
    return arguments(pipe, images, mask, height, width)


def find_decode(pipe: Any) -> Callable[..., list[Image.Image]] | None:
    """What makes pictures of a pipeline's latents in the middle of a call, `(pipe, latents, arguments of the call)`.

    None where its family has nothing of the kind, or paints into a picture. Raises TypeError as `family_of` does.
    """
    family = family_of(pipe)
    return None if family.paints else getattr(_module(family), "decode", None)


def find_area(pipe: Any) -> int | None:
    """How many pixels a pipeline scales every reference to, about; None where it takes them in their own size, up to a
    megapixel. Raises TypeError as `family_of` does."""
    return getattr(_module(family_of(pipe)), "AREA", None)


def _module(family: Family) -> ModuleType:
    return import_module(".modular" if family.modular else f".{family.folder}.call", __package__)
