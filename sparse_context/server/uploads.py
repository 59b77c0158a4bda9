"""Pictures that were sent with a request: their bounds, their masks, and what tells one from another."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image, ImageChops
from starlette.datastructures import UploadFile

from ..images import PictureError, open_mask, open_picture
from ..pipelines.spec import Request
from ..selectors.registry import use_masks
from .errors import ApiError, sentence, short
from .settings import Settings

HELD = 4 * 2**20
"""Pixels of a job's pictures that are held while it waits, decoded; of larger ones the files are, on disk."""


@dataclass
class Uploads:
    """The files of one request. They stay open, and on disk if they are large, until `close`.

    The name that a client gives a file, and the type that it says it has, are not looked at.
    """

    images: Sequence[UploadFile] = ()
    mask: UploadFile | None = None
    reference_masks: Sequence[UploadFile] = ()
    most_pixels: int = 0
    _held: tuple[list[Image.Image], Image.Image | None, list[Image.Image]] | None = field(default=None, repr=False)

    def digest(self) -> str:
        """Of all bytes and what they are for."""
        about = hashlib.sha256(repr((len(self.images), self.mask is not None, len(self.reference_masks))).encode())
        for file in self._files():
            file.file.seek(0)
            about.update(hashlib.file_digest(file.file, "sha256").digest())  # type: ignore[arg-type]
        return about.hexdigest()

    def check(self) -> None:
        """Open every picture once. Raises `ApiError` for one that cannot be used."""
        opened = self._open()
        images, mask, masks = opened
        everything = [*images, *masks, *([] if mask is None else [mask])]
        if sum(each.width * each.height for each in everything) <= HELD:
            self._held = opened

    def add_to(self, request: Request) -> Request:
        """The request with its references, its mask to paint in, and the masks of what to keep. Raises `ApiError`."""
        images, mask, masks = self._held or self._open()
        config = request.config
        if masks:
            config = replace(config, selector=use_masks(config.selector, masks))
        return replace(request, references=images, inpaint=mask, config=config)

    def close(self) -> None:
        self._held = None
        for file in self._files():
            file.file.close()

    def _files(self) -> list[UploadFile]:
        return [*self.images, *([] if self.mask is None else [self.mask]), *self.reference_masks]

    def _open(self) -> tuple[list[Image.Image], Image.Image | None, list[Image.Image]]:
        images = [
            self._read(file, f"image {place}" if len(self.images) > 1 else "image")
            for place, file in enumerate(self.images, start=1)
        ]
        mask = None if self.mask is None else self._painted(self.mask, images[0].size)
        masks = []
        for place, (file, image) in enumerate(zip(self.reference_masks, images, strict=False), start=1):
            masks.append(self._read(file, f"reference_masks {place}", image.size))
        return images, mask, masks

    def _painted(self, file: UploadFile, size: tuple[int, int]) -> Image.Image:
        """Mode L, white where to paint: there the mask is transparent, or where nothing of it is, white."""
        mask = self._read(file, "mask")
        if mask.size != size:
            raise ApiError(
                400,
                f"The mask is {mask.width}x{mask.height}, but the first image is {size[0]}x{size[1]}: send one of its "
                "size.",
                param="mask",
            )
        return ImageChops.invert(mask.getchannel("A")) if mask.mode == "RGBA" else mask.convert("L")

    def _read(self, file: UploadFile, name: str, mask_of: tuple[int, int] | None = None) -> Image.Image:
        """A picture, or a mask for one of this size."""
        file.file.seek(0)
        data = file.file.read()
        try:
            if not data:
                raise PictureError("it is empty; send another copy")
            if mask_of is not None:
                return open_mask(data, mask_of, self.most_pixels)
            return open_picture(data, self.most_pixels)
        except PictureError as error:
            raise ApiError(
                400, sentence(f"The {name} cannot be used: {error}"), param=name.split()[0], code="invalid_image"
            ) from error


def take_uploads(values: dict[str, Any], settings: Settings, most: int | None) -> Uploads:
    """The files among the fields of a form, which are taken out of them.

    most: the references that the model takes. Raises `ApiError` for none, too many, and for texts in their place.
    """
    taken = {name: _files(name, values.pop(name, [])) for name in ("image", "mask", "reference_masks")}
    images, masks, keeps = taken["image"], taken["mask"], taken["reference_masks"]
    bound = min(settings.references, settings.references if most is None else most)
    if not images:
        raise ApiError(
            400, "There is no image: send one or more files named image.", param="image", code="missing_field"
        )
    if len(images) > bound:
        raise ApiError(
            400, f"There are {len(images)} images, and at most {bound} are taken: send fewer.", param="image"
        )
    if len(masks) > 1:
        raise ApiError(400, f"There are {len(masks)} masks: send one, for the first image.", param="mask")
    if keeps and len(keeps) != len(images):
        raise ApiError(
            400,
            f"There are {len(keeps)} reference_masks for {len(images)} images: send one for each.",
            param="reference_masks",
        )
    return Uploads(images, masks[0] if masks else None, keeps, settings.pixels)


def _files(name: str, value: Any) -> list[UploadFile]:
    values = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, UploadFile):
            raise ApiError(400, f"{name} is {short(each)}: send the bytes of a picture as a file.", param=name)
    return values
