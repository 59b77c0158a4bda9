"""The subject, and the subject with its outline and rim: for subjects put into a new scene."""

from __future__ import annotations

import numpy as np

from ..layers import explain_missing_packages
from .cells import Grid, best_around, cell_means, rgb_pixels
from .classical import edges


def saliency(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """The subject, by a small trained net and by contrast, half each. For subjects put into a new scene.

    See saliency.py. A picture without a subject scores low all over.
    """
    with explain_missing_packages():  # torch, which the other selectors do without
        from .saliency import saliency_map

    return np.clip(cell_means(saliency_map(rgb_pixels(image, "saliency")), grid), 0, 1)


def subject(image: np.ndarray | None, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """The subject, its outline and its rim. For subjects put into a new scene; what the task of that name takes.

    Three quarters saliency and one quarter edges, as far as these lie on or beside something salient; and of that each
    token has 0.4 itself, and 0.3 each from the best token of the 3x3 and of the 5x5 around it. A hole in a subject
    costs a picture more than a token of background gains it, and a subject that is moved or turned no longer lies on
    the grid, so that its border takes the tokens beside it. Chosen on the embedded model's scenes; see
    docs/benchmarks/quality.md.
    """
    image = rgb_pixels(image, "subject")
    found = saliency(image, grid, generator)
    scores = 0.75 * found + 0.25 * edges(image, grid, generator) * best_around(found)
    near = best_around(scores)
    return np.clip(0.4 * scores + 0.3 * near + 0.3 * best_around(near), 0, 1)
