"""Qwen-Image as the benchmark sees it."""

from typing import TYPE_CHECKING, Any

import torch

from ..shape import _draw, _sizes

if TYPE_CHECKING:
    from ..shape import Shape, Tokens


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
