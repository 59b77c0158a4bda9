"""From the inputs of the node to what it puts on the model, and the picture that it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from sparse_context import Selection
from sparse_context.overview import shrink
from sparse_context.preview import draw_selection
from sparse_context.selectors.cells import Grid
from sparse_context.selectors.masks import DROP, KEEP, NEITHER
from sparse_context.trained import Trained, combine

from .card import card
from .choosing import References, Settings, check, choose, needs_details
from .families import FAMILIES
from .latents import token_grid
from .patch import SparsePatch, reuses

NOTHING_TO_DRAW = (
    "No image is connected, so there is nothing to draw on. Tokens are chosen from the latents, by {}. Connect the "
    "images of the references to choose better, and to see here what is kept."
)


def read_settings(
    keep: float,
    keep_each: str,
    task: str,
    selector: str,
    coverage: str,
    overview: str,
    seed: int,
    phrases: str = "",
    text_model: str = "",
) -> Settings:
    """The settings that the node's widgets stand for."""
    share = None if coverage == "auto" else float(coverage.rstrip(" %")) / 100
    small: str | int | None = int(overview) if overview.isdigit() else overview
    small = None if small == "none" else small
    return Settings(keep, keep_each, task, selector, share, small, seed, phrases, text_model.strip())


def build(
    model: Any,
    settings: Settings,
    images: Mapping[str, torch.Tensor],
    masks: Mapping[str, Mapping[str, Any]],
    vae: Any,
    records: Sequence[Trained],
    tell: Callable[[str], None],
) -> tuple[SparsePatch, Image.Image]:
    """What goes on a ModelPatcher, and what the node shows.

    images: of the references, float (B, H, W, 3) in [0, 1]. masks: as the node Sparse Context Mask makes them. records:
    what the weights were trained for. tell: says a sentence to the user. Raises ValueError, in one sentence, for what
    does not fit.
    """
    name = model.model.model_config.unet_config.get("image_model")
    if name not in FAMILIES:
        raise ValueError(
            f"This model ({name or 'of an older kind'}) takes no references that Sparse Context knows: use it with "
            "FLUX.2, FLUX.1 Kontext or Qwen-Image-Edit."
        )
    family, transformer = FAMILIES[name], model.model.diffusion_model
    pixels = model.model.latent_format.spacial_downscale_ratio  # of a latent's place
    pictures = [image for image in images.values() if image is not None]
    crops = [crop(image, pixels) for image in pictures]
    references = References([as_bytes(image) for image in crops], read_masks(masks, pictures, pixels, tell))
    check(settings, references)

    def chooser(grids: Any, details: Any, kv: bool) -> Selection:
        return choose(settings, references, grids, details, combine(records, kv))

    patch = SparsePatch(chooser, family, transformer.patch_size, tell, needs_details(settings, references))
    if not crops:
        how = "their detail" if patch.needs_details else "chance" if settings.selector == "random" else "place"
        return patch, card(NOTHING_TO_DRAW.format(how))
    grids = [token_grid((image.shape[1] // pixels, image.shape[2] // pixels), patch.patch) for image in crops]
    selection = chooser(grids, None, reuses(model.model_options["transformer_options"]) is not None)
    if vae is not None:
        for i, kept in enumerate(selection.references):
            if kept.overview is not None:
                side = pixels * patch.patch
                small = vae.encode(shrink_image(crops[i], grids[i], side, kept.overview.factor))
                patch.coarse[i] = model.model.process_latent_in(small)
    return patch, draw_selection(selection)


def crop(image: torch.Tensor, pixels: int) -> torch.Tensor:
    """The part of a picture, (B, H, W, C), that ComfyUI's VAEs look at: its middle, of whole latents."""
    height, width = image.shape[1] // pixels * pixels, image.shape[2] // pixels * pixels
    if not height or not width:
        raise ValueError(
            f"An image is {image.shape[2]}x{image.shape[1]} pixels, less than one token: connect a larger one."
        )
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def as_bytes(image: torch.Tensor) -> list[np.ndarray]:
    """Pictures as selectors take them, uint8 (H, W, 3)."""
    values = (image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    if values.shape[-1] == 1:
        values = values.repeat(3, -1)
    return [np.ascontiguousarray(each) for each in values]


def read_masks(
    masks: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[torch.Tensor],
    pixels: int,
    tell: Callable[[str], None],
) -> dict[int, np.ndarray]:
    """What is painted on each reference, by its number from 0. What is to be dropped counts where masks disagree."""
    painted: dict[int, np.ndarray] = {}
    for each in sorted(filter(None, masks.values()), key=lambda each: not each["keeps"]):
        i = each["reference"] - 1
        mask = each["mask"].reshape(-1, *each["mask"].shape[-2:]).amax(dim=0)
        if not (mask > 0.5).any():  # such as the mask that Load Image gives where nothing was painted
            tell(f"The mask of reference {i + 1} marks nothing, so it changes nothing.")
            continue
        if pictures:
            mask = _fit_mask(mask, pictures, i, pixels)
        covered = mask.cpu().numpy() > 0.5
        below = painted.setdefault(i, np.full(covered.shape, NEITHER, np.uint8))
        if below.shape != covered.shape:
            raise ValueError(f"The masks of reference {i + 1} are of different sizes: connect masks of one size.")
        below[covered] = KEEP if each["keeps"] else DROP
    return painted


def _fit_mask(mask: torch.Tensor, pictures: Sequence[torch.Tensor], i: int, pixels: int) -> torch.Tensor:
    if i >= len(pictures):
        number = f"{len(pictures)} image{'' if len(pictures) == 1 else 's'}"
        raise ValueError(
            f"A mask is for reference {i + 1}, but you connected {number}: change the number in Sparse Context Mask."
        )
    high, wide = pictures[i].shape[1:3]
    if tuple(mask.shape) != (high, wide):
        raise ValueError(
            f"The mask of reference {i + 1} is {mask.shape[1]}x{mask.shape[0]} pixels, but its image is "
            f"{wide}x{high}: connect a mask of the image's own size."
        )
    return crop(mask[None, ..., None], pixels)[0, ..., 0]


def shrink_image(image: torch.Tensor, grid: Grid, side: int, factor: int) -> torch.Tensor:
    """The small picture of an overview, (B, h, w, 3), from its reference's, whose tokens are `side` pixels wide."""
    channels = image[..., :3].movedim(-1, 1)
    size = (grid[0] * side, grid[1] * side)
    if tuple(channels.shape[-2:]) != size:  # a last token that is cut
        channels = interpolate(channels, size, mode="bilinear")
    return shrink(channels, grid, factor).movedim(1, -1)
