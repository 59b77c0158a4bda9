"""FLUX.1 Kontext and LongCat-Image as the benchmark sees them."""

from collections.abc import Mapping
from typing import Any

from ..shape import Kind, Shape, Tokens, drawing, joint_flops, places, sizes


def build_flux(shape: Shape) -> Any:
    """A `FluxTransformer2DModel`."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        **sizes(shape),
        num_single_layers=shape.single_blocks,
        pooled_projection_dim=shape.pooled,
        guidance_embeds=shape.guidance,
    )


def build_longcat(shape: Shape) -> Any:
    """A `LongCatImageTransformer2DModel`, which embeds neither a pooled prompt nor a guidance scale."""
    from diffusers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(
        **sizes(shape),
        num_single_layers=shape.single_blocks,
    )


def flux_arguments(transformer: Any, shape: Shape, tokens: Tokens, mode: str | None) -> dict[str, Any]:
    """References stand behind the output, in one sequence with it."""
    import torch

    draw, device, image = drawing(transformer), transformer.device, tokens.output + tokens.references
    arguments = {
        "hidden_states": draw(1, image, shape.channels),
        "encoder_hidden_states": draw(1, tokens.text, shape.text_width),
        "img_ids": places(image, 3, device),
        "txt_ids": torch.zeros(tokens.text, 3, device=device),
        "timestep": torch.ones(1, device=device, dtype=transformer.dtype),
    }
    if shape.pooled:
        arguments["pooled_projections"] = draw(1, shape.pooled)
    if shape.guidance:
        arguments["guidance"] = torch.ones(1, device=device, dtype=transformer.dtype)
    return arguments


def shape_of(transformer: Any, token: int, text: int, steps: int) -> Shape:
    """The shape of either transformer, called with tokens `token` pixels wide and `text` of the prompt."""
    config = transformer.config
    return Shape(
        LONGCAT if "LongCat" in type(transformer).__name__ else FLUX,
        heads=config.num_attention_heads,
        double_blocks=config.num_layers,
        single_blocks=config.num_single_layers,
        text_width=config.joint_attention_dim,
        encoder={},
        steps=steps,
        guidance=config.get("guidance_embeds", False),
        head_size=config.attention_head_dim,
        channels=config.in_channels,
        token=token,
        text=text,
        pooled=0 if "LongCat" in type(transformer).__name__ else config.pooled_projection_dim,
    )


FLUX = Kind(build_flux, flux_arguments, joint_flops)
LONGCAT = Kind(build_longcat, flux_arguments, joint_flops)


SHAPES: Mapping[str, Shape] = {
    "kontext": Shape(FLUX, 24, 19, 38, 4_096, {}, steps=28, guidance=True, channels=64, pooled=768),
    "longcat-edit": Shape(LONGCAT, 24, 10, 20, 3_584, {}, steps=50, channels=64, text=512 + 18 * 18),
}
