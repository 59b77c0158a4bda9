"""FLUX.3, base and step-distilled, which are modular: blocks that hand a state on.

The tokens (B, N, C) and position ids (N, 4) of all references stand in the state, next to their pixels, after the step
that prepares them. So a call runs a copy of the blocks with a step behind that one. A lone reference is padded to
a canvas with its own reflection, which scores lowest where a token shows nothing else.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines.flux3.before_denoise import Flux3PrepareImageCondLatentsStep
from diffusers.modular_pipelines.flux3.encoders import Flux3VaeEncoderStep
from diffusers.modular_pipelines.flux3.inputs import Flux3ImageCondInputStep
from diffusers.modular_pipelines.modular_pipeline import PipelineState

from ...large import Large
from ...overview import Overview, shrink, spread_ids
from ...selection import Pixels
from ...selectors.cells import Grid
from ...tokens import ReferenceTokens
from ..modular import attach_step, enlarge
from ..pictures import mask_of, to_uint8

if TYPE_CHECKING:
    from ...context import Call

LAST = 3  # the axis L, on which references lie at -1, -2 ...
MARK = (0, 1.0)  # of overviews, on T, where images lie at 0: between two references there is no room for four scales


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

        visible = None
        if pixels is not None and resize_mode == "fill":
            _, canvas = pipe.image_processor.preprocess(images[0], resize_mode=resize_mode)
            visible = [_overlaps(canvas["reference_crop"], grids[0], pixels[0].shape[-2] // grids[0][0])]
        tokens = ReferenceTokens(state.image_cond_hidden_states, state.image_cond_ids)

        def encode(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            other = PipelineState()  # in which they are all the references that there are
            for name in ("batch_size", "num_images_per_prompt", "dtype"):
                other.set(name, state.get(name))
            other.set("condition_images", [*parts])
            for step in (Flux3VaeEncoderStep(), Flux3ImageCondInputStep(), Flux3PrepareImageCondLatentsStep()):
                step(pipe, other)
            return other.image_cond_hidden_states

        def encode_overviews(overviews: Mapping[int, Overview], tokens: ReferenceTokens) -> ReferenceTokens:
            made = encode([shrink(pixels[i], grids[i], each.factor) for i, each in overviews.items()])
            return place_overviews(made, tokens.ids, grids, overviews)

        def enlarge_reference(i: int, shown: Pixels, max_pixels: int) -> Large | None:
            if pixels is None or resize_mode == "fill":  # a lone one has four megapixels anyway, and may be padded
                return None
            processor = pipe.image_processor
            preprocess = partial(VaeImageProcessor.preprocess, processor)  # its own takes no size
            return enlarge(images[i], pixels[i], shown, grids[i], max_pixels, processor, preprocess, encode)

        kept = call.keep(lambda: tokens, grids, picture, visible, encode_overviews, enlarge_reference)
        state.set("image_cond_hidden_states", kept.latents)
        state.set("image_cond_ids", kept.ids)

    attach_step(call, "image_cond_ids", keep_essentials)


def _overlaps(box: tuple[int, int, int, int], grid: tuple[int, int], side: int) -> np.ndarray:
    """Bool (rows, columns): which tokens, `side` pixels wide, show any of the box (left, top, right, bottom)."""
    left, top, right, bottom = box
    rows, columns = (side * np.arange(n) for n in grid)
    return ((rows < bottom) & (rows + side > top))[:, None] & ((columns < right) & (columns + side > left))


def place_overviews(
    latents: torch.Tensor, ids: torch.Tensor, grids: Sequence[Grid], overviews: Mapping[int, Overview]
) -> ReferenceTokens:
    """The tokens of overviews (B, N, C) at their places. ids: (N, 4) of the whole references.

    Rows and columns are scaled already, by as much as the pipeline's steps were told. So those of a further reference
    are taken from the top left corner of one that is there, and not made anew.
    """
    if {each.layout for each in overviews.values()} == {"spread"}:
        return ReferenceTokens(latents, spread_ids(ids, grids, overviews, MARK))
    whole = ids.split([rows * columns for rows, columns in grids])
    behind = []
    for place, (i, each) in enumerate(overviews.items(), start=len(grids) + 1):
        rows, columns = each.grid
        corner = whole[i].unflatten(0, grids[i])[:rows, :columns].flatten(0, 1).clone()
        corner[:, LAST] = -place
        behind.append(corner)
    return ReferenceTokens(latents, torch.cat(behind))
