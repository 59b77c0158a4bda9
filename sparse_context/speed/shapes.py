"""The shapes of the real models, so that their time can be measured without their weights.

Time and memory depend on shapes alone; what comes out of random weights means nothing. Sources: the configs published
with each model (black-forest-labs/FLUX.2-klein-4B, FLUX.2-klein-9B, FLUX.2-dev; Qwen/Qwen3-4B, Qwen/Qwen3-8B), and the
defaults of diffusers' `Flux2Transformer2DModel` and `AutoencoderKLFlux2`, which are those of FLUX.2-dev.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """A transformer of the FLUX.2 kind, and what it runs with.

    `text_width` is that of the prompt's embeddings: three layers of the text encoder side by side. `channels` of a
    token. `token` pixels a side, `text` tokens of the prompt, and `steps` that the model is called with. `encoder` has
    the sizes of its text encoder, a Qwen3, or is empty where this project does not build it. `guidance`: whether the
    guidance scale is embedded like a timestep.
    """

    heads: int
    double_blocks: int
    single_blocks: int
    text_width: int
    encoder: Mapping[str, int]
    steps: int = 4
    guidance: bool = False
    head_size: int = 128
    channels: int = 128
    token: int = 16
    text: int = 512

    @property
    def width(self) -> int:
        return self.heads * self.head_size


_QWEN3 = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
          "vocab_size": 151_936}  # fmt: skip

SHAPES: Mapping[str, Shape] = {
    "klein-4b": Shape(24, 5, 20, 7_680, _QWEN3 | {"hidden_size": 2_560, "intermediate_size": 9_728}),
    "klein-9b": Shape(32, 8, 24, 12_288, _QWEN3 | {"hidden_size": 4_096, "intermediate_size": 12_288}),
    "flux2-dev": Shape(48, 8, 48, 15_360, {}, steps=28, guidance=True),
}


def shape_of(transformer: Any, token: int, text: int, steps: int) -> Shape:
    """The shape of a `Flux2Transformer2DModel`, called with tokens `token` pixels wide and `text` of the prompt."""
    config = transformer.config
    return Shape(
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


def find_shape(name: str) -> Shape:
    """The shape called `name`. Raises ValueError that names all."""
    if name not in SHAPES:
        raise ValueError(f"random-weights is {name!r}: choose {', '.join(SHAPES)}.")
    return SHAPES[name]


def build_transformer(shape: Shape, device: torch.device, dtype: torch.dtype, blocks: int | None = None) -> Any:
    """A transformer of this shape with random weights, drawn on the device; `blocks` of each kind in place of all."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(
            in_channels=shape.channels,
            num_layers=shape.double_blocks if blocks is None else blocks,
            num_single_layers=shape.single_blocks if blocks is None else blocks,
            attention_head_dim=shape.head_size,
            num_attention_heads=shape.heads,
            joint_attention_dim=shape.text_width,
            guidance_embeds=shape.guidance,
        )
    return draw_weights(transformer, device, dtype)


def build_pipeline(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of this shape with random weights. Without an `encoder` it has no text encoder: pass `prompt_embeds`.

    Its tokeniser is the embedded model's, filled up to the same number of tokens.
    """
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from ..mini import WEIGHTS

    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
        encoder = Qwen3ForCausalLM(Qwen3Config(**shape.encoder)) if shape.encoder else None
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": draw_weights(vae, device, dtype).eval(),
        "text_encoder": None if encoder is None else draw_weights(encoder, device, dtype).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(WEIGHTS / "tokenizer") if shape.encoder else None,
        "transformer": build_transformer(shape, device, dtype).eval(),
    }
    return Flux2Pipeline(**parts) if shape.guidance else Flux2KleinPipeline(**parts, is_distilled=True)


@torch.no_grad()
def draw_weights(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Give a module on the meta device real weights: matrices from N(0, 0.02), norms 1, biases and statistics 0 and 1.

    Nothing passes through the CPU, and there is never a second copy.
    """
    rotary = {name for name, _ in module.named_buffers() if name.endswith("inv_freq")}
    torch.nn.Module.to(module, dtype)  # not diffusers' own, which warns of weights that nobody has drawn yet
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.02, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    for name, buffer in module.named_buffers():
        buffer.fill_(1 if name in rotary or name.endswith("running_var") else 0)
    return module
