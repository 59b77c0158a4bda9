"""What the benchmark knows of each kind of transformer: how it is built, what a forward takes, and what that costs.

    build(shape) -> transformer
    arguments(transformer, shape, tokens, mode) -> keyword arguments
    flops(shape, tokens, mode) -> int

To add a kind, write these and give it a line in `KINDS`. `build` makes a transformer of diffusers on the device that is
torch's default there. `arguments` are those of one forward with batch 1, random, on the transformer's own device and in
its dtype; the places of the tokens are any, because time depends on shapes alone. `flops` are those of that forward, a
multiply and an add being two; norms and activations are not counted. `mode` is the transformer's `kv_cache_mode`, and
None wherever a kind does not reuse keys and values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .flops import Tokens
    from .shapes import Shape


@dataclass(frozen=True)
class Kind:
    """One kind of transformer; the functions are described above.

    kv: whether it can reuse the references' keys and values, that is, be called in the modes "extract" and "cached".
    alike: whether all of its blocks cost the same, so that the time of a few says what the whole would take.
    """

    build: Callable[["Shape"], Any]
    arguments: Callable[[Any, "Shape", "Tokens", str | None], dict[str, Any]]
    flops: Callable[["Shape", "Tokens", str | None], int]
    kv: bool = False
    alike: bool = True


# FLUX.2 --------------------------------------------------------------------------------------------------------------


def build_flux2(shape: "Shape") -> Any:
    """A `Flux2Transformer2DModel`."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        **_sizes(shape),
        num_single_layers=shape.single_blocks,
        guidance_embeds=shape.guidance,
    )


def flux2_arguments(transformer: Any, shape: "Shape", tokens: "Tokens", mode: str | None) -> dict[str, Any]:
    """Also sets the attention processors that the mode needs. In the mode "cached", `kv_cache` has to be added."""
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
    draw, device = _draw(transformer), transformer.device
    arguments = {
        "hidden_states": draw(1, image, shape.channels),
        "encoder_hidden_states": draw(1, tokens.text, shape.text_width),
        "img_ids": _places(image, 4, device),
        "txt_ids": torch.zeros(tokens.text, 4, device=device),
        "timestep": torch.ones(1, device=device, dtype=transformer.dtype),
        "guidance": torch.ones(1, device=device, dtype=transformer.dtype) if shape.guidance else None,
    }
    if mode is not None:
        arguments["kv_cache_mode"] = mode
    if mode == "extract":
        arguments["num_ref_tokens"] = tokens.references
    return arguments


def flux2_flops(shape: "Shape", tokens: "Tokens", mode: str | None) -> int:
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


# FLUX.1 and LongCat-Image --------------------------------------------------------------------------------------------


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


# Qwen-Image ----------------------------------------------------------------------------------------------------------


def build_qwen_image(shape: "Shape") -> Any:
    """A `QwenImageTransformer2DModel`, which has no single blocks."""
    from diffusers import QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        **_sizes(shape),
        out_channels=shape.channels // 4,  # of a latent pixel; a token has 2 x 2
    )
    rotary = transformer.pos_embed
    with torch.device("cpu"):  # its tables are no buffers: made on the meta device, they would stay there
        transformer.pos_embed = type(rotary)(rotary.theta, rotary.axes_dim, rotary.scale_rope)
    return transformer


def qwen_image_arguments(transformer: Any, shape: "Shape", tokens: "Tokens", mode: str | None) -> dict[str, Any]:
    """References stand behind the output. No mask of the text, as the host passes none where no prompt is padded."""
    draw, device = _draw(transformer), transformer.device
    return {
        "hidden_states": draw(1, tokens.output + tokens.references, shape.channels),
        "encoder_hidden_states": draw(1, tokens.text, shape.text_width),
        "img_shapes": [[*_strips(tokens.output), *_strips(tokens.references)]],
        "timestep": torch.ones(1, device=device, dtype=transformer.dtype),
    }


