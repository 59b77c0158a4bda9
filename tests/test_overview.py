"""Overviews: their pixels, positions, and where they are wrong."""

import numpy as np
import pytest
import torch

from sparse_context.overview import (
    Overview,
    coarser,
    enlarge,
    overview_grid,
    overview_ids,
    residual,
    shrink,
    shrink_picture,
    spread_ids,
)


def grid_ids(rows, columns, step=1.0, first=(10.0, 0.0, 0.0)):
    """Position ids (rows * columns, 3) as hosts make them: an axis that is constant, rows and columns."""
    ids = torch.empty(rows, columns, 3)
    ids[..., 0] = first[0]
    ids[..., 1] = first[1] + step * torch.arange(rows)[:, None]
    ids[..., 2] = first[2] + step * torch.arange(columns)
    return ids.flatten(0, 1)


@pytest.mark.parametrize(
    ("grid", "factor", "coarse"),
    [((16, 16), 4, (4, 4)), ((16, 24), 2, (8, 12)), ((9, 5), 4, (3, 2)), ((3, 1), 8, (1, 1))],
)
def test_an_overview_has_a_token_for_each_block_of_cells(grid, factor, coarse):
    assert overview_grid(grid, factor) == coarse
    pixels = torch.zeros(2, 3, grid[0] * 8, grid[1] * 8)
    assert shrink(pixels, grid, factor).shape == (2, 3, coarse[0] * 8, coarse[1] * 8)
    assert overview_ids(grid_ids(*grid), grid, factor).shape == (coarse[0] * coarse[1], 3)


def test_its_pixels_are_means():
    pixels = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    means = pixels.unflatten(-1, (16, 4)).unflatten(-3, (8, 4)).mean((-1, -3))
    assert torch.allclose(shrink(pixels, (4, 8), 4), means, atol=1e-6)


def test_what_a_last_cell_lacks_is_reflected():
    """Nine rows by a factor of 4 lack three; their pixels are those before the border, mirrored."""
    pixels = torch.arange(72.0).view(1, 1, 72, 1).expand(1, 1, 72, 32)
    last = shrink(pixels, (9, 4), 4)[0, 0, 16:, 0]
    padded = torch.cat([torch.arange(72.0), torch.arange(70.0, 46.0, -1)])
    assert torch.equal(last, padded[64:].unflatten(0, (8, 4)).mean(-1))


def test_each_token_lies_in_the_middle_of_the_cells_that_it_covers():
    whole = grid_ids(8, 12)
    middles = whole.unflatten(0, (8, 12)).unflatten(1, (3, 4)).unflatten(0, (2, 4)).mean((1, 3)).flatten(0, 1)
    assert torch.equal(overview_ids(whole, (8, 12), 4), middles)
    assert overview_ids(whole, (8, 12), 4)[0].tolist() == [10.0, 1.5, 1.5]


def test_positions_follow_the_scale_and_the_first_cell_of_the_host():
    ids = overview_ids(grid_ids(4, 4, step=0.5, first=(-1.0, 3.0, 2.0)), (4, 4), 2)
    assert ids.tolist() == [[-1.0, 3.25, 2.25], [-1.0, 3.25, 3.25], [-1.0, 4.25, 2.25], [-1.0, 4.25, 3.25]]


def test_a_cell_that_is_cut_lies_where_the_whole_one_would():
    assert overview_ids(grid_ids(5, 4), (5, 4), 4)[:, 1].tolist() == [1.5, 5.5]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float32])
def test_halves_stay_exact_whatever_type_the_host_has(dtype):
    whole = grid_ids(16, 16).to(dtype)
    assert overview_ids(whole, (16, 16), 4)[-1].tolist() == [10.0, 13.5, 13.5]
    assert overview_ids(whole, (16, 16), 4).dtype == torch.float32


@pytest.mark.parametrize(("factor", "moved"), [(2, 0.5), (4, 1.0), (8, 1.5), (16, 2.0)])
def test_a_mark_moves_one_axis_by_the_logarithm_of_the_factor(factor, moved):
    plain, marked = (overview_ids(grid_ids(16, 16), (16, 16), factor, mark) for mark in (None, (0, 0.5)))
    assert torch.equal(marked - plain, torch.tensor([moved, 0.0, 0.0]).expand(len(plain), 3))


