"""The subject of a picture, by a model of the user's own that cuts pictures out: an ONNX file, or any function.

Nothing comes with the package, nothing is downloaded, and no picture leaves the machine unless your function sends it.
ONNX Runtime reports its use to its makers by default, which is turned off here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..layers import explain_missing_packages
from .cells import Grid, cell_means, rgb_pixels
from .masks import PillowImage, as_array

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which most of these models were trained on
SIDE = 1024  # pixels, of a model that takes any size
OUTPUTS = ("logits", "probabilities")
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # of ONNX Runtime: those that compute on this machine

CutOut = Callable[[Any], Any]
"""From a PIL picture (RGB) to a mask of it: a PIL picture, or an array (h, w)."""


class Matting:
    """A selector of what a model cuts out: each token has the share of it that is covered. `matting` makes one."""

    def __init__(self, cut_out: CutOut, label: str, name: str | None = None) -> None:
        """label: for people. name: equal where the masks of the same picture are; None where nobody knows."""
        self.cut_out, self.label, self.name = cut_out, label, name

    def prepare(self) -> None:
        """Read the model, if it is a file."""
        if isinstance(self.cut_out, OnnxModel):
            self.cut_out.session  # noqa: B018

    def __call__(self, image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
        from PIL import Image  # which selecting does without elsewhere

        mask = as_mask(self.cut_out(Image.fromarray(rgb_pixels(image, "matting"))), self.label)
        return np.clip(cell_means(mask, grid), 0, 1)


def matting(
    model: str | os.PathLike[str] | CutOut | Any,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    size: int | tuple[int, int] | None = None,
    output: str = "logits",
) -> Matting:
    """A selector of the subject, by a model that you have: `selector=matting("birefnet-lite.onnx")`.

    model: an ONNX file, an `onnxruntime.InferenceSession`, or a function from a PIL picture (RGB) to a mask: a PIL
    picture, whose alpha counts where anything in it is transparent, or an array (h, w) of bool, float in [0, 1], or
    integers in [0, 255]. A mask may have any size; it spans the picture.

    The others are for ONNX. mean, std: of the three channels, of pixels in [0, 1]. size: of the input in pixels, one
    side or (height, width); None: the model's own, or 1024 where it takes any. output: what its first output holds,
    "logits" or "probabilities". Logits become probabilities by a sigmoid and by nothing else: they are not stretched to
    the picture's own range, so a picture without a subject scores low all over.

    Raises ValueError for a file or a session that is none, and at the first call where its output is not as said.
    """
    if callable(model):
        label = getattr(model, "__name__", None) or type(model).__name__
        return Matting(model, f"matting by {label}")
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}: choose one of {', '.join(OUTPUTS)}.")
    try:
        channels = np.array([mean, std], np.float32).reshape(2, 3)
    except (TypeError, ValueError):  # of other lengths, or no numbers
        channels = np.zeros((2, 3), np.float32)
    if not np.isfinite(channels).all() or (channels[1] <= 0).any():
        raise ValueError(f"mean is {mean!r} and std {std!r}: pass three numbers each, those of std above 0.")
    sides = size if size is None or isinstance(size, (tuple, list)) else (size, size)
    if sides is not None and not (len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)):
        raise ValueError(f"size is {size!r}: pass a number of pixels, or (height, width).")
    if isinstance(model, (str, os.PathLike)):
        path = Path(model).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"The matting model {os.fspath(model)} does not exist: pass an ONNX file.")
        about = path.stat()
        name = repr(("matting", str(path), about.st_size, about.st_mtime_ns, channels.tolist(), sides, output))
        return Matting(OnnxModel(path, channels, sides, output), f"matting by {path.name}", name)
    if not (hasattr(model, "get_inputs") and hasattr(model, "run")):
        raise ValueError(f"{model!r} cuts nothing out: pass an ONNX file, an InferenceSession of one, or a function.")
    return Matting(OnnxModel(model, channels, sides, output), "matting by a session")


class OnnxModel:
    """A function from a picture to probabilities (h, w), by an ONNX model whose file is read at the first call."""

    def __init__(self, source: Any, channels: np.ndarray, size: tuple[int, int] | None, output: str) -> None:
        """source: a file or a session. The others are those of `matting`."""
        self.source, self.channels, self.size, self.output = source, channels, size, output

    @cached_property
    def session(self) -> Any:
        if not isinstance(self.source, Path):
            return self.source
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it tells its makers what it runs; read when imported
        with explain_missing_packages():
            import onnxruntime

        onnxruntime.disable_telemetry_events()  # where somebody has imported it before
        try:
            known = set(onnxruntime.get_available_providers())
            return onnxruntime.InferenceSession(
                str(self.source), providers=[each for each in PROVIDERS if each in known]
            )
        except Exception as error:  # kinds of its own, below Exception
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise ValueError(
                f"The matting model {self.source} cannot be read ({reason}): pass an ONNX file."
            ) from error

    def __call__(self, picture: Any) -> np.ndarray:
        (entry, *others) = self.session.get_inputs()
        if others or len(entry.shape) != 4 or "float" not in entry.type:
            raise ValueError("A matting model takes one input, (1, 3, height, width) of floats, and this one does not.")
        sides = self.size or tuple(side if isinstance(side, int) else SIDE for side in entry.shape[2:])
        pixels = np.asarray(picture, np.float32) / 255
        shrinks = all(own >= wanted for own, wanted in zip(pixels.shape[:2], sides, strict=True))
        small = cv2.resize(pixels, sides[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        values = ((small - self.channels[0]) / self.channels[1]).transpose(2, 0, 1)[None]
        kind = np.float16 if "float16" in entry.type else np.float32
        said = np.asarray(self.session.run(None, {entry.name: values.astype(kind)})[0], np.float32)
        said = said.reshape(said.shape[-2:]) if said.size == np.prod(said.shape[-2:]) else said
        if said.ndim != 2:
            raise ValueError(f"A matting model gives one map, and this one gave an array of shape {said.shape}.")
        inside = said.min() >= 0 and said.max() <= 1
        if inside != (self.output == "probabilities"):
            other = OUTPUTS[1 - OUTPUTS.index(self.output)]
            raise ValueError(
                f"The model's output runs from {said.min():g} to {said.max():g}, and output is {self.output!r}: pass "
                f"output={other!r}."
            )
        return said if inside else 1 / (1 + np.exp(-np.clip(said, -80, 80)))


def as_mask(returned: object, label: str) -> np.ndarray:
    """What a function made of a picture, as float32 (h, w) in [0, 1]. Raises ValueError for what is no mask."""
    if isinstance(returned, PillowImage) and returned.mode[0] not in "FI":
        alpha = as_array(returned.convert("RGBA"))[..., 3]
        returned = alpha if (alpha < 255).any() else returned.convert("L")
    try:
        values = as_array(returned)
        top = 255 if values.dtype.kind in "ui" else 1
        mask = values.astype(np.float32) / top
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label} returned {type(returned).__name__!r}, which is no mask: return (h, w).") from error
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"{label} returned an array of shape {mask.shape}: return a mask (h, w).")
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(
            f"{label} returned values from {mask.min() * top:g} to {mask.max() * top:g}: return floats in [0, 1], or "
            "integers in [0, 255]."
        )
    return mask
