"""An autoencoder that a user brings, such as a tiny one: every family takes it, and nothing of it is asked but what its
host asks."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny
from tiny import CASES, EACH_FAMILY, cases

from sparse_context import ReferenceCache, apply_sparse_context, last_selection
from sparse_context.families.call import find_decode
from sparse_context.pipelines.timing import timed

CHANNELS = 2  # of the tiny pipelines' latents


LEVELS = 3


def tiny_autoencoder(channels=CHANNELS):
    torch.manual_seed(3)
    widths = (4,) * LEVELS
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1,) * LEVELS,
        num_decoder_blocks=(1,) * LEVELS,
        latent_channels=channels,
    )


class OwnAutoencoder(torch.nn.Module):
    """What a user makes of TAEF2 for a pipeline: it encodes and decodes, and has a norm that changes nothing.

    It is no class of diffusers: its config is an object, and what it encodes has latents and no distribution, unless
    the host wants one.
    """

    def __init__(self, frames=False, **config):
        super().__init__()
        self.tiny = tiny_autoencoder()
        self.bn = torch.nn.BatchNorm2d(4 * CHANNELS, affine=False, eps=0.0)
        self.config = SimpleNamespace(batch_norm_eps=0.0, block_out_channels=(4,) * LEVELS, **config)
        self.frames, self.temperal_downsample = frames, [False] * (LEVELS - 1)

    @property
    def dtype(self):
        return self.tiny.dtype

    @property
    def device(self):
        return self.tiny.device

    def encode(self, pixels, return_dict=True):
        latents = self.tiny.encode(pixels[:, :, 0] if self.frames else pixels).latents
        latents = latents.unsqueeze(2) if self.frames else latents
        return SimpleNamespace(latents=latents, latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, latents, return_dict=True):
        pixels = self.tiny.decode(latents[:, :, 0] if self.frames else latents).sample
        return (pixels.unsqueeze(2) if self.frames else pixels,)


def brought(name):
    """The autoencoder for a family: diffusers' own where its host takes that as it is."""
    if name in ("kontext", "longcat"):
        return tiny_autoencoder(16 if name == "longcat" else CHANNELS)
    if name.startswith("qwen"):
        return OwnAutoencoder(True, z_dim=CHANNELS, latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS)
    return OwnAutoencoder()


@pytest.mark.parametrize("name", cases(*EACH_FAMILY))
def test_an_autoencoder_of_the_user_s_own_does_in_every_family(name):
    case = CASES[name]
    pipe, cache = case.build(), ReferenceCache()
    before = case.call(pipe, case.references())
    pipe.vae = brought(name)
    dense = case.call(pipe, case.references())
    assert dense.shape == before.shape and not torch.equal(dense, before)
    apply_sparse_context(pipe, keep=1.0)
    assert torch.equal(case.call(pipe, case.references()), dense)
    apply_sparse_context(pipe, keep=0.3)
    with timed(pipe) as times:
        sparse = case.call(pipe, case.references())
    assert times.encode > 0 and last_selection(pipe).kept == pytest.approx(0.3 * last_selection(pipe).total, abs=2)
    apply_sparse_context(pipe, keep=0.3, cache=cache)
    for _ in range(2):
        assert torch.equal(case.call(pipe, case.references()), sparse)
    assert cache.hits > 0
    apply_sparse_context(pipe, keep=0.3, overview=4)
    case.call(pipe, case.references())
    assert last_selection(pipe).overviews


def test_previews_are_decoded_by_it():
    pipe = CASES["klein"].build()
    pipe.vae = brought("klein")
    (preview,) = find_decode(pipe)(pipe, torch.randn(1, 64, 8), inputs={"width": 64, "height": 64})
    assert preview.size == (64, 64)


def test_other_weights_of_it_are_another_autoencoder():
    case = CASES["klein"]
    pipe, cache = case.build(), ReferenceCache()
    pipe.vae = brought("klein")
    apply_sparse_context(pipe, keep=0.3, cache=cache, selector="uniform")
    case.call(pipe, case.references())
    with torch.no_grad():
        pipe.vae.tiny.encoder.layers[0].bias.add_(1.0)
    changed = case.call(pipe, case.references())
    apply_sparse_context(pipe, keep=0.3, selector="uniform")
    assert torch.equal(case.call(pipe, case.references()), changed)
