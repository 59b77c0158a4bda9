"""How a call hands its images to a pipeline: `arguments` of the family's call.py, or what all modular ones share;
and how pictures are made of its latents, where a family says so."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
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


def find_fit(pipe: Any, count: int) -> Callable[[Image.Image], Image.Image] | None:
    """What a pipeline makes of each of `count` references, or of a mask of one, before it encodes them: RGB or RGBA, or
    L. None where it takes them as `preview.fit_reference` leaves them. Raises TypeError as `family_of` does."""
    folder = f"{__package__}.{family_of(pipe).folder}.call"
    fit = getattr(import_module(folder), "fit", None) if find_spec(folder) is not None else None
    if fit is None:
        return None

    def fitted(picture: Image.Image) -> Image.Image:
        if picture.mode != "RGBA":
            return fit(pipe, picture, count)
        image = fit(pipe, picture.convert("RGB"), count).convert("RGB")  # apart, as Pillow blackens what is transparent
        image.putalpha(fit(pipe, picture.getchannel("A"), count).convert("L"))
        return image

    return fitted


def _module(family: Family) -> ModuleType:
    return import_module(".modular" if family.modular else f".{family.folder}.call", __package__)
