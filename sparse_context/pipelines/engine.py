"""A request, answered by a pipeline."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..config import SparseContextConfig
from ..families import family_of
from ..preview import fit_reference, reference_mask
from ..selection import Selection
from ..sparsify import apply_sparse_context, last_selection
from .hub import _first_line
from .settings import Fit, _check_references, _fit_masks, call_inputs, call_settings, check_call, reference_sides
from .timing import Times, timed


@dataclass(frozen=True)
class Generation:
    """One call: the picture, what was kept of the references (None without any), and where the time went."""

    image: Image.Image
    selection: Selection | None
    times: Times

    def to_dict(self) -> dict:
        """The report, for JSON: size, what was kept, seconds of each phase."""
        kept = None if self.selection is None else self.selection.to_dict()
        return {"size": list(self.image.size), "selection": kept, "seconds": asdict(self.times)}


def generate(
    pipe: Any,
    references: Sequence[Image.Image],
    prompt: str,
    config: SparseContextConfig | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    inpaint: Image.Image | None = None,
) -> Generation:
    """One picture from references (RGB or RGBA) and a prompt. `config` stays applied to `pipe` afterwards.

    inpaint: for a pipeline that paints into the first reference, a mask (mode L) of its size, white where to paint.

    A model with call settings of its own (`call_settings`) is called by them where no argument says otherwise; its
    references, and the masks in `config` with them, are scaled to the size that it was trained on (`fit_reference`).
    Raises ValueError for arguments out of range, and for whatever the pipeline itself raises.
    """
    family, name = family_of(pipe), type(pipe).__name__
    settings = call_settings(pipe)
    config = config or SparseContextConfig()
    _check_references(name, family, len(references), inpaint is not None, settings.get("max_references"))
    taken = call_inputs(pipe)
    check_call(prompt, seed, steps, height, width, guidance_scale)
    token = 2 * pipe.vae_scale_factor
    for dial, value in (("height", height), ("width", width)):
        if value is not None and dial not in taken:
            raise ValueError(f"{dial} is {value}, but {name} takes the shape of its reference: leave it out.")
        if value is not None and value % token:
            near = max(1, round(value / token)) * token
            raise ValueError(f"{dial} is {value}: this model makes multiples of {token}, such as {near}.")
    distilled, guider = getattr(pipe.config, "is_distilled", False), getattr(pipe, "guider", None)
    if guidance_scale is not None and (distilled or (guider is None and family.guidance not in taken)):
        raise ValueError(f"guidance_scale is {guidance_scale}, but this distilled model takes none: leave it out.")
    for i, reference in enumerate(references):
        reference_mask(config.selector, i, reference)  # raises for a mask of another size
    if inpaint is not None and inpaint.size != references[0].size:
        raise ValueError(
            f"The mask to paint in is {inpaint.width}x{inpaint.height}, but the first reference is "
            f"{references[0].width}x{references[0].height}: pass a mask of its size."
        )

    sides = reference_sides(settings.get("reference_size"), config, len(references))
    fits: list[Fit] = [partial(fit_reference, side=side, narrow=family.narrow) for side in sides]
    pictures = [fit(reference) for fit, reference in zip(fits, references, strict=True)]
    images: dict[str, Any] = {"image": pictures or None}
    if inpaint is not None:
        images = {"image": pictures[0], "mask_image": fits[0](inpaint)}
        if pictures[1:]:
            images["image_reference"] = pictures[1:]
    elif family.most == 1:
        images["image"] = pictures[0] if pictures else None
    if "max_area" in taken and (height or width):  # Kontext scales the size that it is given to this many pixels
        default = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = height or default, width or default
        images["max_area"] = height * width
    chosen = {"num_inference_steps": steps, "height": height, "width": width, family.guidance: guidance_scale}
    if distilled:
        chosen[family.guidance] = 1.0  # what it is run with anyhow
    arguments = settings | {dial: value for dial, value in chosen.items() if value is not None}
    arguments = {dial: value for dial, value in arguments.items() if dial in taken} | images
    arguments = {dial: value for dial, value in arguments.items() if value is not None}
    if family.modular:
        arguments["output"] = "images"
    apply_sparse_context(pipe, replace(config, selector=_fit_masks(config.selector, fits)))
    if guider is not None and guidance_scale is not None:
        pipe.update_components(guider=guider.new(guidance_scale=guidance_scale))
    try:
        with timed(pipe) as times:
            made = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **arguments)
    except ValueError:
        raise
    except Exception as error:  # memory that ran out, parts that do not belong together, settings of another model
        raise ValueError(f"{name} failed: {_first_line(error)}.") from error
    finally:
        if guider is not None and pipe.guider is not guider:
            pipe.update_components(guider=guider)
    return Generation((made if family.modular else made.images)[0], last_selection(pipe), times)
