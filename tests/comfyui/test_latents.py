"""Latents: their grid, their small copies and their detail."""

import numpy as np
import pytest
import torch
from sparse_context_nodes.latents import average, detail, is_still, token_grid


@pytest.mark.parametrize(
    ("size", "patch", "grid"), [((64, 48), 1, (64, 48)), ((64, 48), 2, (32, 24)), ((63, 47), 2, (32, 24))]
)
def test_the_token_grid_counts_a_last_token_whole(size, patch, grid):
    assert token_grid(size, patch) == grid


def test_averages_are_means_of_squares():
    latents = torch.arange(64.0).reshape(1, 1, 8, 8)
    small = average(latents, patch=2, packed=False, factor=2)
    assert small.shape == (1, 1, 4, 4)
    assert small[0, 0, 0, 0] == latents[0, 0, :2, :2].mean()
    assert small[0, 0, 3, 1] == latents[0, 0, 6:, 2:4].mean()


def test_averages_have_whole_tokens_where_the_factor_does_not_divide():
    assert average(torch.zeros(2, 16, 12, 10), patch=2, packed=False, factor=4).shape == (2, 16, 4, 4)
    assert average(torch.zeros(2, 16, 1, 12, 10), patch=2, packed=False, factor=4).shape == (2, 16, 1, 4, 4)


def test_averages_of_packed_latents_are_those_of_the_places_in_them():
    """FLUX.2 packs 2 x 2 places into channels. Averaged place by place, a ramp stays a ramp."""
    places = torch.arange(16.0)[None, None, :, None].expand(1, 1, 16, 16).contiguous()
    packed = torch.nn.functional.pixel_unshuffle(places, 2)
    small = average(packed, patch=1, packed=True, factor=4)
    assert small.shape == (1, 4, 2, 2)
    unpacked = torch.nn.functional.pixel_shuffle(small, 2)
    assert unpacked[0, 0, :, 0].tolist() == [1.5, 5.5, 9.5, 13.5]


def test_averages_keep_the_dtype_and_the_device():
    assert average(torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16), 1, False, 2).dtype == torch.bfloat16


@pytest.mark.parametrize(("channels", "patch", "packed"), [(128, 1, True), (16, 2, False)])
def test_detail_is_high_where_latents_vary_and_nothing_where_they_do_not(channels, patch, packed):
    latents = torch.zeros(1, channels, 16 * patch, 16 * patch)
    latents[..., : 4 * patch, : 4 * patch] = torch.randn(
        1, channels, 4 * patch, 4 * patch, generator=torch.Generator().manual_seed(0)
    )
    scores = detail(latents, patch, packed)
    assert scores.shape == (16, 16)
    assert scores.dtype == np.float32
    assert scores.min() == 0 and scores.max() < 1
    assert scores[:4, :4].min() > 0.5
    assert (scores[8:, 8:] == 0).all()


def test_detail_is_of_the_batch():
    first, second = torch.zeros(1, 16, 16, 16), torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    both = detail(torch.cat([first, second]), 2, False)
    assert (both > detail(first, 2, False)).all()
    assert (both < detail(second, 2, False)).all()


def test_a_video_is_told_from_a_picture():
    assert is_still(torch.zeros(1, 16, 8, 8))
    assert is_still(torch.zeros(1, 16, 1, 8, 8))
    assert not is_still(torch.zeros(1, 16, 2, 8, 8))
