"""Where the subject of a picture is: a small net, what stands out by colour, and the mean of both.

The trunk is EfficientNet-lite0 (Tan, Le, "EfficientNet", ICML 2019; the lite variant has neither squeeze-and-excitation
nor swish) up to its second block at stride 32, with batch norms folded into the convolutions. A decoder of the feature
pyramid kind (Lin et al., CVPR 2017) brings strides 32, 16, 8 and 4 together, and what the whole picture holds enters at
its coarsest level. `recipes/mini/saliency_net.py` trains it; the weights lie beside this file.

The net finds animals and things against any background, and misses buildings; contrast.py finds whatever differs from
the picture's border, and is lost where that is busy. Their errors differ, so the mean is taken, which on photographs
finds at least as much as the better of the two (`runs/saliency.py`). Both keep to a fixed scale: a picture without a
subject is low all over.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .contrast import contrast_map

WEIGHTS = Path(__file__).with_name("saliency.safetensors")


# Pixels of the net's input; the other side keeps the aspect, both are multiples of 32. It was trained at 256; 224 are
# three quarters of the pixels.
LONG_SIDE = 224


NOTHING = 0.05  # a probability up to this is taken for none: it says no more than how sure the net is of background


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pictures that the trunk was trained on


# EfficientNet-lite0, stage by stage: (blocks, kernel, stride, expansion, channels)
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (2, 5, 2, 6, 192))


TAPS = {1: 24, 2: 40, 4: 112, 5: 192}  # the stages that the decoder reads, and their channels


WIDTH = 64  # channels of the decoder


def convolution(inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups)


def strided(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """`layer` with TensorFlow's padding, which the trunk was trained with: an odd pixel goes below and right."""
    if layer.stride[0] == 1:
        return layer(x)
    # A row and a column of zeros before the kernel shift it as far: the picture, which is larger, need not be copied
    weight = F.pad(layer.weight, (1, 0, 1, 0))
    return F.conv2d(x, weight, layer.bias, 2, layer.kernel_size[0] // 2, groups=layer.groups)


class Block(nn.Module):
    """An inverted residual (Sandler et al., CVPR 2018): widen, filter each channel, narrow."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expand = convolution(inside, wide) if expansion > 1 else None
        self.depthwise = convolution(wide, wide, kernel, stride, groups=wide)
        self.project = convolution(wide, outside)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(strided(self.depthwise, y), inplace=True))
        return y.add_(x) if self.residual else y


class Trunk(nn.Module):
    """(B, 3, H, W), normalised, sides multiples of 32 -> features at strides 4, 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, 32, 3, 2)
        self.stages = nn.ModuleList()
        inside = 32
        for blocks, kernel, stride, expansion, channels in STAGES:
            first = Block(inside, channels, kernel, stride, expansion)
            rest = [Block(channels, channels, kernel, 1, expansion) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            inside = channels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = F.relu6(strided(self.stem, x), inplace=True)
        features = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in TAPS:
                features.append(x)
        return features


class Refine(nn.Module):
    """A residual 5x5 depthwise filter and a 1x1 mix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = convolution(width, width, 5, groups=width)
        self.mix = convolution(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(F.relu(self.depthwise(F.relu(x)), inplace=True))


class Decoder(nn.Module):
    """Features of `Trunk` -> logits (B, 1, H / 4, W / 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(convolution(channels, WIDTH) for channels in TAPS.values())
        self.refine = nn.ModuleList(Refine(WIDTH) for _ in TAPS)
        self.whole = nn.Linear(TAPS[5], WIDTH)
        self.out = convolution(WIDTH, 1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        x = self.whole(features[-1].mean(dim=(2, 3)))[:, :, None, None]
        for lateral, refine, feature in zip(self.lateral[::-1], self.refine[::-1], features[::-1], strict=True):
            if x.shape[-1] > 1 or x.shape[-2] > 1:
                x = F.interpolate(x, size=feature.shape[-2:], mode="bilinear")
            x = refine(lateral(feature) + x)
        return self.out(F.relu(x))


class SaliencyNet(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1], sides multiples of 32 -> logits (B, 1, H / 4, W / 4) of "this is subject"."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.decoder = Decoder()
        for name, values in (("mean", MEAN), ("std", STD)):  # with real values also where the rest is built without
            tensor = torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.trunk((pictures - self.mean) / self.std))


_LOADING = threading.Lock()


@lru_cache(maxsize=1)
def _read(path: Path) -> SaliencyNet:
    with torch.device("meta"):  # weights on the CPU would first be drawn from torch's generator, which is the user's
        net = SaliencyNet()
    try:
        net.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"The saliency net's weights {path} cannot be read ({str(error).splitlines()[0]}): "
            "install sparse-context again, or use another selector, such as 'contrast'."
        ) from error
    # Quicker on a CPU, and a picture's bytes lie in this order anyway
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_net(path: Path = WEIGHTS) -> SaliencyNet:
    """The trained net, on the CPU in float32: read once, at the first call, whichever thread that comes from.

    Raises ValueError for a file that is missing, broken or another net's.
    """
    with _LOADING:
        return _read(path)


def _input_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the net's input: the longer side `LONG_SIDE`, the aspect kept to the nearest 32 pixels."""
    scale = LONG_SIDE / max(height, width) / 32
    return max(32, 32 * round(height * scale)), max(32, 32 * round(width * scale))


def net_map(image: np.ndarray) -> np.ndarray:
    """The net's part of `saliency_map`: uint8 RGB (H, W, 3) -> float32 (H, W) in [0, 1].

    Probabilities up to `NOTHING` become 0 and the rest is stretched to [0, 1], by the same rule in every picture, so
    that where there is no subject the scores tie.
    """
    height, width = image.shape[:2]
    rows, columns = _input_size(height, width)
    shrinks = rows <= height and columns <= width
    small = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    pictures = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        likely = torch.sigmoid(load_net()(pictures))[0, 0].numpy()
    scores = np.maximum(likely - NOTHING, 0) / (1 - NOTHING)
    return cv2.resize(scores, (width, height), interpolation=cv2.INTER_LINEAR)


def saliency_map(image: np.ndarray) -> np.ndarray:
    """How much each pixel looks like a part of the subject: uint8 RGB (H, W, 3) -> float32 (H, W) in [0, 1].

    The mean of `net_map` and `contrast_map`: above one half only where both find something. Deterministic, on the CPU,
    whatever device the pipeline is on. Raises ValueError when the net's weights cannot be read.
    """
    return (net_map(image) + contrast_map(image)) / 2
