"""What the other examples share: the model inside the package, how it wants to be called, and its example images."""

from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

import sparse_context

PACKAGE = Path(sparse_context.__file__).parent
MODEL = next(PACKAGE.glob("*/weights/model_index.json")).parent
IMAGES = next(PACKAGE.glob("*/examples/scenes.json")).parent

CALL = {
    "height": 128,
    "width": 128,
    "num_inference_steps": 8,
    "max_sequence_length": 32,
    "text_encoder_out_layers": (2,),
    "guidance_scale": 1.0,
}
"""It is a tiny FLUX.2 klein: 128 x 128 pixels, and a text encoder of two layers."""


def load(lora: bool = True) -> Flux2KleinPipeline:
    """The embedded model, with the LoRA for dropped tokens that comes with it."""
    pipe = Flux2KleinPipeline.from_pretrained(MODEL, use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(MODEL, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    return pipe


def open_image(name: str) -> Image.Image:
    """One of the example images."""
    return Image.open(IMAGES / f"{name}.webp").convert("RGB")


def seed(number: int = 0) -> torch.Generator:
    """The image's noise."""
    return torch.Generator().manual_seed(number)
