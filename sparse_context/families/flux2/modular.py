"""FLUX.2 as modular pipelines: dev, klein and klein base.

The packed tokens (B, N, C) and position ids (B, N, 4) of all references stand in the state, next to their pixels, after
the step that prepares them. `apply_sparse_context` cuts them there; or a pipeline is built with `SparseContextStep`
among its blocks, and then takes `keep` and what goes with it in every call:

    blocks = insert_sparse_context(Flux2KleinAutoBlocks())
    pipe = blocks.init_pipeline("black-forest-labs/FLUX.2-klein-4B")
    pipe.load_components(dtype=torch.bfloat16)
    outputs = pipe(image=[cat, room], prompt="the cat in the room", keep=0.2, output=["images", "selection"])
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from diffusers import ModularPipelineBlocks
from diffusers.modular_pipelines.flux2.before_denoise import Flux2PrepareImageLatentsStep
from diffusers.modular_pipelines.flux2.encoders import Flux2VaeEncoderStep
from diffusers.modular_pipelines.flux2.inputs import Flux2ProcessImagesInputStep
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from ...config import SparseContextConfig
from ...context import Call, SparseContext
from ...large import Large
from ...overview import Overview, shrink
from ...preview import MAX_AREA
from ...selection import Pixels, Selection
from ...tokens import ReferenceTokens
from ..modular import attach_step, enlarge, insert_behind
from ..pictures import mask_of, to_uint8
from .drop import place_overviews

DIALS: dict[str, tuple[Any, str]] = {
    "keep": (None, "Ratio, count or 'auto', or a list with one each."),
    "selector": (None, "What makes a token matter; the task decides where it is None."),
    "task": (None, "'edit', 'global', 'subject' or 'auto', or a list with one each."),
    "overview": (None, "A small copy: factor, 'auto', 'trained' or None."),
    "phrases": (None, "What you mean in each reference, which a model finds."),
    "text_model": (str, "The model that finds phrases."),
    "overview_layout": (str, "'spread' or 'reference'; None: as trained."),
    "reference_max_pixels": (int, "Take sharp tokens from larger references."),
    "coverage": (float, "Share of the kept tokens that is spread evenly."),
    "share": (str, "'equal' or 'joint': whether tokens of all references compete."),
    "floor": (int, "The least number of tokens of each reference."),
    "multiple_of": (int, "Round the total up to a multiple."),
    "merge": (float, "Share of the kept that are averages."),
    "mass": (float, "Share of the scores that keep='auto' holds."),
    "psnr": (float, "What keep='auto' reaches with an overview, in dB."),
    "seed": (int, "Of the selectors' own random numbers."),
}
"""The settings of a call with a `SparseContextStep`, those of `SparseContextConfig`: type and description."""


def attach(pipe: Any, call: Call) -> None:
    """Run a step that cuts the reference tokens behind the block that prepares them."""
    if _has_step(pipe._blocks):
        raise ValueError(
            f"This {type(pipe).__name__} has a SparseContextStep among its blocks, which drops tokens already: "
            "pass keep in the call, or build the pipeline without that step"
        )
    attach_step(call, "image_latent_ids", lambda state: _keep_essentials(pipe, state, call))


def insert_sparse_context(blocks: Any) -> Any:
    """A copy of FLUX.2's blocks with a `SparseContextStep` in its place. Raises ValueError where there is none."""
    if _has_step(blocks):
        raise ValueError(f"These {type(blocks).__name__} have a SparseContextStep already: insert it once.")
    extended = insert_behind(deepcopy(blocks), "image_latent_ids", SparseContextStep())
    if not _has_step(extended):
        raise ValueError(
            f"These {type(blocks).__name__} have no step that makes image_latent_ids: pass FLUX.2's blocks, such as "
            "Flux2KleinAutoBlocks()."
        )
    return extended


