"""FLUX.3 as the benchmark sees it."""

from collections.abc import Mapping
from typing import Any

from ..shape import Kind, Shape, Tokens, drawing, places, sizes


def build_flux3(shape: Shape) -> Any:
    """A `Flux3Transformer2DModel`; its per-mode blocks are the double ones of the shape, `guidance` is `flow_map`."""
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        **sizes(shape),
        num_single_layers=shape.single_blocks,
        cond_in_channels=shape.channels,
        flow_map=shape.guidance,
    )


def flux3_arguments(transformer: Any, shape: Shape, tokens: Tokens, mode: str | None) -> dict[str, Any]:
    """References come beside the output, not in one sequence with it."""
    import torch

    draw, device = drawing(transformer), transformer.device
    arguments = {
        "hidden_states": draw(1, tokens.output, shape.channels),
        "encoder_hidden_states": draw(1, tokens.text, shape.text_width),
        "img_ids": places(tokens.output, 4, device),
        "txt_ids": torch.zeros(tokens.text, 4, device=device),
        "timestep": torch.ones(1, device=device, dtype=transformer.dtype),
    }
    if tokens.references:
        arguments["image_cond_hidden_states"] = draw(1, tokens.references, shape.channels)
        arguments["image_cond_ids"] = places(tokens.references, 4, device)
    if shape.guidance:
        arguments["target_timestep"] = torch.zeros(1, device=device, dtype=transformer.dtype)
    return arguments


def flux3_flops(shape: Shape, tokens: Tokens, mode: str | None) -> int:
    """Every block costs 26 d^2 a token, as in FLUX.2, and 4d a pair: in the joint blocks everything attends to
    everything, in the per-mode ones text, output and references each to themselves alone. The modulations, 3d wide for
    the per-mode blocks and again for the joint ones, are computed for every token; so is that of the last norm.
    """
    width = shape.width
    apart = tokens.text**2 + tokens.output**2 + tokens.references**2
    blocks = (shape.double_blocks + shape.single_blocks) * 26 * width**2 * tokens.total
    attention = 4 * width * (shape.double_blocks * apart + shape.single_blocks * tokens.total**2)
    modulation = 2 * width**2 * (3 * 2 * tokens.total + 2 * tokens.output)
    embedded = 2 * width * (shape.channels * (tokens.output + tokens.references) + shape.text_width * tokens.text)
    leaving = 2 * width * shape.channels * tokens.output
    embedding = 2 * width * (256 + width) * (3 if shape.guidance else 2)  # text and references are at t = 0
    return blocks + attention + modulation + embedded + leaving + embedding


def shape_of(transformer: Any, token: int, text: int, steps: int) -> Shape:
    """The shape of a `Flux3Transformer2DModel`, called with tokens `token` pixels wide and `text` of the prompt."""
    config = transformer.config
    return Shape(
        FLUX3,
        heads=config.num_attention_heads,
        double_blocks=config.num_layers,
        single_blocks=config.num_single_layers,
        text_width=config.joint_attention_dim,
        encoder={},
        steps=steps,
        guidance=config.flow_map,
        head_size=config.attention_head_dim,
        channels=config.in_channels,
        token=token,
        text=text,
    )


FLUX3 = Kind(build_flux3, flux3_arguments, flux3_flops, alike=False)


SHAPES: Mapping[str, Shape] = {
    "flux3-klein": Shape(FLUX3, 24, 5, 28, 20_480, {}, steps=16, guidance=True, text=560),
}
