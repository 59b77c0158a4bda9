"""FLUX.3, base and step-distilled, which are modular: blocks that hand a state on.

The tokens (B, N, C) and position ids (N, 4) of all references stand in the state, next to their pixels, after the step
that prepares them. So the pipeline gets a copy of its blocks with a step behind that one. A lone reference is padded to
a canvas with its own reflection, which scores lowest where a token shows nothing else.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tokens import ReferenceTokens
from .pictures import mask_of, to_uint8

if TYPE_CHECKING:
    from ..sparsify import SparseContext


def attach(pipe: Any, context: "SparseContext") -> None:
    """Put a step that cuts the reference tokens into a copy of the blocks of `pipe`."""

    def start_call(state: Any) -> None:
        context.selection = None

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

        shown = None
        if pixels is not None and resize_mode == "fill":
            _, canvas = pipe.image_processor.preprocess(images[0], resize_mode=resize_mode)
            shown = [_overlaps(canvas["reference_crop"], grids[0], pixels[0].shape[-2] // grids[0][0])]
        tokens = ReferenceTokens(state.image_cond_hidden_states, state.image_cond_ids)
        kept = tokens.keep(context.select(grids, picture, shown))
        state.set("image_cond_hidden_states", kept.latents)
        state.set("image_cond_ids", kept.ids)

    blocks = deepcopy(pipe._blocks)
    _insert_behind(blocks, "image_cond_ids", _step(pipe, keep_essentials))
    blocks.sub_blocks.insert("start_sparse_context", _step(pipe, start_call), 0)
    context.override(pipe, "_blocks", blocks)


def _overlaps(box: tuple[int, int, int, int], grid: tuple[int, int], side: int) -> np.ndarray:
    """Bool (rows, columns): which tokens, `side` pixels wide, show any of the box (left, top, right, bottom)."""
    left, top, right, bottom = box
    rows, columns = (side * np.arange(n) for n in grid)
    return ((rows < bottom) & (rows + side > top))[:, None] & ((columns < right) & (columns + side > left))


def _step(pipe: Any, function: Callable) -> Any:
    """`function(state)` as a block that works in `pipe` alone, wherever its blocks may be copied to."""
    from diffusers import ModularPipelineBlocks  # a second to import, which a user of this pipeline has spent already

    class Step(ModularPipelineBlocks):
        def __call__(self, components, state):
            if components is pipe:
                function(state)
            return components, state

    return Step()


def _insert_behind(blocks: Any, output: str, step: Any) -> None:
    """Insert `step` behind each block that makes `output`, at any depth."""
    for place, (_, block) in reversed(list(enumerate(blocks.sub_blocks.items()))):
        if block.sub_blocks:
            _insert_behind(block, output, step)
        elif output in block.intermediate_output_names:
            blocks.sub_blocks.insert("keep_essentials", step, place + 1)
