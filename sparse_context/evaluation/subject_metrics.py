"""Metrics of subjects as benchmarks define them: others than those of metrics.py by the preparation of pictures."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .metrics import CLIP_MODEL, METRICS, Metric, Picture, clip_t
from .networks import IMAGENET_MEAN, IMAGENET_SPREAD, accelerator, vision

CLIP_SCORE = 2.5
"""What CLIPScore multiplies a cosine by (Hessel et al. 2021)."""


def clip_score(output: Picture, text: str, mask: Any = None, *, model: str) -> float:
    """CLIPScore: 2.5 times the cosine of CLIP's embeddings of a picture and a text, at least 0."""
    return CLIP_SCORE * max(0.0, clip_t(output, text, mask, model=model))


@torch.inference_mode()
def dino_cropped(output: Picture, truth: Picture, mask: Any = None, *, model: str) -> float:
    """The cosine of DINO's class tokens, prepared as DINO's own code does it: the shorter side scaled to 8/7 of the
    model's size, and the middle cut out (256 and 224 pixels)."""
    net, _ = vision(model)
    side = net.config.image_size
    tokens = []
    for picture in (output, truth):
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        short = round(side * 8 / 7)
        width, height = (int(short * each / min(image.size)) for each in image.size)
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        values = np.array(image.crop((left, top, left + side, top + side)))
        x = torch.from_numpy(values).permute(2, 0, 1)[None].to(accelerator()).float() / 255
        mean, spread = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_SPREAD))
        tokens.append(net(pixel_values=(x - mean) / spread).last_hidden_state[0, 0])
    return float(F.cosine_similarity(tokens[0], tokens[1], dim=0))


def dino_metric(model: str) -> Metric:
    """`dino_cropped` with every picture of the subjects. model: the one that the benchmark uses."""
    return Metric(dino_cropped, against="references", masked=False, model=f"a DINO; the benchmark's is {model}")


def text_metric(model: str) -> Metric:
    """`clip_score` with what the picture is to show. model: the one that the benchmark uses."""
    return Metric(clip_score, against="prompt", masked=False, model=f"a CLIP; the benchmark's is {model}")


CLIP_I, CLIP_T, DINO_I = METRICS["clip_i"], METRICS["clip_t"], METRICS["dino_i"]
assert CLIP_I.model == CLIP_T.model == CLIP_MODEL
