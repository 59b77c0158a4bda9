"""Reference latents: their token grid, their detail, and a small copy of them.

Latents are (B, C, H, W), or (B, C, 1, H, W) in models that share their VAE with video.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate, pad, pixel_shuffle, pixel_unshuffle

from sparse_context.overview import shrink
from sparse_context.selectors.cells import Grid, saturate

FACTOR = 4  # of the small copy that detail is what is lost in
UNIT = 0.5  # of detail, in the latents' own unit: their standard deviation is about 1


def token_grid(size: tuple[int, int], patch: int) -> Grid:
    """Rows and columns of tokens of latents with this (height, width). A last patch that is cut counts whole."""
    return math.ceil(size[0] / patch), math.ceil(size[1] / patch)


def is_still(latents: torch.Tensor) -> bool:
    """Whether latents are of one picture for each item of the batch."""
    return latents.ndim == 4 or (latents.ndim == 5 and latents.shape[2] == 1)


def average(latents: torch.Tensor, patch: int, packed: bool, factor: int) -> torch.Tensor:
    """Latents scaled down by `factor` a side, with the same shape but for the last two: a whole number of patches.

    packed: the channels hold 2 x 2 places, as those of FLUX.2; places are averaged, not what lies in the same corner of
    several tokens.
    """
    unpacked, grid = _unpack(latents, patch, packed)
    small = shrink(unpacked, grid, factor)
    small = pixel_unshuffle(small, 2) if packed else small
    return small.reshape(*latents.shape[:-2], *small.shape[-2:]).to(latents.dtype)


def detail(latents: torch.Tensor, patch: int, packed: bool) -> np.ndarray:
    """What each token holds that a copy smaller by `FACTOR` does not: float32 (rows, columns) in [0, 1].

    The root mean squared error over the token, its channels and the batch. `UNIT` scores 0.63.
    """
    unpacked, grid = _unpack(latents, patch, packed)
    height, width = unpacked.shape[-2:]
    shown = interpolate(shrink(unpacked, grid, FACTOR), scale_factor=float(FACTOR), mode="bicubic")
    error = (unpacked - shown[..., :height, :width]).square().mean(dim=(0, 1), keepdim=True)
    cells = avg_pool2d(error, height // grid[0])[0, 0]
    return saturate(cells.sqrt().cpu().numpy() / UNIT)


def _unpack(latents: torch.Tensor, patch: int, packed: bool) -> tuple[torch.Tensor, Grid]:
    """Latents as float32 (B, C, H, W) with one number for each channel and place, in whole patches; and their grid."""
    flat = latents.float().reshape(latents.shape[0], latents.shape[1], *latents.shape[-2:])
    height, width = flat.shape[-2:]
    grid = token_grid((height, width), patch)
    flat = pad(flat, (0, grid[1] * patch - width, 0, grid[0] * patch - height), mode="replicate")
    return (pixel_shuffle(flat, 2) if packed else flat), grid
