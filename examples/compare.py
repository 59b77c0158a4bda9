"""One scene at several budgets, with the tokens that each keeps: `python examples/compare.py [FOLDER]`."""

import sys
from pathlib import Path

from embedded import CALL, load, open_image, seed
from PIL import Image

from sparse_context import apply_sparse_context, draw_kept, last_selection

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
reference = open_image("placed-1")
prompt = "teal background, the object of image 1 at the left."
keeps = (1.0, 0.5, 0.2, 0.1)

pipe = load()
sheet = Image.new("RGB", (len(keeps) * 192, 2 * 192), "white")
for i, keep in enumerate(keeps):
    apply_sparse_context(pipe, keep=keep, task="subject")  # replaces what was applied before
    image = pipe(image=[reference], prompt=prompt, generator=seed(), **CALL).images[0]
    kept = last_selection(pipe).references[0]
    sheet.paste(draw_kept(kept.picture, kept).resize((192, 192)), (i * 192, 0))
    sheet.paste(image.resize((192, 192)), (i * 192, 192))
    print(f"keep {keep}: {kept.count} of {kept.scores.size} tokens")
sheet.save(folder / "compare.png")
