"""Modular pipelines: blocks that hand a state on. What their families share."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ModularPipelineBlocks
from PIL import Image

from ..large import Large
from ..preview import MAX_AREA
from ..selection import Pixels
from ..selectors.cells import Grid
from .pictures import enlarge_parts, part_of

if TYPE_CHECKING:
    from ..context import Call


def attach_step(call: "Call", output: str, keep_essentials: Callable) -> None:
    """Run `keep_essentials(state)` behind each block of the call's pipeline that makes `output`."""

    class Step(ModularPipelineBlocks):
        def __call__(self, components, state):
            if components is call.pipe:  # wherever these blocks may be copied to
                keep_essentials(state)
            return components, state

    call.replace("_blocks", lambda blocks: insert_behind(blocks, output, Step()))


def insert_behind(blocks: Any, output: str, step: Any) -> Any:
    """A copy of `blocks` with `step` behind each block that makes `output`, at any depth; it shares all other blocks.

    A copy, because diffusers' own blocks are shared by all pipelines that are made from one class.
    """
    blocks = copy.copy(blocks)
    blocks.sub_blocks = copy.copy(blocks.sub_blocks)
    for place, (name, block) in reversed(list(enumerate(blocks.sub_blocks.items()))):
        if block.sub_blocks:
            blocks.sub_blocks[name] = insert_behind(block, output, step)
        elif output in block.intermediate_output_names:
            blocks.sub_blocks.insert("keep_essentials", step, place + 1)
    return blocks


def enlarge(
    source: Any,
    pixels: torch.Tensor,
    shown: Pixels,
    grid: Grid,
    max_pixels: int,
    processor: Any,
    preprocess: Callable[..., torch.Tensor],
    encode: Callable[[Sequence[torch.Tensor]], torch.Tensor],
) -> Large | None:
    """A reference in at most `max_pixels`, of a pipeline that scales it to a megapixel and keeps the middle of it in
    whole tokens; None where that is no larger, or where `source` is no PIL picture.

    pixels: (1, 3, H, W), what was preprocessed. shown, grid, encode: as in `pictures.enlarge_parts`.
    """
    if not isinstance(shown, np.ndarray) or not isinstance(source, Image.Image):
        return None
    scaled = Image.new("L", source.size)  # for its size alone
    if source.width * source.height > MAX_AREA:
        scaled = processor._resize_to_target_area(scaled, MAX_AREA)
    height, width = pixels.shape[-2:]
    part = part_of(source, scaled.size, (width, height))
    return enlarge_parts([(source, part)], [shown], grid, height // grid[0], max_pixels, preprocess, encode)


def arguments(
    pipe: Any, images: Sequence[Image.Image], mask: Image.Image | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """How modular pipelines are handed their images, and told what to return."""
    return {"image": list(images) or None, "output": "images"}


@contextlib.contextmanager
def guidance(pipe: Any, scale: float | None) -> Iterator[None]:
    """Within it, the pipeline's guider has this scale; None leaves it."""
    guider = pipe.guider if scale is not None else None
    if guider is None:
        yield
        return
    pipe.update_components(guider=guider.new(guidance_scale=scale))
    try:
        yield
    finally:
        pipe.update_components(guider=guider)
