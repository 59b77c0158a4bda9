"""Qwen-Image as the benchmark sees it."""

from collections.abc import Mapping
from typing import Any

from ..shape import Kind, Shape, Tokens, drawing, joint_flops, sizes


def build_qwen_image(shape: Shape) -> Any:
    """A `QwenImageTransformer2DModel`, which has no single blocks."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        **sizes(shape),
        out_channels=shape.channels // 4,  # of a latent pixel; a token has 2 x 2
    )
    rotary = transformer.pos_embed
    with torch.device("cpu"):  # its tables are no buffers: made on the meta device, they would stay there
        transformer.pos_embed = type(rotary)(rotary.theta, rotary.axes_dim, rotary.scale_rope)
    return transformer


def qwen_image_arguments(transformer: Any, shape: Shape, tokens: Tokens, mode: str | None) -> dict[str, Any]:
    """References stand behind the output. No mask of the text: pipelines pass none where no prompt is padded."""
    import torch

    draw, device = drawing(transformer), transformer.device
    return {
        "hidden_states": draw(1, tokens.output + tokens.references, shape.channels),
        "encoder_hidden_states": draw(1, tokens.text, shape.text_width),
        "img_shapes": [[*_strips(tokens.output), *_strips(tokens.references)]],
        "timestep": torch.ones(1, device=device, dtype=transformer.dtype),
    }


def _strips(count: int) -> list[tuple[int, int, int]]:
    """Shapes (1, 1, columns) of so many tokens in all; several, because the rotary tables end at 4096 places a side."""
    return [(1, 1, min(1024, count - start)) for start in range(0, count, 1024)]


def shape_of(transformer: Any, token: int, text: int, steps: int) -> Shape:
    """The shape of a `QwenImageTransformer2DModel`, called with tokens `token` pixels wide and `text` of the prompt."""
    config = transformer.config
    return Shape(
        QWEN_IMAGE,
        heads=config.num_attention_heads,
        double_blocks=config.num_layers,
        single_blocks=0,
        text_width=config.joint_attention_dim,
        encoder={},
        steps=steps,
        head_size=config.attention_head_dim,
        channels=config.in_channels,
        token=token,
        text=text,
    )


QWEN_IMAGE = Kind(build_qwen_image, qwen_image_arguments, joint_flops)


SHAPES: Mapping[str, Shape] = {
    "qwen-edit": Shape(QWEN_IMAGE, 24, 60, 0, 3_584, {}, steps=50, channels=64),
}
