"""FLUX.3, base and step-distilled, which are modular: blocks that hand a state on.

The tokens (B, N, C) and position ids (N, 4) of all references stand in the state, next to their pixels, after the step
that prepares them. So a call runs a copy of the blocks with a step behind that one. A lone reference is padded to
a canvas with its own reflection, which scores lowest where a token shows nothing else.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...tokens import ReferenceTokens
from ..modular import attach_step
from ..pictures import mask_of, to_uint8

if TYPE_CHECKING:
    from ...context import Call


def attach(pipe: Any, call: "Call") -> None:
    """Run a step that cuts the reference tokens behind the block that prepares them."""

    def keep_essentials(state: Any) -> None:
        grids = [latents.shape[-2:] for latents in state.image_cond_latents]
        images, pixels = state.get("image"), state.get("condition_images")  # None where latents were passed
        images = images if isinstance(images, list) else [images]
        resize_mode = "fill" if len(grids) == 1 else "crop"

        def picture(i: int, mask: np.ndarray | None) -> np.ndarray | None:
            if pixels is None:
                return None
            seen = to_uint8(pixels[i])[0]
            alpha = mask_of(images[i], mask, i)
            if alpha is None:
                return seen
            tensor, _ = pipe.image_processor.preprocess(alpha, resize_mode=resize_mode)
            return np.concatenate([seen, to_uint8(tensor)[0, ..., :1]], axis=-1)

        shows_picture = None
        if pixels is not None and resize_mode == "fill":
            _, canvas = pipe.image_processor.preprocess(images[0], resize_mode=resize_mode)
            shows_picture = [_overlaps(canvas["reference_crop"], grids[0], pixels[0].shape[-2] // grids[0][0])]
        tokens = ReferenceTokens(state.image_cond_hidden_states, state.image_cond_ids)
        kept = call.keep(tokens, grids, picture, shows_picture)
        state.set("image_cond_hidden_states", kept.latents)
        state.set("image_cond_ids", kept.ids)

    attach_step(call, "image_cond_ids", keep_essentials)


def _overlaps(box: tuple[int, int, int, int], grid: tuple[int, int], side: int) -> np.ndarray:
    """Bool (rows, columns): which tokens, `side` pixels wide, show any of the box (left, top, right, bottom)."""
    left, top, right, bottom = box
    rows, columns = (side * np.arange(n) for n in grid)
    return ((rows < bottom) & (rows + side > top))[:, None] & ((columns < right) & (columns + side > left))
