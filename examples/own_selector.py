"""A selector of your own, alone and in a blend: `python examples/own_selector.py`. No model is needed for this."""

import numpy as np
from embedded import open_image

from sparse_context import SparseContextConfig, select_tokens


def centre(image, grid, generator):
    """Prefer the middle of the image: scores in [0, 1], one for each token of the grid."""
    rows, columns = grid
    y = np.abs(np.linspace(-1, 1, rows))[:, None]
    x = np.abs(np.linspace(-1, 1, columns))[None, :]
    return 1 - np.maximum(y, x)


pixels = np.asarray(open_image("placed-1"))
grid = (pixels.shape[0] // 8, pixels.shape[1] // 8)  # the embedded model's tokens are 8 pixels wide
for selector in (centre, {centre: 0.5, "edges": 0.5}):
    print(select_tokens([pixels], [grid], SparseContextConfig(keep=0.2, selector=selector)))
