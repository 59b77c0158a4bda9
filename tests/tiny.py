"""Tiny real pipelines, built in code, and one way to call them all.

A new family joins the suite of test_families.py by adding one entry to `CASES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

OUTPUT = (64, 64)  # height and width of what is made: 8 x 8 tokens
TOKEN = 8  # pixels a side
TEXT_LENGTH = 12
TEXT_LAYERS = (1, 2)
TEXT_WIDTH = 16
STEPS = 2


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with smooth colours, hard edges and some noise, so that every selector has something to say."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 97 * 2.0], -1)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def tiny_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        sample_size=64,
        mid_block_add_attention=False,
    )


def tiny_transformer(guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH * len(TEXT_LAYERS),
        axes_dims_rope=(4, 4, 4, 4),
        rope_theta=100,
        timestep_guidance_channels=32,
        guidance_embeds=guidance_embeds,
    )


@cache
def tiny_tokenizer() -> Qwen2Tokenizer:
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["the cat of image 1 in the room"] * 4, vocab_size=300)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def tiny_text_encoder() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def build_flux2(cls: type, **config):
    """A pipeline of `cls` with random weights, the same at every call."""
    torch.manual_seed(0)
    dev = cls is Flux2Pipeline
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=None if dev else tiny_text_encoder(),
        tokenizer=None if dev else tiny_tokenizer(),
        transformer=tiny_transformer(guidance_embeds=dev),
        **config,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(batch: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TEXT_LENGTH, TEXT_WIDTH * len(TEXT_LAYERS), generator=generator)


def _call(pipe, prompts: int, **kwargs) -> torch.Tensor:
    kwargs.setdefault("generator", torch.Generator().manual_seed(7))
    if hasattr(type(pipe), "do_classifier_free_guidance"):
        kwargs.setdefault("guidance_scale", 1.0)
    return pipe(
        prompt_embeds=embeds(prompts), num_inference_steps=STEPS, output_type="latent", **kwargs
    ).images


def call_klein(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    """Latents of a call. References in order; kwargs go to the pipeline."""
    height, width = OUTPUT
    return _call(pipe, prompts, image=references or None, height=height, width=width, **kwargs)


def call_inpaint(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    """The first reference is the source, the others go to `image_reference`."""
    source = references[0]
    size = source.size if isinstance(source, Image.Image) else OUTPUT
    mask = Image.fromarray(np.pad(np.full((size[1] // 2, size[0] // 2), 255, np.uint8), (size[1] // 4, size[0] // 4)))
    rest = references[1:]
    return _call(pipe, prompts, image=source, mask_image=mask, strength=1.0,
                 image_reference=(rest if len(rest) > 1 else rest[0]) if rest else None, **kwargs)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kind of pipeline.

    sizes: (width, height) of the references to try. references_first: whether the transformer sees them before the
    output's tokens. without_references: whether a call can do without any. guidance: a scale that takes a second forward.
    """

    build: Callable
    call: Callable
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 64), (64, 120))
    references_first: bool = False
    without_references: bool = True
    guidance: float | None = None

    def references(self, count: int | None = None) -> list[Image.Image]:
        count = len(self.sizes) if count is None else count
        return [picture(*self.sizes[i % len(self.sizes)], seed=i) for i in range(count)]

    def tokens(self, references: list) -> list[int]:
        return [(r.width // TOKEN) * (r.height // TOKEN) for r in references]


CASES = {
    "flux2-dev": Case(lambda: build_flux2(Flux2Pipeline), call_klein),
    "klein": Case(lambda: build_flux2(Flux2KleinPipeline), call_klein, guidance=4.0),
    "klein-kv": Case(lambda: build_flux2(Flux2KleinKVPipeline), call_klein, references_first=True),
    # Several reference pictures of an inpainting call have one size
    "klein-inpaint": Case(
        lambda: build_flux2(Flux2KleinInpaintPipeline), call_inpaint, ((64, 64), (96, 72), (96, 72)),
        without_references=False, guidance=4.0,
    ),
}  # fmt: skip
