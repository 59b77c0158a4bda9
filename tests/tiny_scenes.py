"""What the embedded model's recipe trains on, made here and small, and parts of it that train in a moment."""

import json

import numpy as np
import pytest
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from safetensors.numpy import save_file

from recipes.mini import base, export, model, vae
from recipes.mini.data import Assets


def make_assets() -> Assets:
    """Three objects (a disc, a bar, a ring) and two photographs."""
    y, x = np.mgrid[:128, :128] - 63.5
    shapes = [np.hypot(x, y) < 60, np.abs(x) < 20, np.abs(np.hypot(x, y) - 45) < 15]
    rng = np.random.default_rng(0)
    objects = np.zeros((3, 128, 128, 4), np.uint8)
    for rgba, shape in zip(objects, shapes, strict=True):
        rgba[shape] = [*rng.integers(0, 256, 3), 255]
    photos = rng.integers(0, 256, (2, 288, 288, 3), dtype=np.uint8)
    return Assets(objects, photos, ["disc", "bar", "ring"], np.array([0, 1, 2]), np.array([0, 1]))


def save_assets(assets: Assets, folder) -> None:
    """As `recipes.mini.data.build_assets` writes them."""
    tensors = {
        "objects": assets.objects,
        "photos": assets.photos,
        "object_split": assets.object_split,
        "photo_split": assets.photo_split,
    }
    save_file(tensors, folder / "assets.safetensors", metadata={"names": json.dumps(assets.object_names)})


def make_tiny_vae() -> AutoencoderKLFlux2:
    """`model.make_vae` with eight channels."""
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=model.LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=128,
        mid_block_add_attention=False,
    )


def make_tiny_transformer() -> Flux2Transformer2DModel:
    """`model.make_transformer` with a quarter of its width, and the blocks and heads that `teaching.COPYING` names."""
    return Flux2Transformer2DModel(
        in_channels=4 * model.LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=7,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=model.TEXT_WIDTH * len(model.TEXT_LAYERS),
        axes_dims_rope=(4, 4, 4, 4),
        rope_theta=200,
        guidance_embeds=False,
    )


def use_tiny_parts(patch: pytest.MonkeyPatch) -> None:
    """The recipe makes tiny parts: for what a run does, whatever it learns."""
    patch.setattr(vae, "make_vae", make_tiny_vae)
    for module in (base, export):
        patch.setattr(module, "make_transformer", make_tiny_transformer)
