"""References that return are encoded and scored once: `python examples/cached_references.py [FOLDER]`."""

import sys
from pathlib import Path

from embedded import CALL, load, open_image, seed

from sparse_context import ReferenceCache, apply_sparse_context

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
reference = open_image("placed-1")

pipe = load()
cache = ReferenceCache()
apply_sparse_context(pipe, keep=0.2, task="subject", cache=cache)
for colour in ("teal", "red"):
    prompt = f"{colour} background, the object of image 1 at the left."
    image = pipe(image=[reference], prompt=prompt, generator=seed(), **CALL).images[0]
    image.save(folder / f"cached-{colour}.png")
    print(f"{colour}: {cache.hits} found, {cache.misses} made")