class SparseContextStep(ModularPipelineBlocks):
    """A block for behind the one that makes `image_latent_ids`: keeps the reference tokens that matter, drops the rest.

    A call then takes `keep` and all other settings of a `SparseContextConfig`, and leaves what was kept in the state as
    `selection`.
    """

    model_name = "flux2"

    @property
    def description(self) -> str:
        return (
            "Sparse Context: keeps the reference tokens that matter and drops or averages the others. "
            "Insert it behind the step that prepares the image latents."
        )

    @property
    def inputs(self) -> list[InputParam]:
        default = SparseContextConfig()
        return [
            *(
                InputParam(name, default=getattr(default, name), type_hint=hint, description=description)
                for name, (hint, description) in DIALS.items()
            ),
            InputParam("image", description="The references, for masks and alpha channels."),
            InputParam("condition_images", type_hint=list[torch.Tensor], description="Their pixels, preprocessed."),
            InputParam("image_latents", type_hint=torch.Tensor, description="Packed reference tokens (B, N, C)."),
            InputParam("image_latent_ids", type_hint=torch.Tensor, description="Their position ids (B, N, 4)."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("image_latents", type_hint=torch.Tensor, description="The kept reference tokens."),
            OutputParam("image_latent_ids", type_hint=torch.Tensor, description="The position ids of the kept tokens."),
            OutputParam("selection", type_hint=Selection, description="What was kept, and by what."),
        ]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        arguments = {name: state.get(name) for name in DIALS}
        unset = [name for name, value in arguments.items() if value is None and name != "overview"]  # where None is one
        config = SparseContextConfig(**{name: value for name, value in arguments.items() if name not in unset})
        call = Call(components, SparseContext(config, attach))
        if state.get("image_latent_ids") is not None:
            _keep_essentials(components, state, call)
        state.set("selection", call.selection)
        return components, state


def _own_step(blocks: Any, cls: type) -> Any:
    """The first step of a class among a pipeline's blocks, at any depth, or diffusers' own where there is none."""
    return next((block for block in _all_blocks(blocks) if isinstance(block, cls)), None) or cls()


def _all_blocks(blocks: Any) -> Iterator[Any]:
    for block in blocks.sub_blocks.values():
        yield block
        yield from _all_blocks(block)


def _has_step(blocks: Any) -> bool:
    return isinstance(blocks, SparseContextStep) or any(map(_has_step, blocks.sub_blocks.values()))


def _keep_essentials(components: Any, state: PipelineState, call: Call) -> None:
    """Cut the reference tokens and position ids in the state."""
    tokens = ReferenceTokens(state.image_latents, state.image_latent_ids)
    images, pixels = state.get("image"), state.get("condition_images")  # no pixels where latents were passed
    images = images if isinstance(images, list) else [images]

    def picture(i: int, mask: np.ndarray | None) -> np.ndarray | None:
        if pixels is None:
            return None
        seen = to_uint8(pixels[i])[0]
        alpha = mask_of(images[i], mask, i, MAX_AREA)
        if alpha is None:
            return seen
        mask_state = PipelineState()
        mask_state.set("image", alpha)
        Flux2ProcessImagesInputStep()(components, mask_state)  # the same scaling and crop as the picture had
        return np.concatenate([seen, to_uint8(mask_state.condition_images[0])[0, ..., :1]], axis=-1)

    if pixels is None:
        grids = _grids(tokens.ids)
    else:  # without a look at the ids, which are on the device: that would wait for all that it does before
        side = 2 * components.vae_scale_factor
        grids = [(image.shape[-2] // side, image.shape[-1] // side) for image in pixels]

    def encode(parts: Sequence[torch.Tensor]) -> ReferenceTokens:
        other = PipelineState()  # in which they are all the references that there are
        for name in ("batch_size", "num_images_per_prompt", "generator"):
            other.set(name, state.get(name))
        other.set("condition_images", [*parts])
        for cls in (Flux2VaeEncoderStep, Flux2PrepareImageLatentsStep):
            _own_step(components.blocks, cls)(components, other)
        return ReferenceTokens(other.image_latents, other.image_latent_ids)

    def encode_overviews(overviews: Mapping[int, Overview], tokens: ReferenceTokens) -> ReferenceTokens:
        made = encode([shrink(pixels[i], grids[i], each.factor) for i, each in overviews.items()])
        return place_overviews(made, tokens.ids, grids, overviews)

    def enlarge_reference(i: int, shown: Pixels, max_pixels: int) -> Large | None:
        if pixels is None:
            return None
        processor = components.image_processor
        preprocess, latents = processor.preprocess, lambda parts: encode(parts).latents
        return enlarge(images[i], pixels[i], shown, grids[i], max_pixels, processor, preprocess, latents)

    kept = call.keep(lambda: tokens, grids, picture, encode_overviews=encode_overviews, enlarge=enlarge_reference)
    state.set("image_latents", kept.latents)
    state.set("image_latent_ids", kept.ids)


def _grids(ids: torch.Tensor) -> list[tuple[int, int]]:
    """(rows, columns) of each reference from the position ids (B, N, 4), in which axis 0 tells references apart."""
    ids = ids[0].cpu()
    _, counts = torch.unique_consecutive(ids[:, 0], return_counts=True)
    sizes = [reference[:, 1:3].amax(dim=0) + 1 for reference in ids.split(counts.tolist())]
    return [(int(rows), int(columns)) for rows, columns in sizes]
