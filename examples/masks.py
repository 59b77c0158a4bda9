"""Say which object you mean with a mask: `python examples/masks.py [FOLDER]`."""

import sys
from pathlib import Path

import numpy as np
from embedded import CALL, load, open_image, seed

from sparse_context import apply_sparse_context, last_selection, mask

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
reference = open_image("placed-1")
wanted = np.zeros((reference.height, reference.width), bool)  # of the reference's own size
wanted[96:, 72:] = True  # the cubes at the lower right

pipe = load()
apply_sparse_context(pipe, keep=0.3, selector=mask([wanted]))
image = pipe(image=[reference], prompt="teal background, the object of image 1 at the left.", generator=seed(), **CALL)
image.images[0].save(folder / "masks.png")
print(last_selection(pipe))
