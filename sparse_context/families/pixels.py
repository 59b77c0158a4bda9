"""Pixels on their way to the VAE: bytes until they are where it is."""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import PIL.Image
import torch
from torch.utils._pytree import tree_map

from ..cache import fix

GREYS = 2.0 * torch.from_numpy(np.arange(256).astype(np.float32) / 255.0) - 1.0
"""What each byte stands for, as diffusers computes it."""

_ABOUT = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.size,
    torch.Tensor.dim,
}
"""What is asked of pixels without looking at them."""

_TO = {"device", "dtype", "non_blocking"}
"""What hosts pass to `Tensor.to`; who asks for a copy or an order of memory gets it of the floats."""


class LazyPixels(torch.Tensor):
    """Pixels (B, 3, H, W) in [-1, 1], float32 on the CPU, which are made of their bytes once somebody looks at them.

    A host moves them to its VAE by `to`. What that gives is the very values that a host's own tensor would have there;
    but it was bytes that were copied, without waiting for the device, and `source_of` knows what it was made from.
    Whoever writes to them, as to any tensor, writes to the floats: from then on there are no bytes.
    """

    _shown: list[np.ndarray]
    _bytes: torch.Tensor | None
    _floats: torch.Tensor | None

    @classmethod
    def of_bytes(cls, pictures: np.ndarray) -> "LazyPixels":
        """Of uint8 (B, H, W, 3), which nobody may write to any more."""
        stack = torch.from_numpy(pictures)
        pixels = stack.permute(0, 3, 1, 2).as_subclass(cls)
        pictures.flags.writeable = False
        pixels._shown = [fix(picture) for picture in pictures]
        pixels._bytes, pixels._floats = stack, None
        return pixels

    @classmethod
    def of_floats(cls, floats: torch.Tensor) -> "LazyPixels":
        """Of pixels that have no bytes, such as an overview's."""
        pixels = floats.as_subclass(cls)
        pixels._shown, pixels._bytes, pixels._floats = [], None, floats
        return pixels

    @property
    def floats(self) -> torch.Tensor:
        """A plain tensor of these pixels, the same one each time."""
        if self._floats is None:
            height, width = self._shown[0].shape[:2]
            rows = [cv2.LUT(picture.reshape(height, -1), GREYS.numpy()) for picture in self._shown]
            stack = np.stack(rows) if len(rows) > 1 else rows[0]
            with torch.inference_mode(False):  # within it, nobody would know that they were written to
                floats = torch.from_numpy(stack).view(-1, height, width, 3).permute(0, 3, 1, 2)
            self._floats = floats
        return self._floats

    @property
    def shown(self) -> list[np.ndarray]:
        """The pictures, uint8 (H, W, 3) each, which nobody can write to; empty where there are no bytes."""
        return [] if self._written else self._shown

    @property
    def _written(self) -> int:
        """How often somebody wrote to them, as far as that is known."""
        return 0 if self._floats is None or self._floats.is_inference() else self._floats._version

    def _to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        dtype = dtype or torch.float32
        if device is None or device.type == "cpu":
            # An alias, so that what remembers its source is not held by it
            moved = self.floats.detach() if dtype == torch.float32 else self.floats.to(dtype)
        elif self._bytes is None or not self.shown:
            moved = _without_waiting(self.floats.to(dtype), device)
        else:
            # By a table, for devices do not divide as CPUs do
            stack = _without_waiting(self._bytes, device)
            greys = _without_waiting(GREYS.to(dtype), device)
            moved = greys.index_select(0, stack.flatten().int()).view(stack.shape).permute(0, 3, 1, 2)
        if not moved.is_inference():
            moved.made_of = self, self._written, moved._version  # type: ignore[attr-defined]
        return moved

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.to and isinstance(args[0], cls) and len(args) <= 3 and kwargs.keys() <= _TO:
            return args[0]._to(*args[1:], **kwargs)
        if function in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        args, kwargs = tree_map(lambda each: each.floats if isinstance(each, cls) else each, (tuple(args), kwargs))
        return function(*args, **kwargs)


def _without_waiting(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device. Only from pinned memory is it made while the device does what was queued before."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def source_of(pixels: torch.Tensor) -> LazyPixels | None:
    """The `LazyPixels` that a tensor is, or that it was made of by `to`, while nobody has written to either since."""
    if isinstance(pixels, LazyPixels):
        return pixels
    source, *versions = getattr(pixels, "made_of", (None,))
    # A deep copy has a copy of the floats for its source
    same = isinstance(source, LazyPixels) and [source._written, pixels._version] == versions
    return source if same else None


class View:
    """An object of which some attributes are others, without a change to it or a copy of it."""

    def __init__(self, seen: Any, others: dict[str, Any]) -> None:
        vars(self).update(others, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._seen, name, value)


def preprocess_lazily(processor: Any) -> Callable[..., torch.Tensor]:
    """The `preprocess` of an image processor, which gives `LazyPixels` of PIL pictures.

    It is that of a processor of diffusers with its last steps left for later. Where it does more than scaling to
    [-1, 1] in these, or is the user's own, it stays as it is.
    """
    plain = processor.preprocess
    config = getattr(processor, "config", None)
    last_steps = {
        "pil_to_numpy": lambda pictures: np.stack([np.array(picture) for picture in pictures]),
        "numpy_to_pt": torch.from_numpy,
        "normalize": lambda stack: LazyPixels.of_bytes(stack.numpy()),
    }
    own = vars(processor).keys() & {"preprocess", *last_steps}
    if own or not type(processor).__module__.startswith("diffusers.") or config is None:
        return plain
    if not config.do_normalize or config.do_binarize or not config.do_convert_rgb:
        return plain
    view = View(processor, last_steps)

    def preprocess(image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        pictures = image if isinstance(image, list) else [image]
        if not pictures or not all(isinstance(picture, PIL.Image.Image) for picture in pictures):
            return plain(image, *args, **kwargs)
        return type(processor).preprocess(view, image, *args, **kwargs)

    return preprocess
