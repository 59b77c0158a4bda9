"""FLUX.1 Kontext, Kontext inpaint and LongCat image edit.

`prepare_latents` has the reference's pixels and returns its tokens (B, N, C) beside position ids (N, 3), once a call.
There is one reference; a list of pictures shows each output another one. All three scale it to about a megapixel.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...large import Large
from ...overview import Overview, shrink, spread_ids
from ...selection import Pixels
from ...selectors.cells import Grid
from ...tokens import ReferenceTokens
from ..pictures import Pictures

if TYPE_CHECKING:
    from ...context import Call

# Axis 0 is 0 for Kontext's output and 1 for its reference; in LongCat 1 and 2. An overview that is spread lies half a
# place behind its reference for each doubling: any real number is possible there, for `PosEmbed` takes floats. But
# Kontext keeps its ids in the model's type, and bfloat16 rounds a row of 128.5 to 128. So an overview's ids are
# float32, and all that they are joined with become that.
MARK = (0, 0.5)


def attach(pipe: Any, call: "Call") -> None:
    """Cut the reference tokens that `pipe.prepare_latents` returns."""
    pictures = Pictures()

    def keep(
        image: torch.Tensor,
        make: Callable[[], ReferenceTokens],
        prepare: Callable[[torch.Tensor], ReferenceTokens],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_latents = image.shape[1] == pipe.vae.config.latent_channels
        side = 2 if is_latents else 2 * pipe.vae_scale_factor
        grids = [(image.shape[2] // side, image.shape[3] // side)]

        def picture(i: int, mask: np.ndarray | None) -> list[np.ndarray] | None:
            return None if is_latents else pictures.show(image, mask, i)

        def encode_overviews(overviews: Mapping[int, Overview], tokens: ReferenceTokens) -> ReferenceTokens:
            made = prepare(shrink(image, grids[0], overviews[0].factor))
            return place_overviews(made, tokens.ids, grids, overviews)

        def enlarge(i: int, shown: Pixels, max_pixels: int) -> Large | None:
            def encode(parts: Sequence[torch.Tensor]) -> torch.Tensor:
                return torch.cat([prepare(part).latents for part in parts], dim=1)

            return pictures.enlarge(image, shown, grids[0], max_pixels, encode)

        # An inpainting source is blended back into what is made, and so has one size
        large = None if hasattr(pipe, "prepare_mask_latents") else enlarge
        kept = call.keep(make, grids, picture, encode_overviews=encode_overviews, enlarge=large)
        return kept.latents, kept.ids

    def keep_essentials(prepare_latents, *args, **kwargs):
        arguments = inspect.signature(type(pipe).prepare_latents).bind(pipe, *args, **kwargs).arguments
        del arguments["self"]
        paints = "image_reference" in inspect.signature(type(pipe).prepare_latents).parameters

        def prepare(image: torch.Tensor) -> ReferenceTokens:
            """The tokens of another reference in the place of this call's; noise that is passed is not drawn."""
            height, width = image.shape[-2:]
            sides = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
            noise = torch.zeros(arguments["batch_size"], arguments["num_channels_latents"], *sides)
            others = {"image": image, "height": height, "width": width, "latents": noise}
            prepared = prepare_latents(**{**arguments, **others, **({"image_reference": None} if paints else {})})
            return ReferenceTokens(prepared[1], prepared[4 if paints else 3])

        made: list[Any] = []

        def make() -> ReferenceTokens:
            made[:] = prepare_latents(*args, **kwargs)
            if not paints:
                return ReferenceTokens(made[1], made[3])
            place = 1 if made[2] is None else 2  # of the source's latents, or of a further reference's
            return ReferenceTokens(made[place], made[place + 3])

        if not paints:
            if arguments.get("image") is None:
                return prepare_latents(*args, **kwargs)
            image_latents, image_ids = keep(arguments["image"], make, prepare)
            return made[0], image_latents, made[2], image_ids

        # Inpaint: what it paints over is blended back at every step, so the source's own latents have to stay whole. A
        # reference goes to the transformer in the source's place, and the source's kept tokens go there as one.
        shown = arguments.get("image_reference")
        reference, reference_ids = keep(arguments["image"] if shown is None else shown, make, prepare)
        latents, source, _, latent_ids, source_ids, _, noise = made
        return latents, source, reference, latent_ids, source_ids, reference_ids, noise

    call.replace("image_processor", pictures.watch)
    call.around("prepare_latents", keep_essentials)


def place_overviews(
    made: ReferenceTokens, ids: torch.Tensor, grids: Sequence[Grid], overviews: Mapping[int, Overview]
) -> ReferenceTokens:
    """The tokens of overviews at their places.

    As a further reference it lies beside the only one, as if both were one picture: to the right of a tall one, below
    another. The report of FLUX.1 Kontext (arXiv 2506.15742) has a second picture at 2 on axis 0, but the published
    weights saw one, and understand a second one best where it is stitched to the first (ComfyUI, pull request 9356).
    made: as the host has them where they are all the references that there are. ids: (N, 3) of the whole reference.
    """
    if {each.layout for each in overviews.values()} == {"spread"}:
        return ReferenceTokens(made.latents, spread_ids(ids, grids, overviews, MARK))
    ((rows, columns),) = grids
    beside = made.ids.clone()
    if rows > columns:
        beside[..., 2] += columns
    else:
        beside[..., 1] += rows
    return ReferenceTokens(made.latents, beside)
