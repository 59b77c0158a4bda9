"""From a request to the arguments of a pipeline's call, and what surrounds that call."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from ..config import SparseContextConfig
from ..families import family_of
from ..families.call import call_arguments
from ..preview import MAX_AREA, fit_reference, reference_mask
from .settings import Fit, call_inputs, call_settings, check_images, fit_masks, reference_sides
from .spec import Request


def call_of(pipe: Any, request: Request) -> tuple[SparseContextConfig, dict[str, Any], list[Image.Image]]:
    """What to apply to the pipeline, the arguments of its call but for the prompt and the generator, and the references
    as they are handed over.

    Nothing of the pipeline is changed. Raises ValueError for what it does not take.
    """
    family, name = family_of(pipe), type(pipe).__name__
    settings, inputs = call_settings(pipe), call_inputs(pipe)
    references, config, mask = request.references, request.config, request.inpaint
    check_images(name, family, len(references), mask is not None, settings.get("max_references"))
    token = 2 * pipe.vae_scale_factor
    for side, value in (("height", request.height), ("width", request.width)):
        if value is not None and side not in inputs:
            raise ValueError(f"{side} is {value}, but {name} takes the shape of its reference: leave it out.")
        if value is not None and value % token:
            near = max(1, round(value / token)) * token
            raise ValueError(f"{side} is {value}: this model needs a multiple of {token}, such as {near}.")
    distilled, has_guider = getattr(pipe.config, "is_distilled", False), getattr(pipe, "guider", None) is not None
    if request.guidance_scale is not None and (distilled or not (has_guider or family.guidance in inputs)):
        what = "this distilled model" if distilled else name
        raise ValueError(f"guidance_scale is {request.guidance_scale}, but {what} takes none: leave it out.")
    if request.negative_prompt is not None and (distilled or "negative_prompt" not in inputs):
        what = "this distilled model" if distilled else name
        raise ValueError(f"negative_prompt is {request.negative_prompt!r}, but {what} takes none: leave it out.")
    for i, reference in enumerate(references):
        reference_mask(config.selector, i, reference)  # raises for a mask of another size
    if mask is not None and mask.size != references[0].size:
        raise ValueError(
            f"The mask to paint in is {mask.width}x{mask.height}, but the first reference is "
            f"{references[0].width}x{references[0].height}: pass a mask of its size."
        )
    sides = reference_sides(settings.get("reference_size"), config, len(references))
    area = max(MAX_AREA, config.reference_max_pixels or 0)  # its pipeline scales a larger one down by itself
    fits: list[Fit] = [partial(fit_reference, side=side, narrow=family.narrow, max_area=area) for side in sides]
    images = [fit(reference) for fit, reference in zip(fits, references, strict=True)]
    chosen = {
        "num_inference_steps": request.steps,
        "height": request.height,
        "width": request.width,
        "negative_prompt": request.negative_prompt,
        family.guidance: 1.0 if distilled else request.guidance_scale,  # 1 is what a distilled model is run with anyhow
    }
    arguments = settings | {dial: value for dial, value in chosen.items() if value is not None}
    arguments = {dial: value for dial, value in arguments.items() if dial in inputs}
    fitted_mask = None if mask is None else fits[0](mask)
    arguments |= call_arguments(pipe, images, fitted_mask, request.height, request.width)
    arguments = {dial: value for dial, value in arguments.items() if value is not None}
    return replace(config, selector=fit_masks(config.selector, fits)), arguments, images


def guided(pipe: Any, scale: float | None) -> contextlib.AbstractContextManager[None]:
    """Within it, a pipeline whose guidance is a part of it (a guider) has this scale."""
    if not family_of(pipe).modular:
        return contextlib.nullcontext()
    from ..families.modular import guidance

    return guidance(pipe, scale)


@contextlib.contextmanager
def progress_bar(pipe: Any, **settings: Any) -> Iterator[None]:
    """Within it, the pipeline's progress bar has these settings on top of its own."""
    blocks = pipe.blocks.sub_blocks.values() if family_of(pipe).modular else [pipe]
    owners = [owner for owner in blocks if hasattr(owner, "set_progress_bar_config")] if settings else []
    saved = [dict(getattr(owner, "_progress_bar_config", {})) for owner in owners]
    for owner, config in zip(owners, saved, strict=True):
        owner.set_progress_bar_config(**{**config, **settings})
    try:
        yield
    finally:
        for owner, config in zip(owners, saved, strict=True):
            owner.set_progress_bar_config(**config)
