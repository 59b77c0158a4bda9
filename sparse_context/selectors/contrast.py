"""What stands out from the border of a picture: one function, from pixels to a map.

Classical, with nothing learned, for where a net is not wanted, and to compare one with. A place stands out when it
cannot be reached from the picture's border without crossing a change of colour (minimum barrier), and when its colour
is not one of the border's (background measure). Both are measured against the border's own scatter and on a fixed
scale, so a score means the same in every picture and a flat picture scores zero everywhere.

Source: Zhang, Sclaroff, Lin, Shen, Price, Mech, "Minimum Barrier Salient Object Detection at 80 FPS", ICCV 2015 (MB+),
here with whole-row and whole-column sweeps, a fixed scale in place of stretching each map, and no morphology.
"""

from __future__ import annotations

import cv2
import numpy as np

from .cells import Grid, cell_means, rgb_pixels

LONG_SIDE = 64  # pixels of the working size


NOISE = 6.0  # CIELAB units (8-bit): scatter that any photograph has


CENTRE_WIDTH = 0.6  # standard deviation of the centre prior, in half picture sides


def contrast_map(image: np.ndarray) -> np.ndarray:
    """How far each pixel stands out: uint8 RGB (H, W, 3) -> float32 (H, W) in [0, 1]."""
    height, width = image.shape[:2]
    scale = min(1.0, LONG_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(cv2.medianBlur(small, 3), cv2.COLOR_RGB2LAB).astype(np.float32)

    strength = np.sqrt(_barrier(lab) * _unlike_border(lab))
    likely = strength**2 / (strength**2 + 2.0**2)  # one half at twice the border's scatter
    scores = cv2.GaussianBlur(likely * _centre_prior(*lab.shape[:2]), (3, 3), 0)
    return cv2.resize(scores, (width, height), interpolation=cv2.INTER_LINEAR)


def _border_sides(lab: np.ndarray) -> list[np.ndarray]:
    """The colours along the top, bottom, left and right tenth of the picture, each (n, 3)."""
    rows, columns = (max(1, side // 10) for side in lab.shape[:2])
    strips = lab[:rows], lab[-rows:], lab[:, :columns], lab[:, -columns:]
    return [strip.reshape(-1, 3) for strip in strips]


def _unlike_border(lab: np.ndarray) -> np.ndarray:
    """Distance of each colour from those of the border, in the border's standard deviations (Mahalanobis).

    Each side is a background of its own. The side that differs most is left out, because the subject may touch it.
    """
    distances = []
    for colours in _border_sides(lab):
        scatter = np.cov(colours, rowvar=False, bias=True) + NOISE**2 * np.eye(3)
        offset = lab - colours.mean(axis=0)
        inverse = np.linalg.inv(scatter).astype(np.float32)
        distances.append(np.sqrt(np.maximum(np.einsum("hwi,ij,hwj->hw", offset, inverse, offset), 0)))
    return (np.sum(distances, axis=0) - np.max(distances, axis=0)) / 3


def _barrier(lab: np.ndarray) -> np.ndarray:
    """Minimum barrier distance to the border: the least range of colour over the paths that lead there.

    The range is the mean of the three channels', in units of `NOISE`.
    """
    cost = np.full(lab.shape[:2], np.inf, np.float32)
    cost[0] = cost[-1] = 0
    cost[:, 0] = cost[:, -1] = 0
    colours = lab.transpose(0, 2, 1)  # (rows, 3, columns): a row's channels lie side by side
    # The least of a path is the greatest of what is negated: so one comparison does for both ends of its range
    colours = np.concatenate([colours, -colours], axis=1)
    ends = colours.copy()
    for _ in range(2):
        for turn in (False, True):  # down and up, then (transposed) right and left
            parts = [cost, colours, ends]
            if turn:
                parts = [np.ascontiguousarray(part.T) for part in parts]
            for step in (1, -1):
                _sweep(*(part[::step] for part in parts))
            if turn:
                cost, _, ends = (np.ascontiguousarray(part.T) for part in parts)
    return cost / (3 * NOISE)


def _sweep(cost: np.ndarray, colours: np.ndarray, ends: np.ndarray) -> None:
    """Let each row offer its paths to the next one, in place: `cost` is (rows, columns), the others (rows, 6, columns).

    Each call of NumPy here is one of thousands, for which other threads wait: so there are few of them.
    """
    reach, offer, better = np.empty_like(ends[0]), np.empty_like(cost[0]), np.empty(cost.shape[1], bool)
    for before, own, here, path in zip(ends, colours[1:], cost[1:], ends[1:], strict=False):
        np.maximum(before, own, out=reach)
        np.add.reduce(reach, axis=0, out=offer)
        np.less(offer, here, out=better)
        np.copyto(here, offer, where=better)
        np.copyto(path, reach, where=better)


def _centre_prior(height: int, width: int) -> np.ndarray:
    """A weak preference for the middle: 1 at the centre, one half in the corners. It scales scores and adds none."""
    y = np.linspace(-1, 1, height, dtype=np.float32) if height > 1 else np.zeros(1, np.float32)
    x = np.linspace(-1, 1, width, dtype=np.float32) if width > 1 else np.zeros(1, np.float32)
    falls = np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * CENTRE_WIDTH**2))
    return 0.5 + 0.5 * falls


def contrast(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """What stands out from the picture's border in colour: saliency with nothing learned. See contrast.py."""
    return np.clip(cell_means(contrast_map(rgb_pixels(image, "contrast")), grid), 0, 1)
