"""The pictures behind the tensors that a pipeline encodes: what selectors look at, and the way of a user's mask."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import PIL.Image
import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..large import Large, large_grid
from ..selection import Pixels
from ..selectors.cells import Grid
from .pixels import LazyPixels, View, preprocess_lazily


def _same(image: Any) -> Any:
    return image


def _opaque(image: Any) -> Any:
    """Pictures without their alpha channels; all else as it is."""
    if isinstance(image, list):
        return [_opaque(picture) for picture in image]
    return image.convert("RGB") if _has_alpha(image) else image


def _has_alpha(image: Any) -> bool:
    """Also in a palette, as small PNGs have it."""
    return isinstance(image, PIL.Image.Image) and ("A" in image.getbands() or image.has_transparency_data)


Box = tuple[float, float, float, float]  # of a picture: left, top, right, bottom


def part_of(source: PIL.Image.Image, scaled: tuple[int, int], shown: tuple[int, int]) -> Box:
    """The part of a picture that is seen of it: it was scaled to `scaled` (width, height), and the middle of that is
    `shown`."""
    left, top = (scaled[0] - shown[0]) // 2, (scaled[1] - shown[1]) // 2
    across, down = source.width / scaled[0], source.height / scaled[1]
    return left * across, top * down, (left + shown[0]) * across, (top + shown[1]) * down


def enlarge_parts(
    parts: Sequence[tuple[PIL.Image.Image, Box]],
    shown: Sequence[np.ndarray],
    grid: Grid,
    token: int,
    max_pixels: int,
    preprocess: Callable[..., torch.Tensor],
    encode: Callable[[Sequence[torch.Tensor]], torch.Tensor],
) -> Large | None:
    """A reference of these pictures, one for each item of a batch, in at most `max_pixels`; None where that is no
    larger.

    shown: what selectors see of each in its usual size, with a mask last or without. grid, token: of the usual size,
    the latter in pixels. preprocess: of the host's image processor. encode: as in `Large`.
    """
    size = min(box[3] - box[1] for _, box in parts), min(box[2] - box[0] for _, box in parts)
    larger = large_grid(grid, token, size, max_pixels)
    if larger is None:
        return None
    height, width = larger[0] * token, larger[1] * token
    scaled = [source.convert("RGB").resize((width, height), PIL.Image.Resampling.LANCZOS, box) for source, box in parts]
    tensor = preprocess(scaled, height=height, width=width)
    seen = list(to_uint8(tensor))
    if all(picture.shape[-1] == 4 for picture in shown):
        alphas = [cv2.resize(picture[..., 3], (width, height)) for picture in shown]
        seen = [np.dstack([picture, alpha]) for picture, alpha in zip(seen, alphas, strict=True)]
    return Large(larger, seen, tensor, encode)


class Pictures:
    """Watches the image processor of one call, and so knows what each preprocessed tensor was made from.

    `max_area` is the number of pixels that the pipeline scales larger pictures down to before the processor sees them;
    a mask of the size that the picture had before that is scaled with it. Where the pipeline's own processor keeps an
    alpha channel, which its VAE cannot take, pictures go to it without, as FLUX.2's processor does by itself.
    `lazily`: tensors stay bytes on the way to the VAE (`LazyPixels`), for hosts that only move them there.
    """

    def __init__(self, max_area: float = math.inf, lazily: bool = False) -> None:
        self.preprocessed: list[torch.Tensor] = []  # all that was made, in order
        self._max_area = max_area
        self._lazily = lazily
        self._made_by = WeakIdKeyDictionary()  # what a step of the processor returned -> the step and its arguments
        self._scaled_from = WeakIdKeyDictionary()  # a picture that FLUX.2 scaled down -> the picture that it was

    def watch(self, processor: Any) -> Any:
        """The image processor as this call sees it; the processor itself may serve others meanwhile."""
        converts = getattr(getattr(processor, "config", None), "do_convert_rgb", True)  # the user's own has no config
        preprocess = preprocess_lazily(processor) if self._lazily else processor.preprocess
        prepare = _same if converts else _opaque
        preprocess = self._watched(preprocess, prepare)
        steps = {"preprocess": self._listed(preprocess)}
        if hasattr(processor, "resize"):
            steps["resize"] = self._watched(processor.resize, prepare)  # Pillow blackens what is transparent
        if hasattr(processor, "_resize_to_target_area"):
            steps["_resize_to_target_area"] = self._scaling(processor._resize_to_target_area)
        return View(processor, steps)

    def _listed(self, step: Callable) -> Callable:
        def listed(*args, **kwargs):
            self.preprocessed.append(step(*args, **kwargs))
            return self.preprocessed[-1]

        return listed

    def _scaling(self, step: Callable) -> Callable:
        def scaled(image, *args, **kwargs):
            result = step(image, *args, **kwargs)
            self._scaled_from[result] = image
            return result

        return scaled

    def _watched(self, step: Callable, prepare: Callable = _same) -> Callable:
        def watched(image, *args, **kwargs):
            prepared = prepare(image)
            result = step(prepared, *args, **kwargs)
            if result is prepared:  # as a list of pictures passes through `resize`
                return image
            self._made_by[result] = (step, image, args, kwargs)
            return result

        return watched

    def show(
        self, pixels: torch.Tensor, mask: np.ndarray | None, reference: int, rows: slice = slice(None)
    ) -> list[np.ndarray]:
        """The batch items `rows` of a preprocessed tensor (B, C, H, W), as `SparseContext.select` wants a picture.

        uint8 (H, W, 3) each; or (H, W, 4) with the user's mask, or else the picture's own alpha channel, carried
        through the processor's resize and crop. Raises ValueError for a mask of another size than its picture's.
        """
        if isinstance(pixels, LazyPixels) and pixels.shown:
            pixels_shown = pixels.shown[rows]
        else:
            pixels_shown = list(to_uint8(pixels[rows]))
        original = self._original(pixels)
        originals = list(original) if isinstance(original, list) else [original]
        if original is pixels:
            return pixels_shown
        alike = []
        for picture in originals[rows] if len(originals) > 1 else originals:
            picture_mask = mask_of(picture, mask, reference, self._max_area)
            if picture_mask is None:
                return pixels_shown
            alike.append(_like(picture, picture_mask))
        alphas = to_uint8(self._replay(pixels, alike if len(alike) > 1 else alike[0]))[..., :1]
        alphas = np.broadcast_to(alphas, (len(pixels_shown), *alphas.shape[1:]))
        return [np.concatenate(pair, axis=-1) for pair in zip(pixels_shown, alphas, strict=True)]

    def enlarge(
        self,
        pixels: torch.Tensor,
        shown: Pixels,
        grid: Grid,
        max_pixels: int,
        encode: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    ) -> Large | None:
        """A preprocessed tensor (B, C, H, W) anew, from the pictures that it was made of, in at most `max_pixels`.

        It shows the same part of them. None where that would be no larger, or where these are not PIL pictures.
        shown: what `show` returns of it. grid: of its tokens. encode: as in `Large`.
        """
        original = self._original(pixels)
        originals = list(original) if isinstance(original, list) else [original]
        if shown is None or not all(isinstance(picture, PIL.Image.Image) for picture in originals):
            return None
        step, _, _, kwargs = self._made_by[pixels]
        height, width = pixels.shape[-2:]
        parts = []
        for picture in originals:
            cuts = kwargs.get("resize_mode") == "crop"  # FLUX.2 cuts what is no whole token, and scales no more
            source = self._scaled_from.get(picture, picture)
            parts.append((source, part_of(source, picture.size, (width, height) if cuts else picture.size)))
        seen = [*shown]
        return enlarge_parts(parts, seen, grid, height // grid[0], max_pixels, step, encode)

    def _original(self, tensor: Any) -> Any:
        while tensor in self._made_by:
            tensor = self._made_by[tensor][1]
        return tensor

    def _replay(self, tensor: Any, start: Any) -> Any:
        """What `tensor` would have been, had its way begun with `start`."""
        if tensor not in self._made_by:
            return start
        step, image, args, kwargs = self._made_by[tensor]
        return step(self._replay(image, start), *args, **kwargs)


def mask_of(
    original: Any, mask: np.ndarray | None, reference: int, max_area: float = math.inf
) -> PIL.Image.Image | None:
    """The user's mask of a reference in the size of its picture, or else the picture's alpha channel, or None.

    A mask of another size raises ValueError, unless it has the size that the picture had before it was scaled down to
    `max_area` pixels.
    """
    if mask is None:
        return original.convert("RGBA").getchannel("A") if _has_alpha(original) else None
    width, height = original.size if isinstance(original, PIL.Image.Image) else _array_size(original)
    user_mask = PIL.Image.fromarray(mask)
    limit = math.sqrt(max_area / (user_mask.width * user_mask.height))
    if user_mask.size == (width, height):
        return user_mask
    if limit < 1 and (int(user_mask.width * limit), int(user_mask.height * limit)) == (width, height):
        return user_mask.resize((width, height), PIL.Image.Resampling.LANCZOS)
    raise ValueError(
        f"the mask of reference {reference + 1} is {user_mask.width}x{user_mask.height}, but its picture is "
        f"{width}x{height}: pass a mask of the picture's own size"
    )


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C), rounded; what lies outside is clipped."""
    if isinstance(pixels, LazyPixels) and pixels.shown:
        return np.stack(pixels.shown)
    planes = pixels.detach().float().cpu().numpy()
    rows = planes.reshape(-1, planes.shape[-1])
    # OpenCV scales, rounds and clips in one pass, where torch takes five
    grey = cv2.addWeighted(rows, 127.5, rows, 0.0, 127.5, dtype=cv2.CV_8U).reshape(planes.shape)
    return np.stack([cv2.merge(list(item)).reshape(*item.shape[1:], -1) for item in grey])


def _array_size(original: Any) -> tuple[int, int]:
    """(width, height) of a tensor (..., H, W) or an array (..., H, W, C)."""
    height, width = original.shape[-2:] if isinstance(original, torch.Tensor) else original.shape[-3:-1]
    return width, height


def _like(original: Any, mask: PIL.Image.Image) -> Any:
    """The mask as a picture of the kind that the user passed, so that it takes the same way through the pipeline."""
    if isinstance(original, PIL.Image.Image):
        return mask
    values = np.repeat(np.asarray(mask, np.float32)[..., None] / 255, 3, axis=-1)
    return torch.from_numpy(values).permute(2, 0, 1)[None] if isinstance(original, torch.Tensor) else values[None]
