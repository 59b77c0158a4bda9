"""How FLUX.2 pipelines are handed their images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ...preview import fit_reference


def arguments(
    pipe: Any, images: Sequence[Image.Image], mask: Image.Image | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """The inpainting pipeline takes the image that it paints into apart from further references; others one list."""
    if mask is None:
        return {"image": list(images) or None}
    return {"image": images[0], "mask_image": mask, "image_reference": list(images[1:]) or None}


def decode(pipe: Any, latents: torch.Tensor, inputs: Mapping[str, Any]) -> list[Image.Image]:
    """The pictures that latents (B, tokens, channels) come to, by the pipeline's own means, in the middle of a call.

    inputs: of that call, which say how large the pictures are. The VAE is asked by way of its class, for who watches
    this instance takes its decoding for the end of the call.
    """
    token = 2 * pipe.vae_scale_factor
    images = inputs.get("image")
    size = images[0].size if images else (pipe.default_sample_size * pipe.vae_scale_factor,) * 2
    usual = fit_reference(Image.new("L", size)).size  # as the pipeline scales a larger one down by itself
    width, height = (inputs.get(name) or side for name, side in zip(("width", "height"), usual, strict=True))
    grid = latents.new_empty(len(latents), 1, height // token, width // token)
    ids = pipe._prepare_latent_ids(grid).to(latents.device)
    with torch.no_grad():
        latents = pipe._unpack_latents_with_ids(latents, ids)
        mean, variance = (moment.view(1, -1, 1, 1) for moment in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
        spread = torch.sqrt(variance + pipe.vae.config.batch_norm_eps)
        latents = pipe._unpatchify_latents(latents * spread.to(latents) + mean.to(latents))
        decoded = type(pipe.vae).decode(pipe.vae, latents.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type="pil")