def _strips(count: int) -> list[tuple[int, int, int]]:
    """Shapes (1, 1, columns) of so many tokens in all; several, because the rotary tables end at 4096 places a side."""
    return [(1, 1, min(1024, count - start)) for start in range(0, count, 1024)]


# FLUX.3 --------------------------------------------------------------------------------------------------------------


def build_flux3(shape: "Shape") -> Any:
    """A `Flux3Transformer2DModel`; its per-mode blocks are the double ones of the shape, `guidance` is `flow_map`."""
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        **_sizes(shape),
        num_single_layers=shape.single_blocks,
        cond_in_channels=shape.channels,
        flow_map=shape.guidance,
    )


def flux3_arguments(transformer: Any, shape: "Shape", tokens: "Tokens", mode: str | None) -> dict[str, Any]:
    """References come beside the output, not in one sequence with it."""
    draw, device = _draw(transformer), transformer.device
    arguments = {
        "hidden_states": draw(1, tokens.output, shape.channels),
        "encoder_hidden_states": draw(1, tokens.text, shape.text_width),
        "img_ids": _places(tokens.output, 4, device),
        "txt_ids": torch.zeros(tokens.text, 4, device=device),
        "timestep": torch.ones(1, device=device, dtype=transformer.dtype),
    }
    if tokens.references:
        arguments["image_cond_hidden_states"] = draw(1, tokens.references, shape.channels)
        arguments["image_cond_ids"] = _places(tokens.references, 4, device)
    if shape.guidance:
        arguments["target_timestep"] = torch.zeros(1, device=device, dtype=transformer.dtype)
    return arguments


def flux3_flops(shape: "Shape", tokens: "Tokens", mode: str | None) -> int:
    """Every block costs 26 d^2 a token, as in FLUX.2, and 4d a pair: in the joint blocks everything attends to
    everything, in the per-mode ones text, output and references each to themselves alone. The modulations, 3d wide for
    the per-mode blocks and again for the joint ones, are computed for every token; so is that of the last norm.
    """
    width = shape.width
    own = tokens.text**2 + tokens.output**2 + tokens.references**2
    blocks = (shape.double_blocks + shape.single_blocks) * 26 * width**2 * tokens.total
    attention = 4 * width * (shape.double_blocks * own + shape.single_blocks * tokens.total**2)
    modulation = 2 * width**2 * (3 * 2 * tokens.total + 2 * tokens.output)
    embedded = 2 * width * (shape.channels * (tokens.output + tokens.references) + shape.text_width * tokens.text)
    leaving = 2 * width * shape.channels * tokens.output
    embedding = 2 * width * (256 + width) * (3 if shape.guidance else 2)  # text and references are at t = 0
    return blocks + attention + modulation + embedded + leaving + embedding


# ---------------------------------------------------------------------------------------------------------------------


def _sizes(shape: "Shape") -> dict[str, int]:
    """What the constructors of all kinds call by the same names."""
    return {
        "in_channels": shape.channels,
        "num_layers": shape.double_blocks,
        "attention_head_dim": shape.head_size,
        "num_attention_heads": shape.heads,
        "joint_attention_dim": shape.text_width,
    }


def _draw(transformer: Any) -> Callable[..., torch.Tensor]:
    """(*sizes) -> normal noise that is the same in every forward."""
    generator = torch.Generator(transformer.device).manual_seed(0)
    return partial(torch.randn, generator=generator, device=transformer.device, dtype=transformer.dtype)


def _places(count: int, axes: int, device: torch.device) -> torch.Tensor:
    """Position ids (count, axes): one column of tokens."""
    ids = torch.zeros(count, axes, device=device)
    ids[:, 2] = torch.arange(count, device=device)
    return ids


KINDS: Mapping[str, Kind] = {
    "flux2": Kind(build_flux2, flux2_arguments, flux2_flops, kv=True),
    "flux": Kind(build_flux, flux_arguments, flux_flops),
    "longcat": Kind(build_longcat, flux_arguments, flux_flops),
    "qwen_image": Kind(build_qwen_image, qwen_image_arguments, flux_flops),
    "flux3": Kind(build_flux3, flux3_arguments, flux3_flops, alike=False),
}
