"""One sample, whose pictures are opened when they are asked for."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..images import open_mask, open_picture, picture_size
from .archives import Member

Picture = Path | bytes | Member
"""A picture that is not opened yet: a file, the bytes of one, or a file inside an archive."""


class ManifestError(ValueError):
    """Samples cannot be read. The message is one sentence that names the place and says what is wrong."""


@dataclass(frozen=True)
class Sample:
    """One sample; see the head of this package. The `open_*` methods raise `images.PictureError`."""

    name: str
    prompt: str
    references: tuple[Picture, ...]
    image: Picture | None = None
    mask: Picture | None = None
    reference_masks: tuple[Picture | None, ...] = ()
    task: str | None = None
    aligned: bool = False

    def open_references(self) -> list[Image.Image]:
        """The references in order, RGB or RGBA."""
        return [open_any(reference) for reference in self.references]

    def open_image(self) -> Image.Image | None:
        """The picture to be made, RGB or RGBA; None without one."""
        return None if self.image is None else open_any(self.image)

    def open_mask(self) -> Image.Image | None:
        """The object in `image`, mode L, of that picture's size; None without one."""
        image = None if self.mask is None else self.open_image()
        return None if self.mask is None or image is None else open_any_mask(self.mask, image.size)

    def open_reference_masks(self) -> list[Image.Image | None]:
        """The object in each reference, mode L: its mask, or else its own alpha channel, or None."""
        masks: list[Image.Image | None] = []
        sources = self.reference_masks or (None,) * len(self.references)
        for reference, mask in zip(self.open_references(), sources, strict=True):
            if mask is not None:
                masks.append(open_any_mask(mask, reference.size))
            else:
                masks.append(reference.getchannel("A") if reference.mode == "RGBA" else None)
        return masks


def open_any(picture: Picture) -> Image.Image:
    """A picture of any kind, as `images.open_picture` gives it."""
    if isinstance(picture, Member):
        return open_picture(picture.read(), name=repr(str(picture)))
    return open_picture(picture)


def size_of(picture: Picture) -> tuple[int, int]:
    """Width and height of a picture as `open_any` gives it, by its header."""
    if isinstance(picture, Member):
        return picture_size(picture.read(), name=repr(str(picture)))
    return picture_size(picture)


def open_any_mask(mask: Picture, size: tuple[int, int]) -> Image.Image:
    """A mask of any kind, as `images.open_mask` gives it."""
    if isinstance(mask, Member):
        return open_mask(mask.read(), size, name=repr(str(mask)))
    return open_mask(mask, size)
