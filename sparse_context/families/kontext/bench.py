"""FLUX.1 Kontext and LongCat-Image as the benchmark sees them."""

from typing import TYPE_CHECKING, Any

import torch

from ..shape import _draw, _places, _sizes

if TYPE_CHECKING:
    from ..shape import Shape, Tokens


def build_flux(shape: "Shape") -> Any:
    """A `FluxTransformer2DModel`."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        **_sizes(shape),
        num_single_layers=shape.single_blocks,
        pooled_projection_dim=shape.pooled,
        guidance_embeds=shape.guidance,
    )


def build_longcat(shape: "Shape") -> Any:
    """A `LongCatImageTransformer2DModel`, which embeds neither a pooled prompt nor a guidance scale."""
    from diffusers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(
        **_sizes(shape),
        num_single_layers=shape.single_blocks,
    )


def flux_arguments(transformer: Any, shape: "Shape", tokens: "Tokens", mode: str | None) -> dict[str, Any]:
    """References stand behind the output, in one sequence with it."""
    draw, device, image = _draw(transformer), transformer.device, tokens.output + tokens.references
    arguments = {
        "hidden_states": draw(1, image, shape.channels),
        "encoder_hidden_states": draw(1, tokens.text, shape.text_width),
        "img_ids": _places(image, 3, device),
        "txt_ids": torch.zeros(tokens.text, 3, device=device),
        "timestep": torch.ones(1, device=device, dtype=transformer.dtype),
    }
    if shape.pooled:
        arguments["pooled_projections"] = draw(1, shape.pooled)
    if shape.guidance:
        arguments["guidance"] = torch.ones(1, device=device, dtype=transformer.dtype)
    return arguments


def flux_flops(shape: "Shape", tokens: "Tokens", mode: str | None) -> int:
    """Every block costs 24 d^2 a token (q, k, v, out, and an MLP of width 4d) and 4d a pair. Each has a modulation of
    its own: 6d wide for each of the two streams of a double block, and 3d in a single one. Qwen-Image has double blocks
    alone and is the same otherwise.
    """
    width, image = shape.width, tokens.output + tokens.references
    blocks = (shape.double_blocks + shape.single_blocks) * (24 * width**2 * tokens.total + 4 * width * tokens.total**2)
    modulation = 2 * width**2 * (6 * 2 * shape.double_blocks + 3 * shape.single_blocks)
    embedded = 2 * width * (shape.channels * image + shape.text_width * tokens.text)
    leaving = 2 * width * shape.channels * image  # the references' tokens as well
    embedding = 2 * width * (256 + width) * (2 if shape.guidance else 1)
    if shape.pooled:
        embedding += 2 * width * (shape.pooled + width)
    return blocks + modulation + embedded + leaving + embedding + 2 * 2 * width**2