def test_ids_of_a_batch_are_spread_for_each_item():
    whole = torch.stack([grid_ids(4, 6), grid_ids(4, 6, first=(20.0, 1.0, 2.0))])
    spread = overview_ids(whole, (4, 6), 4, (0, 1.0))
    assert spread.shape == (2, 2, 3)
    assert all(
        torch.equal(both, overview_ids(one, (4, 6), 4, (0, 1.0))) for both, one in zip(spread, whole, strict=True)
    )


def test_a_lone_row_or_column_has_its_middle():
    assert overview_ids(grid_ids(1, 4), (1, 4), 2)[:, 1:].tolist() == [[0.0, 0.5], [0.0, 2.5]]


def test_a_flat_picture_has_no_residual_and_a_detail_has_it_where_it_is():
    flat = np.full((64, 64, 3), 120, np.uint8)
    assert not residual(flat, (8, 8), 4).any()
    detail = flat.copy()
    detail[16:24:2, 40:48] = 255  # in the cell (2, 5)
    scores = residual(detail, (8, 8), 4)
    assert scores.dtype == np.float32 and np.unravel_index(scores.argmax(), scores.shape) == (2, 5)


def test_a_residual_is_the_error_of_the_enlarged_overview():
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    small = shrink(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), (4, 6), 2)[0].permute(1, 2, 0).numpy()
    error = (picture - enlarge(small, (32, 48), 2)) ** 2
    expected = np.sqrt(error.reshape(4, 8, 6, 8, 3).mean((1, 3, 4)))
    assert np.allclose(residual(picture, (4, 6), 2), expected, atol=1e-4)


@pytest.mark.parametrize(("grid", "factor"), [((4, 6), 2), ((9, 5), 4), ((3, 1), 8), ((7, 10), 3), ((1, 1), 16)])
def test_an_array_is_scaled_down_as_a_tensor_is(grid, factor):
    """Where a last cell is cut, too: by reflection, or by its border where there is too little to reflect."""
    picture = np.random.default_rng(0).integers(0, 256, (grid[0] * 8, grid[1] * 8, 3), dtype=np.uint8)
    small = shrink(torch.from_numpy(picture).permute(2, 0, 1)[None], grid, factor)
    assert np.allclose(shrink_picture(picture, grid, factor), small[0].permute(1, 2, 0).numpy(), atol=1e-3)


def test_ids_of_several_overviews_stand_one_after_another():
    whole = torch.cat([grid_ids(4, 6), grid_ids(8, 8, first=(20.0, 0.0, 0.0)), grid_ids(4, 4, first=(30.0, 0.0, 0.0))])
    grids = [(4, 6), (8, 8), (4, 4)]
    overviews = {0: Overview(2, "spread", (2, 3)), 2: Overview(4, "spread", (1, 1))}
    ids = spread_ids(whole, grids, overviews, (0, 1.0))
    assert torch.equal(ids[:6], overview_ids(whole[:24], (4, 6), 2, (0, 1.0)))
    assert ids[6:].tolist() == [[32.0, 1.5, 1.5]]


@pytest.mark.parametrize("factor", [2, 3, 4, 7, 8, 15])
def test_the_next_coarser_factor_is_a_power_of_two(factor):
    assert coarser(factor) == next(power for power in (4, 8, 16) if power > factor)
    assert coarser(16) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_enlarged_overview_stays_among_grey_levels(dtype):
    """Cubic interpolation overshoots on both sides of an edge."""
    small = np.zeros((4, 8, 3), dtype)
    small[:, 4:] = 255
    large = enlarge(small, (16, 30), 4)
    assert large.shape == (16, 30, 3) and large.dtype == dtype and large.min() == 0 and large.max() == 255


@pytest.mark.parametrize("size", [(33, 48), (32, 50)])
def test_a_picture_that_is_no_whole_number_of_tokens_is_refused(size):
    with pytest.raises(ValueError, match=f"is {size[1]}x{size[0]}, which 4 rows and 6 columns"):
        residual(np.zeros((*size, 3), np.uint8), (4, 6), 2)


def test_a_finer_overview_is_wrong_by_less():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
    means = [residual(picture, (8, 8), factor).mean() for factor in (2, 4, 8)]
    assert means == sorted(means) and means[0] > 0
