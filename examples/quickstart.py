"""Two references, a fifth of their tokens: `python examples/quickstart.py [FOLDER]`."""

import sys
from pathlib import Path

from embedded import CALL, load, open_image, seed

from sparse_context import apply_sparse_context, last_selection, remove_sparse_context

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
references = [open_image("side-by-side-1"), open_image("side-by-side-2")]
prompt = "Both objects next to each other on a plain green background."

pipe = load()
apply_sparse_context(pipe, keep=0.2)
pipe(image=references, prompt=prompt, generator=seed(), **CALL).images[0].save(folder / "quickstart.png")
print(last_selection(pipe))
remove_sparse_context(pipe)
