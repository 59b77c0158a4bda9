"""FLUX.2 as the benchmark sees it."""

from collections.abc import Mapping
from typing import Any

from ..shape import Kind, Shape, Tokens, drawing, places, sizes


def build_flux2(shape: Shape) -> Any:
    """A `Flux2Transformer2DModel`."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        **sizes(shape),
        num_single_layers=shape.single_blocks,
        guidance_embeds=shape.guidance,
    )


def flux2_arguments(transformer: Any, shape: Shape, tokens: Tokens, mode: str | None) -> dict[str, Any]:
    """Also sets the attention processors that the mode needs. In the mode "cached", `kv_cache` has to be added."""
    import torch
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2AttnProcessor,
        Flux2KVAttnProcessor,
        Flux2KVParallelSelfAttnProcessor,
        Flux2ParallelSelfAttnProcessor,
    )

    image = tokens.output + (0 if mode == "cached" else tokens.references)
    processors = (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)
    if mode is not None:
        processors = (Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor)
    for module, processor in zip(
        (transformer.transformer_blocks, transformer.single_transformer_blocks), processors, strict=True
    ):
        for block in module:
            block.attn.set_processor(processor())
    draw, device = drawing(transformer), transformer.device
    arguments: dict[str, Any] = {
        "hidden_states": draw(1, image, shape.channels),
        "encoder_hidden_states": draw(1, tokens.text, shape.text_width),
        "img_ids": places(image, 4, device),
        "txt_ids": torch.zeros(tokens.text, 4, device=device),
        "timestep": torch.ones(1, device=device, dtype=transformer.dtype),
        "guidance": torch.ones(1, device=device, dtype=transformer.dtype) if shape.guidance else None,
    }
    if mode is not None:
        arguments["kv_cache_mode"] = mode
    if mode == "extract":
        arguments["num_ref_tokens"] = tokens.references
    return arguments


def flux2_flops(shape: Shape, tokens: Tokens, mode: str | None) -> int:
    """Every block costs 26 d^2 a token in its linear layers (q, k, v, out, and a gated MLP of width 3d) and 4d for each
    pair of a query and a key, d being the width.

    mode: None, everything attends to everything. "extract", references attend to themselves alone, the rest to all.
    "cached", text and output attend to all, and the references' keys and values are there already.
    """
    width, rest = shape.width, tokens.text + tokens.output
    seen = rest if mode == "cached" else tokens.total
    pairs = rest * tokens.total
    if mode is None:
        pairs = tokens.total**2
    elif mode == "extract":
        pairs += tokens.references**2
    blocks = (shape.double_blocks + shape.single_blocks) * (26 * width**2 * seen + 4 * width * pairs)
    embedded = 2 * width * (shape.channels * (seen - tokens.text) + shape.text_width * tokens.text)
    # FLUX.2 projects the references' tokens out as well, unless it knows which they are
    leaving = 2 * width * shape.channels * (tokens.output if mode else seen - tokens.text)
    timesteps = 2 if mode == "extract" else 1  # references have a modulation of their own at t = 0
    embedding = 2 * width * (256 + width) * (2 if shape.guidance else 1)
    modulation = 2 * width**2 * (6 * 2 + 3)
    if mode == "extract":  # but not for the text
        modulation += 2 * width**2 * (6 + 3)
    return blocks + embedded + leaving + timesteps * embedding + modulation + 2 * 2 * width**2


def shape_of(transformer: Any, token: int, text: int, steps: int) -> Shape:
    """The shape of a `Flux2Transformer2DModel`, called with tokens `token` pixels wide and `text` of the prompt."""
    config = transformer.config
    return Shape(
        FLUX2,
        heads=config.num_attention_heads,
        double_blocks=config.num_layers,
        single_blocks=config.num_single_layers,
        text_width=config.joint_attention_dim,
        encoder={},
        steps=steps,
        guidance=config.guidance_embeds,
        head_size=config.attention_head_dim,
        channels=config.in_channels,
        token=token,
        text=text,
    )


FLUX2 = Kind(build_flux2, flux2_arguments, flux2_flops, kv=True, whole=True)

_QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}


SHAPES: Mapping[str, Shape] = {
    "klein-4b": Shape(FLUX2, 24, 5, 20, 7_680, _QWEN3 | {"hidden_size": 2_560, "intermediate_size": 9_728}),
    "klein-9b": Shape(FLUX2, 32, 8, 24, 12_288, _QWEN3 | {"hidden_size": 4_096, "intermediate_size": 12_288}),
    "flux2-dev": Shape(FLUX2, 48, 8, 48, 15_360, {}, steps=28, guidance=True),
}
